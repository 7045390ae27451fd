"""Vast.ai in small, on a real socket: the API as far as lorasmith uses it, with faults and its own time."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from lorasmith.remote.rental import watchdog
from lorasmith.remote.rental.caps import Caps, usable_price
from lorasmith.remote.rental.provider import Offer, OwnAccess
from lorasmith.remote.rental.rent import onstart

KEY = "account-key"


class PowerLoss(BaseException):
    """The computer that rents is gone at this moment."""


@dataclass
class SimulatedClock:
    """Time that passes only when somebody waits; the instances live by it too."""

    time: float = 1_000_000.0
    passing: Callable[[], None] = lambda: None
    dies_at: float | None = None
    """The renting computer's last moment."""

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        if self.dies_at is not None and self.time + seconds >= self.dies_at:
            self.time = self.dies_at
            raise PowerLoss
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass in the steps of a watchdog."""
        end = self.time + seconds
        while self.time < end:
            self.time = min(self.time + 15.0, end)
            self.passing()


@dataclass
class FakeInstance:
    id: int
    label: str
    price: Any
    """What the provider shows; `billed` goes on at the last that was a number."""
    created: float
    watch: watchdog.Watchdog
    """Its watchdog, which knows what it was told and what it asks for: nobody else helps it."""
    listed_from: float
    starts_at: float | None
    """None: it never does."""
    status: str = "loading"
    host: str = "127.0.0.1"
    port: int = 22
    beat: float = 0.0
    told: str = ""
    """What the renting computer wrote into the heartbeat."""
    busy: bool = False
    billed: float = 0.0
    """Dollars for its time, second by second at the price of that second."""
    rate: float = 0.0
    counted_until: float = 0.0
    gone_at: float | None = None
    traffic: float = 0.0
    """Dollars, as its watchdog counts them."""
    log: list[str] = field(default_factory=list)

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "label": self.label,
            "actual_status": self.status,
            "dph_total": self.price,
            "public_ipaddr": self.host,
            "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(self.port)}]},
        }


@dataclass
class FakeVast:
    """The provider's state. `faults` is asked before each answer which one, if any, to give instead."""

    clock: SimulatedClock
    url: str = ""
    faults: Callable[[str], str] = lambda kind: ""
    listing_delay: float = 0.0
    starts_after: float | None = 60.0
    dead_status: str = ""
    port: int = 22
    on_key: Callable[[str], object] = lambda key: None
    loses_labels: bool = False
    """Like a provider that ignores the label of a request to rent."""
    first_log: list[str] = field(default_factory=list)
    """What every instance writes into its log as it starts."""
    bills: dict[int, Any] = field(default_factory=dict)
    """Instance → dollars charged, where the bill is not what its time and traffic cost."""
    offers: list[dict[str, Any]] = field(default_factory=list)
    instances: dict[int, FakeInstance] = field(default_factory=dict)
    bought: list[str] = field(default_factory=list)
    """The label of every purchase."""
    seen: list[str] = field(default_factory=list)
    price_path: str = ""

    def __post_init__(self) -> None:
        self.clock.passing = self.tick

    def running(self) -> list[FakeInstance]:
        """What costs money now."""
        return [found for found in self.instances.values() if found.gone_at is None]

    def tick(self) -> None:
        """What happens on the instances: they start, and their watchdogs look."""
        now = self.clock.time
        for one in self.running():
            if one.status == "loading" and one.starts_at is not None and now >= one.starts_at:
                one.status = self.dead_status or "running"
            self._bill(one, now)
            self._watch(one, now)

    def _bill(self, one: FakeInstance, now: float) -> None:
        if usable_price(one.price):
            one.rate = one.price
        one.billed += (now - one.counted_until) / 3600 * one.rate
        one.counted_until = now

    def _watch(self, one: FakeInstance, now: float) -> None:
        """What the watchdog does every 15 seconds, over the same bad line."""
        one.watch.spending.traffic = one.traffic
        one.watch.see_beat(one.told)
        status, body = self.answer("GET", f"/api/v0/instances/{one.id}/", {})
        if status == 200:
            one.watch.see_answer(json.dumps(body).encode(), self.price_path)
        if one.watch.reason(now, one.beat, one.busy):
            self.answer("DELETE", f"/api/v0/instances/{one.id}/", {})

    def cost(self, one: FakeInstance) -> float:
        """Dollars so far."""
        return one.billed + one.traffic

    def buy(self, offer: int, body: dict[str, Any]) -> FakeInstance:
        asked = re.search(r"dog\.py http\S+ CONTAINER_API_KEY (\S+) \S+ ([\d. ]+) > ", body["onstart"])
        assert asked, "an instance without a watchdog was asked for"
        assert KEY not in body["onstart"]
        self.price_path = asked[1]
        now = self.clock.time
        price = next(item["dph_total"] for item in self.offers if item["id"] == offer)
        one = FakeInstance(
            id=5000 + len(self.instances),
            label="" if self.loses_labels else body["label"],
            price=price,
            created=now,
            watch=watchdog.Watchdog(now, tuple(asked[2].split())),
            rate=price,
            counted_until=now,
            listed_from=now + self.listing_delay,
            starts_at=None if self.starts_after is None else now + self.starts_after,
            port=self.port,
            log=list(self.first_log),
        )
        self.instances[one.id] = one
        self.bought.append(body["label"])
        return one

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body; status 0 drops the connection."""
        url = urlparse(path)
        parts = url.path.strip("/").split("/")
        if parts[1:] == ["v0", "bundles"]:
            return self._plain("search", lambda: {"success": True, "offers": self.offers})
        if parts[1:3] == ["v0", "asks"]:
            return self._create(int(parts[3]), body)
        if parts[1:] == ["v1", "instances"]:
            return self._list(parse_qs(url.query))
        if parts[1:] == ["v0", "charges"]:
            return self._charges(parse_qs(url.query))
        if parts[0] == "logs":
            return 200, "".join(f"{line}\n" for line in self.instances[int(parts[1])].log)
        if parts[3] == "request_logs":
            fault = self.faults("log")
            address = (
                f"http://example.org/{parts[4]}" if fault == "elsewhere" else f"{self.url}/logs/{parts[4]}"
            )
            return (404, {}) if fault == "none" else (200, {"success": True, "result_url": address})
        number = int(parts[3])
        if method == "PUT" and "label" in body:
            self.instances[number].label = body["label"]
            return 200, {"success": True}
        if len(parts) == 5 and parts[4] == "ssh":
            self.on_key(body["ssh_key"])
            return 200, {"success": True}
        if method == "DELETE":
            return self._destroy(number)
        return self._plain("one", lambda: self._one(number))

    def _plain(self, kind: str, make: Callable[[], Any]) -> tuple[int, Any]:
        fault = self.faults(kind)
        return {"drop": (0, None), "429": (429, {}), "500": (502, "<html>")}.get(fault) or (200, make())

    def _create(self, offer: int, body: dict[str, Any]) -> tuple[int, Any]:
        fault = self.faults("create")
        if fault == "refused":
            return 400, {"success": False, "error": "no_such_ask", "msg": "the offer is gone"}
        if fault == "lost before":
            return 0, None
        if fault == "429 before":
            return 429, {"success": False}
        one = self.buy(offer, body)
        late = {"lost after": (0, None), "500 after": (504, "gateway"), "garbage after": (200, "<html>")}
        return late.get(fault) or (200, {"success": True, "new_contract": one.id})

    def _list(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        fault = self.faults("list")
        if fault in ("drop", "429", "500"):
            return {"drop": (0, None), "429": (429, {}), "500": (502, "<html>")}[fault]
        if fault == "empty":
            return 200, {"success": True, "instances": [], "total_instances": 0, "next_token": None}
        known = [one for one in self.running() if one.listed_from <= self.clock.time]
        known.sort(key=lambda one: one.id)
        limit, start = int(query["limit"][0]), int(query.get("after_token", ["0"])[0])
        page = known[start : start + limit]
        token = str(start + limit) if start + limit < len(known) else None
        total = len(known)
        if fault == "lost page":
            page, token = page[:-1], None
        elif fault == "hidden":
            page, total = page[:-1], total - 1  # the list contradicts nothing and still leaves one out
        return 200, {
            "success": True,
            "instances": [one.shown() for one in page],
            "total_instances": total,
            "next_token": token,
        }

    def _charges(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        days = json.loads(query["select_filters"][0])["day"]
        assert days["gte"] % 86_400 == 0
        rows = [
            {
                "source": f"instance-{one.id}",
                "type": "instance",
                "amount": self.bills.get(one.id, self.cost(one)),
                "items": [{"type": "gpu", "description": f"1.000 hours at ${one.rate:.3f}/hour"}],
            }
            for one in self.instances.values()
            if days["gte"] <= one.created <= days["lte"]
        ]
        rows.append({"source": "volume-5000", "type": "volume", "amount": 99.0, "items": []})
        start = int(query.get("after_token", ["0"])[0])
        token = str(start + 1) if start + 1 < len(rows) else None  # one a page
        page = rows[start : start + 1]
        return 200, {"success": True, "results": page, "total": len(rows), "next_token": token}

    def _one(self, number: int) -> dict[str, Any]:
        one = self.instances.get(number)
        return {"instances": None if one is None or one.gone_at is not None else one.shown()}

    def _destroy(self, number: int) -> tuple[int, Any]:
        fault = self.faults("destroy")
        one = self.instances.get(number)
        if one is None or one.gone_at is not None:
            return 404, {"success": False, "msg": "no_such_instance"}
        if fault == "ignored":
            return 200, {"success": True}
        if fault in ("drop before", "429", "500"):
            return {"drop before": (0, None), "429": (429, {}), "500": (502, "<html>")}[fault]
        one.gone_at = self.clock.time
        return (0, None) if fault == "drop after" else (200, {"success": True})


FAULTS = {
    "search": ["drop", "429", "500"],
    "create": ["refused", "lost before", "lost after", "429 before", "500 after", "garbage after"],
    "list": ["drop", "429", "500", "empty", "lost page", "hidden"],
    "one": ["drop", "429", "500"],
    "destroy": ["ignored", "drop before", "drop after", "429", "500"],
}


def random_faults(generator: random.Random, rate: float, counted: dict[str, int]) -> Callable[[str], str]:
    """Each answer fails with this probability, in a way of its kind; `counted` counts them."""

    def fault(kind: str) -> str:
        if generator.random() >= rate:
            return ""
        chosen = generator.choice(FAULTS[kind])
        counted[f"{kind}: {chosen}"] = counted.get(f"{kind}: {chosen}", 0) + 1
        return chosen

    return fault


def a_start(url: str = "http://x", *, hours: float = 1.0, grace: float = 1.0, folder: str = "~/x") -> str:
    """Commands for the start of an instance, as they are sent."""
    offer = Offer(1, "H100", 1, 80, 1.5, 0.02, 0.002, 0.001, 0.99, 500, 800.0, 1600.0, "")
    caps = Caps(price=2.0, cost=1e6, hours=hours, grace=grace)
    return onstart(
        OwnAccess(f"{url}/api/v0/instances/$CONTAINER_ID/", "CONTAINER_API_KEY", "instances/dph_total"),
        caps,
        offer,
        folder,
    )


def an_offer(number: int = 1, price: float = 1.5, **more: Any) -> dict[str, Any]:
    """An offer as the search shows it."""
    return {
        "id": number,
        "gpu_name": "H100 SXM",
        "num_gpus": 1,
        "gpu_ram": 81559,
        "dph_total": price,
        "storage_cost": 0.15,
        "inet_up_cost": 0.002,
        "inet_down_cost": 0.001,
        "reliability2": 0.996,
        "disk_space": 900.0,
        "inet_up": 2500.0,
        "inet_down": 3000.0,
        "total_flops": 53.0,
        "geolocation": "Norway, NO",
        **more,
    }


@contextmanager
def serve() -> Iterator[Callable[[FakeVast], None]]:
    """A server; call what it yields with the provider that is to answer from now on."""
    current: list[FakeVast] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            """Not here."""

        def handle_any(self) -> None:
            vast = current[0]
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else {}
            vast.seen.append(f"{self.command} {self.path}")
            public = self.path.startswith("/logs/")
            assert not (public and self.headers.get("Authorization")), "the key went to a public address"
            if not public and self.headers.get("Authorization") != f"Bearer {KEY}":
                self.reply(401, {"success": False, "msg": "invalid key"})
                return
            status, content = vast.answer(self.command, self.path, body)
            if status == 0:
                self.close_connection = True
                self.connection.close()
                return
            self.reply(status, content)

        def reply(self, status: int, content: Any) -> None:
            packed = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(packed)))
            self.end_headers()
            self.wfile.write(packed)

        do_GET = do_PUT = do_POST = do_DELETE = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def use(vast: FakeVast) -> None:
        vast.url = f"http://127.0.0.1:{server.server_address[1]}"
        current[:] = [vast]

    try:
        yield use
    finally:
        server.shutdown()
        server.server_close()

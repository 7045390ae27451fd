"""Vast.ai over its REST API (docs.vast.ai/api-reference): a thin client that never asks twice for money.

Of the documented calls, two are left out on purpose: a stopped instance goes on billing its disk, and
invoices are payments into the account; what an instance cost is in the charges.
"""

from __future__ import annotations

import json
from typing import Any

from lorasmith.errors import ProviderError
from lorasmith.remote.provider import Clock, Farewell, Instance, Offer, RealClock, UncertainError, Wish
from lorasmith.remote.vast_http import CONSOLE, NAME, Connection
from lorasmith.remote.vast_words import instance_of, offer_of, parse_query

URL = "https://console.vast.ai"
_PAGE = 25
"""Most instances that one page may hold."""
_CHARGES = 100
"""Most contracts that one page of charges may hold."""
_LOG_SECONDS = 10.0
"""How long a log may take to appear at the address that is given for it."""
_DAY = 86_400


class Vast:
    """The provider Vast.ai."""

    name = NAME
    console = CONSOLE

    def __init__(
        self, key: str, *, url: str = URL, clock: Clock | None = None, timeout: float = 30.0
    ) -> None:
        """`timeout`: seconds for one answer. Needs the extra `remote`."""
        self.connection = Connection(key, url, clock or RealClock(), timeout)
        # Vast.ai sets both variables in every container; the key can start, stop and destroy it alone.
        self.farewell = Farewell(f"{url}/api/v0/instances/$CONTAINER_ID/", "CONTAINER_API_KEY")

    def offers(self, query: str, disk: float) -> list[Offer]:
        """What can be rented, the cheapest first; `query` such as `gpu_name=H100_SXM num_gpus=1`."""
        wanted: dict[str, Any] = {
            "rentable": {"eq": True},
            "rented": {"eq": False},
            "verified": {"eq": True},
            "disk_space": {"gte": disk},
            **parse_query(query),
            "order": [["dph_total", "asc"]],
            "type": "on-demand",
            "allocated_storage": disk,
            "limit": 64,
        }
        body = self.connection.again("POST", "/api/v0/bundles/", json=wanted)
        found = body.get("offers")
        if not isinstance(found, list):
            raise ProviderError("the answer to a search holds no offers", where=self.name)
        return sorted((offer_of(item, disk) for item in found), key=lambda offer: offer.price_per_hour)

    def create(self, offer: int, wish: Wish) -> int:
        """Rent, with the label set by the same request; the instance's id."""
        asked = {
            "client_id": "me",
            "image": wish.image,
            "disk": wish.disk,
            "label": wish.label,
            "runtype": "ssh_direct",
            "target_state": "running",
            "onstart": wish.onstart,
        }
        number = self.connection.once("PUT", f"/api/v0/asks/{offer}/", json=asked).get("new_contract")
        if not isinstance(number, int):
            raise UncertainError("the answer to the request to rent names no instance", where=self.name)
        return number

    def instances(self) -> list[Instance]:
        """All instances, page by page; raises `ProviderError` when pages do not add up to the total."""
        found = self._pages("/api/v1/instances/", {"limit": str(_PAGE)}, "instances", "total_instances")
        return list({item["id"]: instance_of(item) for item in found}.values())

    def instance(self, number: int) -> Instance | None:
        """One instance; None only where the provider says that there is none."""
        body = self.connection.again(
            "GET", f"/api/v0/instances/{number}/", missing={}, params={"owner": "me"}
        )
        if body == {} or ("instances" in body and body["instances"] is None):
            return None
        item = body.get("instances")
        if not isinstance(item, dict) or item.get("id") != number:
            raise ProviderError("the answer holds another instance or none", where=self.name)
        return instance_of(item)

    def label(self, number: int, label: str) -> None:
        """Set the label of an instance that has lost it."""
        self.connection.again("PUT", f"/api/v0/instances/{number}/", json={"label": label})

    def destroy(self, number: int) -> None:
        """Give it back and delete its disk; no error when it is gone already."""
        self.connection.again("DELETE", f"/api/v0/instances/{number}/", missing={})

    def allow_key(self, number: int, public_key: str) -> None:
        """Let the holder of an ssh key in."""
        self.connection.again("POST", f"/api/v0/instances/{number}/ssh/", json={"ssh_key": public_key})

    def log(self, number: int, containing: str) -> list[str]:
        """Lines of the container's log: Vast.ai puts them at an address of its own, a moment later."""
        asked = {"tail": "1000", "filter": containing}
        body = self.connection.again("PUT", f"/api/v0/instances/request_logs/{number}/", json=asked)
        address = str(body.get("result_url") or "")
        # A log that somebody in between can write proves nothing; the test's own machine has no one between.
        if not address.startswith(("https://", "http://127.0.0.1:")):
            raise ProviderError("the log has no address that can be trusted", where=self.name)
        until = self.connection.clock.now() + _LOG_SECONDS
        while (text := self.connection.elsewhere(address)) is None:
            if self.connection.clock.now() >= until:
                raise ProviderError("the log does not appear", where=f"instance {number}")
            self.connection.clock.sleep(1.0)
        return [line for line in text.splitlines() if containing in line]

    def charges(self, since: float, until: float) -> dict[int, float]:
        """US dollars billed for each instance in days of this span (seconds since 1970)."""
        days = {"gte": int(since) // _DAY * _DAY, "lte": int(until)}
        chosen = json.dumps({"day": days, "type": {"in": ["instance"]}})
        found: dict[int, float] = {}
        query = {"select_filters": chosen, "limit": str(_CHARGES)}
        for item in self._pages("/api/v0/charges/", query, "results", "total"):
            kind, _, number = str(item.get("source") or "").partition("-")
            if kind == "instance" and number.isdigit():
                found[int(number)] = found.get(int(number), 0.0) + float(item["amount"])
        return found

    def _pages(self, path: str, query: dict[str, str], items: str, count: str) -> list[dict[str, Any]]:
        """Every item of a listing; raises `ProviderError` rather than give a part of them."""
        found: list[dict[str, Any]] = []
        token: str | None = None
        while True:
            parameters = {**query, **({"after_token": token} if token else {})}
            body = self.connection.again("GET", path, params=parameters)
            page, total = body.get(items), body.get(count)
            if not isinstance(page, list) or not isinstance(total, int):
                raise ProviderError(f"the answer to a listing holds no {items}", where=self.name)
            found += page
            token = body.get("next_token")
            if not token:
                break
            if not page:
                raise ProviderError("an empty page within a listing", where=self.name)
        # One that moved to another page meanwhile may come twice, in place of another that never comes.
        distinct = {item.get("id") or json.dumps(item, sort_keys=True) for item in found}
        if len(distinct) < total:
            raise ProviderError(
                f"pages are missing from a listing: {len(distinct)} of {total} {items}", where=self.name
            )
        return found

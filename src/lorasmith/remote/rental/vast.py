"""Vast.ai over its REST API (docs.vast.ai/api-reference): a thin client that never asks twice for money.

Of the documented calls, two are left out on purpose: a stopped instance goes on billing its disk, and
invoices are payments into the account; what an instance cost is in the charges.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lorasmith.errors import ExitCode, InputError, MachineError, ProviderError, UsageError, os_errors
from lorasmith.parsing import parse_json
from lorasmith.remote.rental.provider import (
    Charge,
    Clock,
    Instance,
    Offer,
    OwnAccess,
    RealClock,
    RefusedError,
    UncertainError,
    Wish,
)

# Vast.ai's REST API as a connection: the key, requests that may be repeated, and what a refusal means.


NAME = "vast.ai"
CONSOLE = "https://console.vast.ai/instances/"
_ATTEMPTS = 6


def read_key() -> str:
    """The account's key, from `VAST_API_KEY` or a file that only its owner can read.

    Raises `InputError` where there is none, or where others could read the file.
    """
    if key := os.environ.get("VAST_API_KEY", "").strip():
        return key
    shared = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(shared) / "vastai" / "vast_api_key"
    if not path.is_file():
        raise InputError(
            "there is no key for Vast.ai",
            where=path,
            expected="the variable VAST_API_KEY, or this file",
            remedy="make a key at https://cloud.vast.ai/manage-keys/ and export VAST_API_KEY",
        )
    with os_errors(path, "read the key"):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise InputError(
                "others than its owner can read the file of the key", where=path, remedy=f"chmod 600 {path}"
            )
        return path.read_text().strip()


class KeyRefusedError(RefusedError):
    """The key is wrong or not enough: a person's mistake, not the network's."""

    exit_code = ExitCode.BAD_INPUT


class Connection:
    """One account, over one address."""

    def __init__(self, key: str, url: str, clock: Clock, timeout: float) -> None:
        """`timeout`: seconds for one answer. Needs the extra `remote`."""
        try:
            import httpx2 as httpx
        except ImportError as error:
            raise MachineError(
                "httpx2 is not installed here", remedy="pip install 'lorasmith[remote]'"
            ) from error
        self.clock = clock
        self._http = httpx
        self._timeout = timeout
        self._client = httpx.Client(
            base_url=url,
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
        )

    def once(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """A request that must not be repeated, and its answer, which has success in it.

        Raises `RefusedError` when nothing was done, `UncertainError` when nobody knows.
        """
        try:
            answer = self._client.request(method, path, **request)
        except self._http.HTTPError as error:
            raise UncertainError(f"no answer to the request to rent: {error!r}", where=NAME) from error
        # 4xx says that nothing was done; 408 and 429 may come from a gateway that had passed it on.
        if 400 <= answer.status_code < 500 and answer.status_code not in (408, 409, 429):
            raise self._refusal(answer)
        body = _json(answer)
        if answer.status_code != 200 or not isinstance(body, dict) or not body.get("success"):
            raise UncertainError(
                f"the answer to the request to rent is none: status {answer.status_code}", where=NAME
            )
        return body

    def again(
        self, method: str, path: str, *, missing: dict[str, Any] | None = None, **request: Any
    ) -> dict[str, Any]:
        """A request that may be repeated. `missing`: what a 404 stands for, where it is an answer."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                self.clock.sleep(min(2.0**attempt, 30.0))
            try:
                answer = self._client.request(method, path, **request)
            except self._http.HTTPError as error:
                problem = repr(error)
                continue
            if answer.status_code == 404 and missing is not None:
                return missing
            if answer.status_code in (408, 429) or answer.status_code >= 500:
                problem = f"status {answer.status_code}"
                continue
            if answer.status_code >= 400:
                raise self._refusal(answer)
            body = _json(answer)
            if isinstance(body, dict) and body.get("success") is not False:
                return body
            problem = "an answer that is not JSON" if body is None else f"no success: {str(body)[:200]}"
        raise ProviderError(
            f"no usable answer to {method} {path} in {_ATTEMPTS} attempts: {problem}",
            where=NAME,
            remedy=f"look at {CONSOLE}, and try again",
        )

    def elsewhere(self, url: str) -> str | None:
        """The text at a public address, asked for without the key; None where there is none yet."""
        try:
            answer = self._http.get(url, timeout=self._timeout)
        except self._http.HTTPError:
            return None
        return str(answer.text) if answer.status_code == 200 else None

    def _refusal(self, answer: Any) -> ProviderError:
        body = _json(answer)
        said = str(body.get("msg") or body.get("error") or "") if isinstance(body, dict) else ""
        if answer.status_code in (401, 403):
            return KeyRefusedError(
                f"the key is not accepted (status {answer.status_code}) {said}".strip(),
                where=NAME,
                remedy="check VAST_API_KEY, its permissions, and the account's credit",
            )
        return RefusedError(f"refused with status {answer.status_code}: {said}", where=NAME)


def _json(answer: Any) -> Any:
    """The body, or None where it is no JSON."""
    try:
        return parse_json(answer.content)
    except ValueError:
        return None


# Vast.ai's own words: conditions of a search, and offers and instances as its answers hold them.


_HOURS_PER_MONTH = 730.0
"""Vast.ai states the price of a disk per GB and month."""
_OPERATORS = {"=": "eq", "==": "eq", "!=": "neq", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}
_TERM = re.compile(r"""\s*([a-z_0-9]+)\s*(==|!=|>=|<=|=|>|<)\s*("[^"]*"|'[^']*'|\S+)""")
_NOT_ASKED = {"rentable", "rented", "order", "type", "allocated_storage", "limit"}
"""Set by lorasmith: other values would show machines that cannot be rented, or another price than is paid."""


def parse_query(text: str) -> dict[str, Any]:
    """Read terms such as `gpu_name=H100_SXM dph_total<2.5`; underscores in a name of a GPU are spaces."""
    conditions: dict[str, Any] = {}
    place = 0
    while text[place:].strip():
        match = _TERM.match(text, place)
        if match and match[1] in _NOT_ASKED:
            raise UsageError(
                f"{match[1]} is set by lorasmith itself", remedy="leave it out of the conditions"
            )
        if not match or not text.isprintable():
            raise UsageError(
                f"{text[place:].strip()!a} is no condition on an offer",
                expected="such as: gpu_name=RTX_4090 num_gpus=1 reliability>0.98 dph_total<0.6",
            )
        name, operator, value = match.groups()
        conditions.setdefault(name, {})[_OPERATORS[operator]] = _value(name, value.strip("'\""))
        place = match.end()
    return conditions


def _value(name: str, text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return text.replace("_", " ") if name == "gpu_name" else text
    if not math.isfinite(number):
        raise UsageError(f"{name} is compared with {text}", expected="a finite number")
    return int(number) if number.is_integer() else number


def offer_of(item: dict[str, Any], disk: float) -> Offer:
    """One of the offers of a search that asked for `disk` GB; raises `ValueError` for one that is none."""
    if (identity := _whole_number(item.get("id"))) is None:
        raise ValueError(f"its id is {item.get('id')!r:.40}")

    def number(name: str) -> float:
        value = float(item.get(name) or 0.0)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}")
        return value

    if not number("dph_total"):
        raise ValueError("it has no price")
    return Offer(
        id=identity,
        gpu=str(item.get("gpu_name") or "?"),
        gpus=int(item.get("num_gpus") or 0),
        gpu_memory=int(number("gpu_ram") * 1e6),
        price_per_hour=number("dph_total"),
        disk_per_hour=number("storage_cost") * disk / _HOURS_PER_MONTH,
        upload_per_gb=number("inet_up_cost"),
        download_per_gb=number("inet_down_cost"),
        reliability=number("reliability2") or number("reliability"),
        disk=number("disk_space"),
        upload=number("inet_up"),
        download=number("inet_down"),
        place=str(item.get("geolocation") or ""),
        flops=number("total_flops") * 1e12,
    )


def instance_of(item: dict[str, Any]) -> Instance:
    """An instance as far as its entry can be read: an odd one, perhaps somebody else's, stops nothing.

    Directly at its own address where the ssh port is open there, else through the provider's proxy.
    """
    host, port = item.get("public_ipaddr"), _direct_port(item.get("ports"))
    if not (host and port):
        host, port = item.get("ssh_host"), _whole_number(item.get("ssh_port"))
    usable = isinstance(host, str) and port is not None
    return Instance(
        id=_whole_number(item.get("id")),
        label=str(item.get("label") or ""),
        status=str(item.get("actual_status") or "provisioning"),
        price_per_hour=_as_stated(item.get("dph_total")),
        host=str(host).strip() if usable else None,
        port=port if usable else None,
    )


def _as_stated(price: Any) -> float | None:
    """A price as it stands there, however odd; None where it is no number at all."""
    try:
        return float(price) if isinstance(price, int | float) else None
    except OverflowError:
        return math.inf


def _direct_port(ports: Any) -> int | None:
    try:
        return _whole_number(ports["22/tcp"][0]["HostPort"])
    except (TypeError, KeyError, IndexError):
        return None


def _whole_number(value: Any) -> int | None:
    """A number above zero, or the text of one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if not re.fullmatch(r"[0-9]{1,18}", str(value)):
        return None
    return int(value) or None


_RATE = re.compile(r"hours? at \$([0-9]+(?:\.[0-9]+)?)/hour")
"""Rate of a line of a bill, in the provider's own sentence."""


def charge_of(items: Iterable[dict[str, Any]]) -> Charge:
    """What the bills of one instance come to; the hourly rate is the sum over GPU, disk and the like."""
    dollars, rates = 0.0, dict[str, float]()
    for item in items:
        dollars += float(item["amount"])
        for line in item.get("items") or []:
            if rate := _RATE.search(str(line.get("description") or "")):
                kind = str(line.get("type"))
                rates[kind] = max(rates.get(kind, 0.0), float(rate[1]))
    return Charge(dollars, sum(rates.values()) or None)


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
        self,
        key: str,
        *,
        url: str = URL,
        clock: Clock | None = None,
        timeout: float = 30.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`timeout`: seconds for one answer. `say` is told what was left out. Needs the extra `remote`."""
        self.connection = Connection(key, url, clock or RealClock(), timeout)
        self.say = say
        # Vast.ai sets both variables in every container; the key is good for that instance alone.
        self.own_access = OwnAccess(
            f"{url}/api/v0/instances/$CONTAINER_ID/", "CONTAINER_API_KEY", "instances/dph_total"
        )

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
        listed = body.get("offers")
        if not isinstance(listed, list):
            raise ProviderError("the answer to a search holds no offers", where=self.name)
        offers: list[Offer] = []
        problem = ""
        for item in listed:
            try:
                offers.append(offer_of(item, disk))
            except (AttributeError, TypeError, ValueError, OverflowError) as error:
                problem = str(error)
        odd = len(listed) - len(offers)
        if odd and not offers:
            raise ProviderError(
                f"none of the {odd} offers can be read, the last because {problem}",
                where=self.name,
                remedy="try again later, or look at the provider's own page",
            )
        if odd:
            self.say(f"note: {odd} of {len(listed)} offers cannot be read and are left out ({problem})")
        return sorted(offers, key=lambda offer: offer.price_per_hour)

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
        if (instance := _whole_number(number)) is None:
            raise UncertainError("the answer to the request to rent names no instance", where=self.name)
        return instance

    def instances(self) -> list[Instance]:
        """All instances, page by page; raises `ProviderError` when pages do not add up to the total."""
        listed = self._pages("/api/v1/instances/", {"limit": str(_PAGE)}, "instances", "total_instances")
        shown = [instance_of(item) for item in listed]
        numbered = {one.id: one for one in shown if one.id is not None}
        return [*numbered.values(), *(one for one in shown if one.id is None)]

    def instance(self, number: int) -> Instance | None:
        """One instance; None only where the provider says that there is none."""
        body = self.connection.again(
            "GET", f"/api/v0/instances/{number}/", missing={}, params={"owner": "me"}
        )
        if body == {} or ("instances" in body and body["instances"] is None):
            return None
        item = body.get("instances")
        if not isinstance(item, dict) or _whole_number(item.get("id")) != number:
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

    def charges(self, since: float, until: float) -> dict[int, Charge]:
        """What was billed for each instance in days of this span (seconds since 1970)."""
        days = {"gte": int(since) // _DAY * _DAY, "lte": int(until)}
        chosen = json.dumps({"day": days, "type": {"in": ["instance"]}})
        billed: dict[int, list[dict[str, Any]]] = {}
        query = {"select_filters": chosen, "limit": str(_CHARGES)}
        for item in self._pages("/api/v0/charges/", query, "results", "total"):
            kind, _, number = str(item.get("source") or "").partition("-")
            if kind == "instance" and (known := _whole_number(number)) is not None:
                billed.setdefault(known, []).append(item)
        try:
            return {number: charge_of(items) for number, items in billed.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProviderError(f"a charge cannot be read: {error!r:.80}", where=self.name) from error

    def _pages(self, path: str, query: dict[str, str], items: str, count: str) -> list[dict[str, Any]]:
        """Every item of a listing; raises `ProviderError` rather than give a part of them."""
        items_so_far: list[dict[str, Any]] = []
        token: str | None = None
        while True:
            parameters = {**query, **({"after_token": token} if token else {})}
            body = self.connection.again("GET", path, params=parameters)
            page, total = body.get(items), body.get(count)
            if not isinstance(page, list) or not isinstance(total, int):
                raise ProviderError(f"the answer to a listing holds no {items}", where=self.name)
            if not all(isinstance(item, dict) for item in page):
                raise ProviderError(f"a listing of {items} holds what is none", where=self.name)
            items_so_far += page
            token = body.get("next_token")
            if not token:
                break
            if not page:
                raise ProviderError("an empty page within a listing", where=self.name)
        # One that moved to another page meanwhile may come twice, in place of another that never comes.
        distinct = {json.dumps(item.get("id") or item, sort_keys=True) for item in items_so_far}
        if len(distinct) < total:
            raise ProviderError(
                f"pages are missing from a listing: {len(distinct)} of {total} {items}", where=self.name
            )
        return items_so_far

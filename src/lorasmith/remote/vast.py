"""Vast.ai over its REST API (docs.vast.ai/api-reference): a thin client that never asks twice for money."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasmith.errors import InputError, MachineError, ProviderError, UsageError, os_errors
from lorasmith.remote.provider import (
    Clock,
    Instance,
    Offer,
    RealClock,
    RefusedError,
    UncertainError,
    Wish,
)

URL = "https://console.vast.ai"
_HOURS_PER_MONTH = 730.0
"""Vast.ai states the price of a disk per GB and month."""
_ATTEMPTS = 6
_PAGE = 25
"""Most instances that one page may hold."""
_OPERATORS = {"=": "eq", "==": "eq", "!=": "neq", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}
_TERM = re.compile(r"""\s*([a-z_0-9]+)\s*(==|!=|>=|<=|=|>|<)\s*("[^"]*"|'[^']*'|\S+)""")


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


class Vast:
    """The provider Vast.ai."""

    name = "vast.ai"

    def __init__(
        self, key: str, *, url: str = URL, clock: Clock | None = None, timeout: float = 30.0
    ) -> None:
        """`timeout`: seconds for one answer. Needs the extra `remote`."""
        try:
            import httpx2 as httpx
        except ImportError as error:
            raise MachineError(
                "httpx2 is not installed here", remedy="pip install 'lorasmith[remote]'"
            ) from error
        self._clock = clock or RealClock()
        self._http = httpx
        self._client = httpx.Client(
            base_url=url,
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
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
        body = self._again("POST", "/api/v0/bundles/", json=wanted)
        found = body.get("offers")
        if not isinstance(found, list):
            raise ProviderError("the answer to a search holds no offers", where=self.name)
        return sorted((_offer(item, disk) for item in found), key=lambda offer: offer.price_per_hour)

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
        try:
            answer = self._client.put(f"/api/v0/asks/{offer}/", json=asked)
        except self._http.HTTPError as error:
            raise UncertainError(f"no answer to the request to rent: {error!r}", where=self.name) from error
        # 4xx says that nothing was done; 408 and 429 may come from a gateway that had passed it on.
        if 400 <= answer.status_code < 500 and answer.status_code not in (408, 409, 429):
            raise self._refusal(answer)
        try:
            body = answer.json()
            number = body["new_contract"] if body.get("success") and answer.status_code == 200 else None
        except (ValueError, KeyError, AttributeError):
            number = None
        if not isinstance(number, int):
            raise UncertainError(
                f"the answer to the request to rent is none: status {answer.status_code}", where=self.name
            )
        return number

    def instances(self) -> list[Instance]:
        """All instances, page by page; raises `ProviderError` when pages do not add up to the total."""
        found: dict[int, Instance] = {}
        token: str | None = None
        while True:
            parameters = {"limit": str(_PAGE), **({"after_token": token} if token else {})}
            body = self._again("GET", "/api/v1/instances/", params=parameters)
            page, total = body.get("instances"), body.get("total_instances")
            if not isinstance(page, list) or not isinstance(total, int):
                raise ProviderError("the answer to a listing holds no instances", where=self.name)
            found.update((item["id"], _instance(item)) for item in page)
            token = body.get("next_token")
            if not token:
                break
            if not page:
                raise ProviderError("an empty page within a listing", where=self.name)
        if len(found) < total:
            raise ProviderError(
                f"pages are missing from a listing: {len(found)} of {total} instances", where=self.name
            )
        return list(found.values())

    def instance(self, number: int) -> Instance | None:
        """One instance; None only where the provider says that there is none."""
        body = self._again("GET", f"/api/v0/instances/{number}/", missing={}, params={"owner": "me"})
        if body == {} or ("instances" in body and body["instances"] is None):
            return None
        item = body.get("instances")
        if not isinstance(item, dict) or item.get("id") != number:
            raise ProviderError("the answer holds another instance or none", where=self.name)
        return _instance(item)

    def destroy(self, number: int) -> None:
        """Give it back and delete its disk; no error when it is gone already."""
        self._again("DELETE", f"/api/v0/instances/{number}/", missing={})

    def allow_key(self, number: int, public_key: str) -> None:
        """Let the holder of an ssh key in."""
        self._again("POST", f"/api/v0/instances/{number}/ssh/", json={"ssh_key": public_key})

    def _again(
        self, method: str, path: str, *, missing: dict[str, Any] | None = None, **request: Any
    ) -> dict[str, Any]:
        """A request that may be repeated. `missing`: what a 404 stands for, where it is an answer."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                self._clock.sleep(min(2.0**attempt, 30.0))
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
            try:
                body = answer.json()
            except ValueError:
                problem = "an answer that is not JSON"
                continue
            if isinstance(body, dict) and body.get("success") is not False:
                return body
            problem = f"an answer without success: {str(body)[:200]}"
        raise ProviderError(
            f"no usable answer to {method} {path} in {_ATTEMPTS} attempts: {problem}",
            where=self.name,
            remedy="look at https://console.vast.ai/instances/, and try again",
        )

    def _refusal(self, answer: Any) -> ProviderError:
        try:
            said = str(answer.json().get("msg") or answer.json().get("error") or "")
        except (ValueError, AttributeError):
            said = ""
        if answer.status_code in (401, 403):
            return RefusedError(
                f"the key is not accepted (status {answer.status_code}) {said}".strip(),
                where=self.name,
                remedy="check VAST_API_KEY, its permissions, and the account's credit",
            )
        return RefusedError(f"refused with status {answer.status_code}: {said}", where=self.name)


def parse_query(text: str) -> dict[str, Any]:
    """Read terms such as `gpu_name=H100_SXM dph_total<2.5`; underscores in a name of a GPU are spaces."""
    found: dict[str, Any] = {}
    place = 0
    while text[place:].strip():
        match = _TERM.match(text, place)
        if not match:
            raise UsageError(
                f"{text[place:].strip()!r} is no condition on an offer",
                expected="such as: gpu_name=RTX_4090 num_gpus=1 reliability>0.98 dph_total<0.6",
            )
        name, operator, value = match.groups()
        found.setdefault(name, {})[_OPERATORS[operator]] = _value(name, value.strip("'\""))
        place = match.end()
    return found


def _value(name: str, text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return text.replace("_", " ") if name == "gpu_name" else text
    return int(number) if number.is_integer() else number


def _offer(item: dict[str, Any], disk: float) -> Offer:
    number: Callable[[str], float] = lambda name: float(item.get(name) or 0.0)  # noqa: E731 - one line
    return Offer(
        id=int(item["id"]),
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
    )


def _instance(item: dict[str, Any]) -> Instance:
    """Directly at its own address where the ssh port is open there, else through the provider's proxy."""
    ports = item.get("ports") or {}
    direct = (ports.get("22/tcp") or [{}])[0].get("HostPort") if isinstance(ports, dict) else None
    if direct and item.get("public_ipaddr"):
        host, port = str(item["public_ipaddr"]).strip(), str(direct)
    else:
        host, port = str(item.get("ssh_host") or ""), str(item.get("ssh_port") or "")
    return Instance(
        id=int(item["id"]),
        label=str(item.get("label") or ""),
        status=str(item.get("actual_status") or "provisioning"),
        price_per_hour=float(item.get("dph_total") or 0.0),
        host=host or None,
        port=int(port) if port else None,
    )

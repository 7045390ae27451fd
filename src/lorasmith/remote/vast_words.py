"""Vast.ai's own words: conditions of a search, and offers and instances as its answers hold them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lorasmith.errors import UsageError
from lorasmith.remote.provider import Instance, Offer

_HOURS_PER_MONTH = 730.0
"""Vast.ai states the price of a disk per GB and month."""
_OPERATORS = {"=": "eq", "==": "eq", "!=": "neq", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}
_TERM = re.compile(r"""\s*([a-z_0-9]+)\s*(==|!=|>=|<=|=|>|<)\s*("[^"]*"|'[^']*'|\S+)""")


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


def offer_of(item: dict[str, Any], disk: float) -> Offer:
    """One of the offers of a search that asked for `disk` GB."""
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
        flops=number("total_flops") * 1e12,
    )


def instance_of(item: dict[str, Any]) -> Instance:
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

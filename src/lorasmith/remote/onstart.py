"""What a rented machine does as it starts: shell commands that bring the watchdog along, packed."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path

from lorasmith.remote import watchdog
from lorasmith.remote.caps import Caps
from lorasmith.remote.provider import Farewell, Offer

LIMIT = 4048
"""Characters that Vast.ai takes for `onstart`."""


def onstart(farewell: Farewell, caps: Caps, offer: Offer, folder: str = "~/.lorasmith") -> str:
    """Commands that start the watchdog, which knows the caps and prices, and how to destroy the machine."""
    source = Path(watchdog.__file__).read_bytes()
    packed = base64.b64encode(gzip.compress(source, 9, mtime=0)).decode()
    target = "/root/lorasmith-watchdog.py"
    limits = f"{caps.hours:.4f} {caps.grace:.0f} {caps.cost:.4f}"
    prices = f"{offer.price_per_hour:.6f} {offer.download_per_gb:.6f} {offer.upload_per_gb:.6f}"
    command = (
        "PATH=$PATH:/opt/conda/bin:/venv/main/bin; export PATH\n"
        f"echo {packed} | base64 -d | gzip -d > {target}\n"
        f"nohup python3 {target} {farewell.url} {farewell.key} {folder} {limits} {prices}"
        " > /root/lorasmith-watchdog.log 2>&1 &\n"
    )
    if len(command) > LIMIT:
        raise AssertionError(f"the watchdog is too long to be sent: {len(command)} characters")
    return command

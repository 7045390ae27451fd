"""The scoring benchmark starts on a processor with one float32 route as on one with two."""

from __future__ import annotations

import runpy
from argparse import Namespace
from pathlib import Path

import pytest

from lorasmith.models import device
from lorasmith.models.device import Probe
from tests.tiny import save_base

BENCH = Path(__file__).parents[2] / "benches" / "scoring.py"


@pytest.mark.parametrize("onednn_error", [3e-3, 4e-7], ids=["one route", "two routes"])
def test_the_rate_of_products_is_taken_on_the_routes_there_are(
    onednn_error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "probe", lambda: Probe(1.0, 0.5, 4e-7, onednn_error))
    base = save_base(tmp_path / "base")
    found = runpy.run_path(str(BENCH))["gemm_rate"](Namespace(model=base), [[list(range(3, 13)), 4]])
    assert found["rate"] > 0
    assert found["useful"] > 0

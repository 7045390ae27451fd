"""The route of the arithmetic is chosen by measurement and never stays switched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasmith.errors import UsageError
from lorasmith.models import device
from lorasmith.models.device import (
    Probe,
    choose_route,
    float32_routes,
    prefers_onednn,
    probe,
    resolve_device,
    use_route,
)

CPU = torch.device("cpu")


def test_the_switches_are_put_back_after_an_error_too() -> None:
    before = (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    with pytest.raises(ZeroDivisionError), use_route(choose_route("mkl", CPU)):
        assert torch.is_inference_mode_enabled()
        raise ZeroDivisionError
    after = (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    assert after == before
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("seconds", "error", "wanted"),
    [
        (0.5, 1.0e-6, True),  # twice as fast at a float32 error
        (0.9, 4.0e-7, True),  # a tenth: what some AMD processors gain
        (0.97, 4.0e-7, False),  # nearly a tie
        (0.1, 3.0e-3, False),  # a matrix unit that really computes in bfloat16
    ],
)
def test_onednn_must_be_clearly_faster_and_accurate(seconds: float, error: float, wanted: bool) -> None:
    measured = Probe(mkl_seconds=1.0, onednn_seconds=seconds, mkl_error=4e-7, onednn_error=error)
    assert prefers_onednn(measured) is wanted


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_the_chosen_route_is_float32_accurate() -> None:
    route = choose_route("auto", CPU)
    error = probe().onednn_error if route.name == "onednn" else probe().mkl_error
    assert error < 4e-6  # float32 over a sum of 768 products; bfloat16 has 3e-3


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_matrix_unit_is_not_taken_for_float32_even_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "probe", lambda: Probe(1.0, 0.1, 4e-7, 3e-3))
    with pytest.raises(UsageError, match="computes in bfloat16"):
        choose_route("onednn", CPU)
    assert choose_route("auto", CPU).name == "mkl"


def test_the_first_decision_of_a_machine_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path))
    answers = [Probe(1.0, 0.5, 4e-7, 1e-6), Probe(1.0, 0.9, 4e-7, 1e-6)]
    monkeypatch.setattr(device, "measure", lambda: answers.pop(0))
    try:
        probe.cache_clear()
        first = probe()
        probe.cache_clear()  # as in another process
        assert probe() == first
        [file] = tmp_path.iterdir()
        file.write_text("damaged")
        probe.cache_clear()
        assert probe() != first
    finally:
        probe.cache_clear()


def test_unknown_names_and_missing_devices_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="float8"):
        choose_route("float8", CPU)
    with pytest.raises(UsageError, match="oneDNN"):
        choose_route("onednn", torch.device("cuda"))
    with pytest.raises(UsageError, match="toaster"):
        resolve_device("toaster")
    with pytest.raises(UsageError, match="cuda:99"):
        resolve_device("cuda:99")
    assert resolve_device("cpu") == CPU


def test_a_processor_held_to_other_instructions_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without its matrix unit a processor has a second float32 route, which must not be believed of it later.
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    with_unit, without = Probe(1.0, 0.1, 4e-7, 3e-3), Probe(1.0, 0.5, 4e-7, 1e-6)
    answers = [with_unit, without]
    monkeypatch.setattr(device, "measure", lambda: answers.pop(0))
    try:
        probe.cache_clear()
        assert probe() == with_unit
        probe.cache_clear()  # as in another process
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
        assert probe() == without
        probe.cache_clear()
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
        assert probe() == with_unit
    finally:
        probe.cache_clear()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_a_route_in_bfloat16_is_no_float32_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "probe", lambda: Probe(1.0, 0.1, 4e-7, 3e-3))
    assert [route.name for route in float32_routes(CPU)] == ["mkl"]
    monkeypatch.setattr(device, "probe", lambda: Probe(1.0, 0.1, 4e-7, 1e-6))
    assert [route.name for route in float32_routes(CPU)] == ["mkl", "onednn"]
    assert [route.name for route in float32_routes(torch.device("cuda"))] == ["mkl"]


SHAPES = """
import os, sys, torch
from lorasmith.models.device import _ROUTES, use_route
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
torch.set_num_threads(1)
weight = torch.randn(64, 64)
with use_route(_ROUTES[sys.argv[1]]):
    for rows in range(1, 2600):
        torch.nn.functional.linear(torch.ones(rows, 64), weight)
        if rows == 1700:
            before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
@pytest.mark.parametrize("route", ["mkl", "onednn"])
def test_memory_does_not_grow_with_the_shapes_of_products(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # oneDNN makes a kernel for each shape, and every pack of rows has another.
    for name in device._KERNELS:
        monkeypatch.delenv(name, raising=False)
    # Without a matrix unit oneDNN's route is the float32 one on every processor; with one it is never taken.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    command = [sys.executable, "-c", SHAPES, route]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # Twice as many kernels, which torch and oneDNN would keep by themselves, still grow here: by 100 MB.
    assert int(run.stdout) < 30e6


@pytest.mark.parametrize("first", ["mkl", "onednn", "bfloat16"])
def test_few_kernels_are_kept_whichever_route_comes_first(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both limits are read once in a process, and products in bfloat16 make kernels of oneDNN as well.
    monkeypatch.setattr(os, "environ", {})
    with use_route(device._ROUTES[first]):
        assert os.environ == device._KERNELS
    with monkeypatch.context() as chosen:
        chosen.setattr(os, "environ", dict.fromkeys(device._KERNELS, "64"))
        with use_route(device._ROUTES[first]):
            assert set(os.environ.values()) == {"64"}  # a person's own choice stands

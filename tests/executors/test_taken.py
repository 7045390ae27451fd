"""What a stage took on a cluster: processor time, memory and energy of its workers, wherever they run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lorasmith.executors.base import WorkSpec
from lorasmith.executors.ray import Cluster
from lorasmith.machine import meter
from lorasmith.machine.meter import Packages, this_machine
from lorasmith.runs.stages import measure
from tests.executors.squares import Squares, add_joule, give_counters, open_squares

ray = pytest.importorskip("ray")

CHUNKS = [(number,) for number in range(12)]


def work(executor: Cluster, *, kill: bool = False, **settings: Any) -> None:
    spec = WorkSpec(open_squares, settings)
    for _ in executor.map_chunks(CHUNKS, Squares(**settings), None, spec):
        if kill and executor._pool:
            kill = False
            ray.kill(executor._pool._workers[0])


def test_processor_time_and_memory_of_the_workers_are_the_stages(cluster: Any) -> None:
    alone = measure("x", lambda: None)
    assert alone.worker_peak_rss_bytes is None
    with Cluster(threads=1) as executor:
        taken = measure("x", lambda: work(executor, burns=0.1, ballast=300_000_000))
        assert taken.cpu_seconds >= 12 * 0.1
        assert taken.worker_peak_rss_bytes is not None and taken.worker_peak_rss_bytes > 300_000_000
        assert taken.peak_rss_bytes is not None and taken.peak_rss_bytes < 3_000_000_000
        # Workers stay within a block: what they took for one stage is not counted for the next.
        later = measure("x", lambda: work(executor, ballast=1))
    assert later.worker_peak_rss_bytes is not None and later.worker_peak_rss_bytes < 300_000_000
    assert later.cpu_seconds < 12 * 0.1


def test_energy_of_every_node_is_counted_once(cluster: Any, tmp_path: Path) -> None:
    """A joule for each chunk, on two nodes; what is spent between two stages is neither's."""
    power = tmp_path / "power"
    with Cluster(threads=1) as executor:
        for stage in ("one", "two"):
            marks = tmp_path / stage  # no node can do all of it before the other one has come
            marks.mkdir()
            taken = measure("x", partial(work, executor, power=str(power), marks=str(marks), nodes=2))
            assert taken.cpu_joules == 12.0
            assert len(list(power.iterdir())) == len(list(marks.iterdir())) == 2
            for counter in power.glob("*/*/energy_uj"):
                counter.write_text("500000000")


def test_energy_is_not_measured_where_a_worker_took_its_count_along(cluster: Any, tmp_path: Path) -> None:
    executor = Cluster(threads=1, workers=1)
    taken = measure("x", lambda: work(executor, power=str(tmp_path), kill=True))
    assert executor.losses == 1
    assert taken.cpu_joules is None


def test_this_machines_own_devices_are_not_counted_again(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command runs on a node of the cluster, and sees the same package as the workers there."""
    for name in ("POWERCAP", "machine_name"):  # to be put back
        monkeypatch.setattr(meter, name, getattr(meter, name))
    give_counters(tmp_path)
    this_machine.cache_clear()
    try:
        assert this_machine().devices == frozenset(Packages().names) != frozenset()

        def both() -> None:
            add_joule(tmp_path)
            work(Cluster(threads=1), power=str(tmp_path))

        assert measure("x", both).cpu_joules == 13.0
    finally:
        monkeypatch.undo()
        this_machine.cache_clear()

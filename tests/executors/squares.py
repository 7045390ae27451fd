"""Work without a model, and so without torch: workers that do it start quickly."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasmith.errors import CheckpointError
from lorasmith.executors.base import Executor, WorkSpec
from lorasmith.files.journal import Journal
from lorasmith.records.scoring import Conditions


class Squares:
    """Work without a model: the squares of row numbers, with trouble on demand."""

    def __init__(
        self,
        pause: float = 0.0,
        largest: int = 99,
        kill_on: int = -1,
        fail_on: int = -1,
        marks: str = "",
        awaited: str = "",
        burns: float = 0.0,
        ballast: int = 0,
        power: str = "",
        nodes: int = 0,
    ) -> None:
        self.pause, self.largest, self.kill_on, self.fail_on = pause, largest, kill_on, fail_on
        self.marks, self.awaited = marks, awaited
        self.burns, self.ballast, self.power, self.nodes = burns, ballast, power, nodes
        self.bonus = 0

    def run(self, rows: tuple[int, ...]) -> list[int]:
        if self.nodes:
            self.gather(Path(self.marks), first=0 in rows)
        elif self.marks:
            self.meet(Path(self.marks))
        time.sleep(self.pause)
        held = bytearray(self.ballast)
        until = time.process_time() + self.burns
        while time.process_time() < until:
            pass
        if self.power:
            add_joule(Path(self.power))
        del held
        if self.kill_on in rows:
            os._exit(1)
        if self.fail_on in rows:
            raise CheckpointError("a bad row", where=f"row {self.fail_on}", remedy="mend it")
        if len(rows) > self.largest:
            raise MemoryError("too much")
        return [row * row + self.bonus for row in rows]

    def meet(self, folder: Path) -> None:
        """The awaited node notes that it works and waits until it is killed; the others wait for the note."""
        import ray

        until = time.monotonic() + 120
        mark = folder / self.awaited
        if ray.get_runtime_context().get_node_id() == self.awaited:
            mark.touch()
            mark = folder / "never"
        while not mark.exists() and time.monotonic() < until:
            time.sleep(0.02)

    def gather(self, folder: Path, *, first: bool) -> None:
        """Note this node, and wait until so many have come: only the first chunk ends before that."""
        (folder / node()).touch()
        until = time.monotonic() + 120
        while not first and len(list(folder.iterdir())) < self.nodes and time.monotonic() < until:
            time.sleep(0.02)

    def split(self, rows: tuple[int, ...]) -> list[tuple[int, ...]]:
        half = len(rows) // 2
        return [rows[:half], rows[half:]] if half else []

    def size(self, rows: tuple[int, ...]) -> int:
        return len(rows)

    def out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def release(self) -> None:
        """Nothing is held."""

    def conditions(self) -> Conditions:
        return Conditions(device="cpu", processor=os.environ.get("TEST_PROCESSOR", "usual"), threads=1)

    def take(self, parcel: dict[str, int]) -> None:
        """What comes with a chunk."""
        self.bonus = parcel["bonus"]

    def pack(self, result: list[int]) -> bytes:
        return json.dumps(result).encode()

    def unpack(self, rows: tuple[int, ...], packed: bytes) -> list[int]:
        return list(json.loads(packed))


@contextmanager
def open_squares(**settings: Any) -> Iterator[Squares]:
    if settings.get("power"):
        give_counters(Path(settings["power"]))
    yield Squares(**settings)


CHUNKS = [(start, start + 1, start + 2) for start in range(0, 36, 3)]
WANTED = {row: row * row for row in range(36)}


def through(executor: Executor, journal: Journal | None = None, **settings: Any) -> dict[int, int]:
    """The squares of all rows, each computed once."""
    spec = WorkSpec(open_squares, settings)
    squares: dict[int, int] = {}
    for rows, values in executor.map_chunks(CHUNKS, Squares(**settings), journal, spec):
        assert not set(rows) & set(squares), "a row came twice"
        squares.update(zip(rows, values, strict=True))
    return squares


def node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def give_counters(folder: Path) -> None:
    """Let each node of the tests' cluster be a machine of its own, with a package that counts its energy."""
    from lorasmith.machine import meter

    zone = folder / node() / "intel-rapl:0"
    if not zone.exists():
        zone.mkdir(parents=True)
        for file, text in (("name", "package-0"), ("energy_uj", "0"), ("max_energy_range_uj", "999999999")):
            (zone / file).write_text(text)
    meter.POWERCAP, meter.machine_name = zone.parent, node


def add_joule(folder: Path) -> None:
    counter = folder / node() / "intel-rapl:0" / "energy_uj"
    more = counter.with_name("more")
    more.write_text(str(int(counter.read_text()) + 1_000_000))
    more.replace(counter)  # at no moment without a number, as in a kernel

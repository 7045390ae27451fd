"""What all tests share: no network, a cache of their own, and the real benchmark rows where there are any."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from tests.typed import Typed, type_here

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked child would wait for threads that it does not have


WAITING = ("tests/remote/", "tests/executors/", "tests/campaigns/", "tests/reporting/test_browser.py")
"""Modules that wait for ssh, a cluster, a browser or a process of their own more than they compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the modules that wait over the first part of all: while one waits, the others compute.

    They are given to the workers in this order (`--no-loadscope-reorder`); together at the end, as few tests
    a module put them, they left the processor idle for minutes.
    """
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    waiting = [name for name in modules if name.startswith(WAITING)]
    busy = [name for name in modules if not name.startswith(WAITING)]
    # Large ones first, so that none of them is left for the end.
    busy.sort(key=lambda name: len(modules[name]), reverse=True)
    step = max(1, (3 * len(busy) // 4) // max(1, len(waiting)))
    order = []
    for place, name in enumerate(busy):
        if place % step == 0 and waiting:
            order.append(waiting.pop(0))
        order.append(name)
    items[:] = [item for name in [*order, *waiting] for item in modules[name]]


def pytest_collection_finish() -> None:
    """Leave what torch and transformers brought along out of every later collection of garbage.

    Tests make many small models and collect after each; going through a million objects of libraries that
    stay took most of the time of the smallest tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Digests and the converted model of the tests stay out of the user's cache."""
    os.environ["LORASMITH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_rows() -> Path:
    """Real benchmark rows, kept outside the project; the test is skipped where they are absent."""
    named = os.environ.get("LORASMITH_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder of real benchmark rows at {folder} (LORASMITH_TEST_DATA names another)")
    return folder


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Typed:
    """A command line, typed without a process of its own."""
    return type_here(capfd)

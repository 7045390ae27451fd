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

"""Fixtures of the sandbox's tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.ways import WAYS, Way, usable


@pytest.fixture(scope="session", params=WAYS, ids=lambda way: f"{way.mode}-{way.user}")
def way(request: pytest.FixtureRequest) -> Way:
    return usable(request.param)


@pytest.fixture
def theirs(way: Way) -> Iterator[Path]:
    """A folder that belongs to who runs the sandbox and that every user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-victim-", dir="/tmp"))
    folder.chmod(0o755)
    if way.user != os.getuid():
        os.chown(folder, way.user, way.user)
    yield folder
    shutil.rmtree(folder)

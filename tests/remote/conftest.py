"""Another machine for the tests of this folder, and a place of their own for what is remembered here."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.remote.jobs import FAKE
from tests.remote.machines import Machine, machine


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("machine")) as found:
        yield found


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))


@pytest.fixture
def fake_lorasmith(other: Machine) -> str:
    """An interpreter on the other machine whose `-m lorasmith.cli.main` is the fake above."""
    code = other.home / "fake.py"
    code.write_text(FAKE)
    shim = other.home / "python-with-fake"
    shim.write_text(
        f'#!/bin/sh\nif [ "$2" = lorasmith.cli.main ]; then shift 2; exec {sys.executable} {code} "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    shim.chmod(0o755)
    return str(shim)


@pytest.fixture(autouse=True)
def _small_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sessions of this process send as lorasmith: small, and the same whoever edits the source."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo("lorasmith/__init__.py"), "")
    wheel = ("lorasmith-0-py3-none-any.whl", packed.getvalue())
    monkeypatch.setattr("lorasmith.remote.job.build_wheel", lambda: wheel)

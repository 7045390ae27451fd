"""A base of several shards and an adapter for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import save_adapter, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model", max_shard_size="30KB")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)

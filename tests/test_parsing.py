"""Documents that somebody else wrote: whatever they hold, their readers give one message and no traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.benchmarks.discover import read_table
from lorasmith.checkpoint.header import read_header, read_object
from lorasmith.data.rows import read_examples
from lorasmith.errors import CheckpointError, LorasmithError
from lorasmith.files.atomic import read_record
from lorasmith.hub.models import base_of, local_model
from lorasmith.packaging.card import base_name
from lorasmith.parsing import MAX_DEPTH, parse_json, parse_toml
from lorasmith.proving.weights.model_folder import read_json
from lorasmith.records.merging import MergeRecord
from lorasmith.runs.config import load_config, load_gates


def test_as_deep_as_allowed_is_read_and_one_level_more_is_not() -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        depth = MAX_DEPTH
        assert parse_json(opening * depth + b"1" + closing * depth)
        with pytest.raises(ValueError, match="nested"):
            parse_json(opening * (depth + 1) + b"1" + closing * (depth + 1))
    assert parse_json('"' + "[" * 10_000 + '"') == "[" * 10_000
    assert len(parse_json(b"[" + b",".join([b"{}"] * 1000) + b"]")) == 1000
    assert parse_toml(b"a = " + b"[" * 99 + b"]" * 99)
    with pytest.raises(ValueError, match="nested"):
        parse_toml(b"a = " + b"[" * 100 + b"]" * 100)
    with pytest.raises(ValueError, match="nested"):
        parse_toml(b"a." * 200 + b"a = 1")


@given(st.binary() | st.text(alphabet='[]{}",:\\u0123456789dDeE-+ntfNaI ').map(str.encode))
def test_nothing_but_a_value_error_comes_of_any_bytes(content: bytes) -> None:
    for parse in (parse_json, parse_toml, lambda text: parse_json(text, finite=True)):
        with contextlib.suppress(ValueError):
            parse(content)


def _safetensors(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


READERS: dict[str, Callable[[Path], Any]] = {
    "record": lambda path: read_record(path, MergeRecord),
    "config of a model": lambda path: read_object(path, CheckpointError),
    "config of a proved model": read_json,
    "test set": read_examples,
    "benchmark": lambda path: list(read_table(path, "t.json", lambda document: [document])),
    "run's config": lambda path: load_config(path, {}),
    "gates": load_gates,
    "safetensors header": lambda path: read_header(_behind_a_length(path)),
}


def _behind_a_length(path: Path) -> Path:
    other = path.with_suffix(".safetensors")
    other.write_bytes(_safetensors(path.read_bytes()))
    return other


DEEP = {
    "lists": b'{"a": ' + b"[" * 100_000,
    "whole lists": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}",
    "objects": b'{"a": ' * 100_000,
    "TOML lists": b"a = " + b"[" * 100_000,
    "TOML tables": b"a = " + b"{a=" * 50_000,
    "long number": b'{"a": ' + b"1" * 100_000 + b"}",
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "NULs": bytes(100),
    "half a character": b'{"a": "\\ud800", "base": "\\ud800"}',
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", DEEP)
def test_every_reader_gives_one_message(tmp_path: Path, reader: str, content: str) -> None:
    path = tmp_path / ("x.toml" if reader in ("run's config", "gates") else "x.json")
    path.write_bytes(DEEP[content])
    if content == "half a character" and reader.startswith("config of a"):
        READERS[reader](path)  # what such a text stands for is judged where it is used
        return
    with pytest.raises(LorasmithError):
        READERS[reader](path)


@pytest.mark.parametrize("content", DEEP)
def test_what_an_adapter_says_of_its_base_is_only_a_hint(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(DEEP[content])
    assert base_name(tmp_path / "base", tmp_path) is None
    assert local_model(tmp_path / "base", [tmp_path]) == tmp_path / "base"
    with pytest.raises(LorasmithError, match="base model that the adapter names"):
        base_of(tmp_path)

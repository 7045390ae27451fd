"""The safetensors header: what the format allows is read, what it forbids is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from lorasmith.checkpoint.header import ITEM_BITS, build_header, nbytes_of, read_header
from lorasmith.errors import CheckpointError, LorasmithError


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.int64).view(2, 3),
        "b.weight": torch.randn(4, 5).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 7),
        "ünïcode": torch.ones(3, dtype=torch.bool),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert set(found.tensors) == set(tensors)
    raw = path.read_bytes()
    for name, tensor in tensors.items():
        info = found.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert raw[info.start : info.stop] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_what_is_built_is_read_by_safetensors(tmp_path: Path) -> None:
    header, infos = build_header(
        [("x", "BF16", (3, 2)), ("y", "F32", (5,)), ("z", "I64", ())], {"format": "pt"}
    )
    assert len(header) % 8 == 0
    path = tmp_path / "built.safetensors"
    path.write_bytes(header + bytes(infos[-1].stop - len(header)))
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["x", "y", "z"]
        assert file.get_tensor("x").shape == (3, 2)
        assert file.metadata() == {"format": "pt"}
    assert [info.name for info in read_header(path).tensors.values()] == ["x", "y", "z"]


def test_the_sizes_of_types() -> None:
    assert nbytes_of("BF16", (3, 5)) == 30
    assert nbytes_of("F4", (3,)) == 2
    assert set(ITEM_BITS.values()) <= {4, 6, 8, 16, 32, 64}


def pack(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **extra: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **extra}


LEGAL = st.builds(
    entry,
    dtype=st.sampled_from(["F32", "BF16", "I8", "F64", "F4", "XX"]),
    shape=st.lists(st.integers(-1, 4), max_size=3),
    offsets=st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=4), LEGAL, max_size=3), st.integers(0, 40))
def test_what_is_accepted_is_what_safetensors_accepts(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    """Structured noise: nothing that the format's own library refuses gets through."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    content = pack(header, bytes(size))
    path.write_bytes(content)
    try:
        found = read_header(path)
    except LorasmithError:
        return
    try:
        reference = load(content)
    except SafetensorError as error:
        raise AssertionError(f"accepted {header}, which safetensors refuses: {error}") from error
    except KeyError:
        return  # a type that torch does not have
    assert {name: tuple(tensor.shape) for name, tensor in reference.items()} == {
        name: info.shape for name, info in found.tensors.items()
    }


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_an_error_and_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("noise") / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_header_is_an_error_or_another_header(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One byte of a good file's header changed: refused, or accepted by safetensors as well."""
    content = bytearray(pack({"a": entry(), "b": entry("BF16", (1, 4), (8, 16))}, bytes(16)))
    header = int.from_bytes(content[:8], "little") + 8
    content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except LorasmithError:
        return
    load(bytes(content))

"""Damage to a merged folder: flipped bits, missing shards, lying indexes. Always found, no traceback."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.errors import LorasmithError
from lorasmith.proving.weights.prove import prove
from tests.proving.small import (
    adapter_tensors,
    base_tensors,
    right_merge,
    write_adapter,
    write_model,
)

FLIPS = 200


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, adapter, and a right merge of them in three shards."""
    place = tmp_path_factory.mktemp("damage")
    base, adapter = base_tensors(), adapter_tensors()
    merged = right_merge(base, [(adapter, 2.0)])
    return (
        write_model(place / "base", base),
        write_adapter(place / "adapter", adapter),
        write_model(place / "merged", merged, shards=3),
    )


def _verdict(parts: tuple[Path, Path, Path]) -> str:
    try:
        return prove(*parts).grade
    except LorasmithError as error:
        return f"error: {error.found}"


def test_undamaged_is_exact(parts: tuple[Path, Path, Path]) -> None:
    assert _verdict(parts) == "exact"


@pytest.mark.parametrize("where", ["header", "data"])
def test_every_flipped_bit_is_found(parts: tuple[Path, Path, Path], where: str) -> None:
    generator = random.Random(7)
    shards = sorted(parts[2].glob("*.safetensors"))
    for _ in range(FLIPS // 2):
        shard = generator.choice(shards)
        intact = shard.read_bytes()
        start = 8 + int.from_bytes(intact[:8], "little")
        low, high = (0, start) if where == "header" else (start, len(intact))
        position, bit = generator.randrange(low, high), generator.randrange(8)
        damaged = bytearray(intact)
        damaged[position] ^= 1 << bit
        shard.write_bytes(damaged)
        try:
            assert _verdict(parts) != "exact", (shard.name, position, bit)
        finally:
            shard.write_bytes(intact)
    assert _verdict(parts) == "exact"


def _index(merged: Path) -> tuple[Path, dict]:
    path = merged / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def _missing_shard(merged: Path) -> None:
    next(merged.glob("model-00002*")).unlink()


def _truncated_shard(merged: Path) -> None:
    shard = next(merged.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])


def _longer_shard(merged: Path) -> None:
    shard = next(merged.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes() + b"\0")


def _empty_shard(merged: Path) -> None:
    next(merged.glob("model-00003*")).write_bytes(b"")


def _swapped_shards(merged: Path) -> None:
    one, two = next(merged.glob("model-00001*")), next(merged.glob("model-00002*"))
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def _index_names_another_shard(merged: Path) -> None:
    path, body = _index(merged)
    name = sorted(body["weight_map"])[0]
    others = sorted(set(body["weight_map"].values()) - {body["weight_map"][name]})
    body["weight_map"][name] = others[0]
    path.write_text(json.dumps(body))


def _index_forgets_a_tensor(merged: Path) -> None:
    path, body = _index(merged)
    del body["weight_map"][sorted(body["weight_map"])[0]]
    path.write_text(json.dumps(body))


def _index_invents_a_tensor(merged: Path) -> None:
    path, body = _index(merged)
    body["weight_map"]["model.extra.weight"] = sorted(body["weight_map"].values())[0]
    path.write_text(json.dumps(body))


def _index_has_a_wrong_total(merged: Path) -> None:
    path, body = _index(merged)
    body["metadata"]["total_size"] += 2
    path.write_text(json.dumps(body))


def _index_escapes(merged: Path) -> None:
    path, body = _index(merged)
    name = sorted(body["weight_map"])[0]
    body["weight_map"][name] = "../base/model.safetensors"
    path.write_text(json.dumps(body))


def _index_is_no_json(merged: Path) -> None:
    _index(merged)[0].write_text('{"weight_map": {')


def _index_is_a_list(merged: Path) -> None:
    _index(merged)[0].write_text("[]")


def _index_maps_to_numbers(merged: Path) -> None:
    _index(merged)[0].write_text('{"weight_map": {"a": 1}}')


def _no_checkpoint(merged: Path) -> None:
    for file in merged.glob("model*"):
        file.unlink()


def _second_checkpoint(merged: Path) -> None:
    shard = next(merged.glob("model-00001*"))
    (merged / "model.safetensors").write_bytes(shard.read_bytes())


def _no_config(merged: Path) -> None:
    (merged / "config.json").unlink()


def _broken_config(merged: Path) -> None:
    (merged / "config.json").write_text("{")


def _other_config(merged: Path) -> None:
    body = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**body, "hidden_size": 13}))


def _quantized_config(merged: Path) -> None:
    body = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**body, "quantization_config": {"bits": 4}}))


def _no_pt_format(merged: Path) -> None:
    shard = next(merged.glob("model-00001*"))
    shard.write_bytes(shard.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))


DAMAGES = [
    _missing_shard,
    _truncated_shard,
    _longer_shard,
    _empty_shard,
    _swapped_shards,
    _index_names_another_shard,
    _index_forgets_a_tensor,
    _index_invents_a_tensor,
    _index_has_a_wrong_total,
    _index_escapes,
    _index_is_no_json,
    _index_is_a_list,
    _index_maps_to_numbers,
    _no_checkpoint,
    _second_checkpoint,
    _no_config,
    _broken_config,
    _other_config,
    _quantized_config,
    _no_pt_format,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__.strip("_"))
def test_damaged_folders_are_found(
    damage: Callable[[Path], None], parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    for file in parts[2].iterdir():
        (merged / file.name).write_bytes(file.read_bytes())
    assert _verdict((parts[0], parts[1], merged)) == "exact"
    damage(merged)
    verdict = _verdict((parts[0], parts[1], merged))
    assert verdict == "different" or verdict.startswith("error: the folder holds no safetensors")

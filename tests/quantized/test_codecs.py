"""One contract over every format: decode as its library, encode back, hold the grid, agree with the proof."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorasmith.proving.weights.model_folder import open_model
from lorasmith.proving.weights.quantized.decode import find_weights, put_in_place
from lorasmith.proving.weights.quantized.gguf import gguf_in, open_gguf
from lorasmith.quantized.grid import dithered, exact_places, nearest
from lorasmith.quantized.open import open_base
from lorasmith.quantized.weight import QuantizedWeight
from tests.quantized.cases import CASES, SHAPES, Made, random_weight
from tests.quantized.real import real_weight


def write(folder: Path, made: Made) -> Path:
    folder.mkdir()
    if made.file is not None:
        made.file(folder)
    else:
        save_file(
            {name: part.contiguous() for name, part in made.tensors.items()}, folder / "model.safetensors"
        )
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": made.config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder: Path, made: Made) -> QuantizedWeight:
    checkpoint = open_base(folder)
    assert list(checkpoint.tensors) == [made.name]
    return checkpoint.decoded[made.name].weight  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(
    scope="module", params=[f"{source} {name}" for name in CASES for source in ("random", "real")]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    source, _, name = request.param.partition(" ")
    shape = SHAPES.get(name, (24, 128))
    # Super-blocks of 256 take two of the three that the real matrix is wide.
    weight = (
        random_weight(*shape) if source == "random" else real_weight()[:, : 512 if shape[1] == 512 else None]
    )
    made = CASES[name](weight)
    return write(tmp_path_factory.mktemp("case") / "model", made), made


def test_it_decodes_as_its_library_bit_for_bit(case: tuple[Path, Made]) -> None:
    weight, reference = opened(*case), case[1].reference
    assert weight.shape == tuple(reference.shape)
    ours = weight.library(0, reference.reshape(-1, reference.shape[-1]).shape[0])
    assert ours.dtype == reference.dtype
    integer = {2: torch.int16, 4: torch.int32}[reference.dtype.itemsize]
    assert torch.equal(ours.reshape(reference.shape).view(integer), reference.contiguous().view(integer))


def test_its_exact_values_are_the_librarys_before_rounding(case: tuple[Path, Made]) -> None:
    weight, reference = opened(*case), case[1].reference.double()
    rows = reference.reshape(-1, reference.shape[-1])
    values = weight.block(0, len(rows)).values
    # A library rounds two or three times in its own type.
    off = np.abs(values - rows.numpy())
    allowed = 2 * torch.finfo(case[1].reference.dtype).eps * np.abs(values).max(axis=1, keepdims=True)
    assert (off <= allowed).all()


def test_the_proof_reads_the_same_numbers_by_itself(case: tuple[Path, Made]) -> None:
    folder, made = case
    file = gguf_in(folder)
    if file is not None:
        proven, found = open_gguf(file).folder, open_gguf(file).found
    else:
        proven = open_model(folder)
        found = find_weights(proven.tensors, json.loads((folder / "config.json").read_text()))
    put_in_place(proven, found, {})
    assert list(proven.tensors) == [made.name]
    theirs = proven.tensors[made.name]
    assert theirs.shape == tuple(made.reference.shape)
    rows = theirs.elements // theirs.columns
    values = opened(folder, made).block(0, rows).values
    assert np.array_equal(theirs.rows().numpy(), values)
    assert np.array_equal(
        theirs.flat(5, theirs.columns + 3).numpy(), values.reshape(-1)[5:][: theirs.columns + 3]
    )


def test_any_rows_are_those_of_the_whole(case: tuple[Path, Made]) -> None:
    weight = opened(*case)
    rows = int(np.prod(weight.shape[:-1]))
    whole = weight.block(0, rows)
    for start, stop in ((0, 1), (1, 4), (3, rows), (rows - 1, rows)):
        part = weight.block(start, stop)
        assert np.array_equal(part.values, whole.values[start:stop])
        assert np.array_equal(part.codes, whole.codes[start:stop])


def test_codes_go_back_to_the_same_bytes_and_changed_ones_decode_to_what_they_mean(
    case: tuple[Path, Made], tmp_path: Path
) -> None:
    folder, made = case
    weight = opened(folder, made)
    rows = int(np.prod(weight.shape[:-1]))
    stored = weight.parts["codes"]
    assert b"".join(_encoded(weight, None)) == _bytes(stored.path, stored.info.start, stored.info.stop)
    # Every element one place further, down at the end of the grid.
    places = weight.block(0, rows).places
    last = len(weight.block(0, 1).levels.points) - 1
    moved = np.where(places < last, places + 1, places - 1)
    content = bytearray(stored.path.read_bytes())
    content[stored.info.start : stored.info.stop] = b"".join(_encoded(weight, moved))
    again = tmp_path / "model"
    again.mkdir()
    (again / "config.json").write_bytes((folder / "config.json").read_bytes())
    (again / stored.path.name).write_bytes(content)
    found = opened(again, made).block(0, rows)
    assert np.array_equal(found.values, weight.block(0, rows).at_places(moved))


def _encoded(weight: QuantizedWeight, places: np.ndarray | None) -> list[bytes]:
    rows = int(np.prod(weight.shape[:-1]))
    parts = []
    for start in range(0, rows, weight.unit):
        block = weight.block(start, start + weight.unit)
        codes = block.codes if places is None else block.codes_at(places[start : start + weight.unit])
        parts.append(weight.encode(start, codes))
    return parts


def _bytes(path: Path, start: int, stop: int) -> bytes:
    return path.read_bytes()[start:stop]


def test_the_nearest_point_is_that_of_a_search_in_rational_numbers(case: tuple[Path, Made]) -> None:
    block = opened(*case).block(0, 4)
    generator = np.random.default_rng(0)
    span = np.abs(block.values).max() or 1.0
    x = block.values + generator.normal(0, 0.2, block.codes.shape) * span
    x[0] = block.values[0]
    places, open_ = nearest(block, x, np.zeros_like(x))
    points = np.stack([block.at_levels(np.full(block.codes.shape, p)) for p in block.levels.points])
    for row, column in [(r, c) for r in range(4) for c in range(0, x.shape[1], 7)]:
        distances = [
            abs(Fraction(float(p)) - Fraction(float(x[row, column]))) for p in points[:, row, column]
        ]
        if open_[row, column]:
            guess = np.array([places[row, column]])
            one = block.cut(np.array([row]), np.array([column]))
            found = exact_places(one, [Fraction(float(x[row, column]))], guess)[0][0]
        else:
            found = places[row, column]
        assert distances[found] == min(distances)
    assert np.array_equal(
        block.codes_at(np.where(x == block.values, block.places, places))[0], block.codes[0]
    )


def test_a_dithered_number_is_one_of_its_two_neighbours_and_right_in_the_mean(
    case: tuple[Path, Made],
) -> None:
    block = opened(*case).block(0, 4)
    last = len(block.levels.points) - 1
    up = block.at_places(np.minimum(block.places + 1, last))
    x = block.values + 0.25 * (up - block.values)
    drawn = []
    for n in range(64):
        thresholds = np.full(x.shape, (2 * (n << 18) + (1 << 18)) | 1, dtype=np.int64)
        places, open_ = dithered(block, x, np.zeros_like(x), thresholds)
        assert not (open_ & (up != block.values)).any()
        drawn.append(block.at_places(places))
    values = np.stack(drawn)
    assert ((values == block.values) | (values == up)).all()
    assert np.allclose(values.mean(axis=0), x, rtol=0, atol=np.abs(up - block.values).max() / 64)

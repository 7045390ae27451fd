"""A calibrated merge onto a quantized grid keeps what nearest loses, is proved, and goes on after a kill."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lorasmith
from lorasmith.errors import UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.files.jsonl import write_rows
from lorasmith.merging.calibrated import onto_grid
from lorasmith.quantized.open import open_base
from tests.quantized.bases import BITSANDBYTES, save_bitsandbytes, save_case, save_plain
from tests.tiny import load_model, save_adapter, tiny_tokenizer

WORDS = list("abcdefghijklmnopqrstuvw")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    plain = save_plain(folder / "plain")
    save_adapter(folder / "adapter", plain, std=0.02)
    save_bitsandbytes(folder / "nf4", plain, **BITSANDBYTES["nf4"])
    for case in ("fp8 block", "int4 groups"):
        save_case(folder / case, plain, case)
        tiny_tokenizer().save_pretrained(folder / case)
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    rows = [{"prompt": text(12), "response": text(12)} for _ in range(16)]
    write_rows(folder / "train.jsonl", rows)
    return folder


def weights(base: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_base(base)
    decoded = {
        name: one.read(0, one.info.elements).reshape(one.info.shape)
        for name, one in checkpoint.decoded.items()
    }
    stored = load_file(base / "model.safetensors")
    return {
        name: decoded.get(name, stored.get(name, torch.empty(0)).double())
        for shard in checkpoint.shards
        for name in shard.tensors
    }


def logits(plain: Path, base: Path, adapter: Path | None) -> torch.Tensor:
    """What the model computes, decoded into float64, on text that was not calibrated on."""
    model = load_model(plain, torch.float64)
    model.load_state_dict(weights(base))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).double()
    draw = random.Random(9)
    ids = tiny_tokenizer()([" ".join(draw.choices(WORDS, k=40))], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made: torch.Tensor = model(ids).logits.log_softmax(-1)
    return made


def kept(meant: torch.Tensor, made: torch.Tensor, base: torch.Tensor) -> float:
    """How much of what the adapter changes is there: the share of its change that lies in the merge's."""
    change = meant - base
    return float(((made - base) * change).sum() / change.square().sum())


@pytest.mark.parametrize("base", ["nf4", "fp8 block", "int4 groups"])
def test_it_is_nearer_to_the_adapter_than_nearest_and_proved_within_its_limit(
    place: Path, base: str, tmp_path: Path
) -> None:
    given = (place / base, place / "adapter")
    lorasmith.merge(*given, tmp_path / "nearest", into="base", rounding="nearest")
    record = lorasmith.merge(
        *given, tmp_path / "fitted", into="base", rounding="calibrated", calibration=place / "train.jsonl"
    )
    assert record.rounding == "calibrated"
    assert {one.rounding for one in record.tensors} == {"calibrated"}
    proof = lorasmith.prove(*given, tmp_path / "fitted")
    assert proof.grade == "bounded" and 0 < max(one.max_ulps for one in proof.tensors) <= 16
    meant, before = (logits(place / "plain", place / base, one) for one in (place / "adapter", None))
    of_nearest, of_fitted = (
        kept(meant, logits(place / "plain", tmp_path / name, None), before) for name in ("nearest", "fitted")
    )
    # All of it is 1. Random weights and a few hundred letters leave the fit less to use than a trained model.
    assert abs(1 - of_fitted) < 0.4 * abs(1 - of_nearest), (of_fitted, of_nearest)
    assert (tmp_path / "fitted" / "config.json").read_bytes() == (place / base / "config.json").read_bytes()
    stored, after = (
        load_file(folder / "model.safetensors") for folder in (place / base, tmp_path / "fitted")
    )
    changed = {
        name
        for name in stored
        if not torch.equal(stored[name].view(torch.uint8), after[name].view(torch.uint8))
    }
    codes = {one.weight.parts["codes"].info.name for one in open_base(place / base).decoded.values()}
    assert changed and changed <= codes


def test_a_code_that_is_too_far_away_is_found(place: Path, tmp_path: Path) -> None:
    given = (place / "nf4", place / "adapter")
    lorasmith.merge(
        *given, tmp_path / "m", into="base", rounding="calibrated", calibration=place / "train.jsonl"
    )
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name][0, 0] = (int(tensors[name][0, 0]) + 0x50) % 256  # five levels further in the high half
    save_file(tensors, file, metadata={"format": "pt"})
    assert lorasmith.prove(*given, tmp_path / "m").grade == "different"


def test_a_merge_that_is_broken_off_goes_on_and_ends_with_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"into": "base", "rounding": "calibrated", "calibration": place / "train.jsonl"}
    given = (place / "nf4", place / "adapter")
    lorasmith.merge(*given, tmp_path / "whole", **how)
    fit = onto_grid._one_layer

    def breaks(model: object, number: int, *rest: object) -> object:
        if number == 1:
            raise KeyboardInterrupt
        return fit(model, number, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(onto_grid, "_one_layer", breaks)
        lorasmith.merge(*given, tmp_path / "again", **how)
    begun: list[int] = []

    def counts(model: object, number: int, *rest: object) -> object:
        begun.append(number)
        return fit(model, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(onto_grid, "_one_layer", counts)
    lorasmith.merge(*given, tmp_path / "again", **how)
    assert begun == [1]
    assert digest_folder(tmp_path / "whole") == digest_folder(tmp_path / "again")


def test_without_rows_it_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs rows"):
        lorasmith.merge(place / "nf4", place / "adapter", tmp_path / "m", into="base", rounding="calibrated")

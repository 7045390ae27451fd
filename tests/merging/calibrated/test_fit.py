"""A calibrated merge is nearer to the adapter than nearest, proved, resumable; bad rows are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasmith.errors import CheckpointError, DataError, UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.merging import writers
from lorasmith.merging.calibrated import fit, layers
from lorasmith.merging.merge import merge
from lorasmith.proving.weights.prove import prove
from tests.tiny import save_adapter, save_base, tiny_tokenizer

WORDS = [
    "the",
    "water",
    "runs",
    "in",
    "the",
    "river",
    "and",
    "there",
    "is",
    "more",
    "of",
    "it",
    "than",
    "anyone",
    "there",
    "thinks",
    "inside",
    "her",
    "house",
]


def write_rows(path: Path, count: int = 24, first: int = 0) -> Path:
    rows = [
        {
            "id": f"row-{number}",
            "prompt": f"Say {number}: " + " ".join(WORDS[number % 7 :]),
            "response": " ".join(WORDS[: 5 + number % 11]) + f" {number * 37 % 101}.",
            "metadata": {"source": "made", "domain": "words", "difficulty": "easy"},
        }
        for number in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("calibrate")
    base = save_base(folder / "base")
    adapter = save_adapter(folder / "adapter", base, std=0.02)
    return base, adapter, write_rows(folder / "rows.jsonl")


def calibrated(inputs: tuple[Path, Path, Path], output: Path, **options: Any) -> Any:
    base, adapter, rows = inputs
    return merge(
        base, adapter, output, **{"rounding": "calibrated", "calibration": rows, "seed": 3, **options}
    )


def divergence(base: Path, adapter: Path, merged: Path, rows: Path) -> float:
    """Mean KL of the merged model from PEFT's own forward, per token, in float64 from float32 logits."""
    tokenizer = tiny_tokenizer()
    reference = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).eval()
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for line in rows.read_text().splitlines():
            row = json.loads(line)
            ids = tokenizer(row["prompt"] + row["response"], return_tensors="pt")["input_ids"]
            p = reference(input_ids=ids).logits.double().log_softmax(-1)
            q = model(input_ids=ids).logits.double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
            count += ids.shape[1]
    return total / count


def test_it_is_nearer_to_the_adapter_than_rounding_to_nearest(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, _ = inputs
    record = calibrated(inputs, tmp_path / "calibrated")
    merge(base, adapter, tmp_path / "nearest")
    unseen = write_rows(tmp_path / "unseen.jsonl", 12, first=500)
    found = divergence(base, adapter, tmp_path / "calibrated", unseen)
    assert found < 0.6 * divergence(base, adapter, tmp_path / "nearest", unseen)
    assert {tensor.rounding for tensor in record.tensors} == {"calibrated"}
    assert record.calibration.rows == 24
    proof = prove(base, adapter, tmp_path / "calibrated")
    assert (proof.grade, proof.findings) == ("bounded", [])
    assert 1 <= proof.bound_ulps <= 16
    before, after = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "calibrated/model.safetensors"),
    )
    changed = {tensor.name for tensor in record.tensors}
    assert all(torch.equal(before[name], after[name]) for name in before if name not in changed)


def test_the_same_rows_and_seed_give_the_same_bytes(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        calibrated(inputs, tmp_path / name)
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two")


def test_tensors_of_many_blocks_are_made_in_threads(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(inputs, tmp_path / "whole")
    monkeypatch.setattr(writers, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(2))
    calibrated(inputs, tmp_path / "blocks")
    assert digest_folder(tmp_path / "whole") == digest_folder(tmp_path / "blocks")


def test_rows_are_rounded_alike_in_parts_of_any_size(
    inputs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(inputs, tmp_path / "whole")
    monkeypatch.setattr(fit, "MOST_ROWS", 7)
    calibrated(inputs, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        # Products of other sizes sum in another order: a value may fall to the other side of a midpoint.
        assert float((tensor != parts[name]).double().mean()) < 0.02, name


@pytest.mark.parametrize("stop_after", ["layer-0.json", "layer-1.safetensors", "layer-1.json"])
def test_a_killed_calibration_goes_on_with_the_same_bytes(
    inputs: tuple[Path, Path, Path], tmp_path: Path, stop_after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(inputs, tmp_path / "whole")
    ran: list[int] = []
    one_layer = fit._one_layer

    class Killed(BaseException):
        """Nothing of the package catches it."""

    def stopping(name: str) -> Any:
        original = getattr(layers, name)

        def write(path: Path, content: Any) -> None:
            original(path, content)
            if path.name == stop_after:
                raise Killed

        return write

    with monkeypatch.context() as patched:
        for name in ("write_bytes", "write_record"):
            patched.setattr(layers, name, stopping(name))
        with pytest.raises(Killed):
            calibrated(inputs, tmp_path / "out")

    def counting(model: Any, number: int, *rest: Any) -> Any:
        ran.append(number)
        return one_layer(model, number, *rest)

    monkeypatch.setattr(fit, "_one_layer", counting)
    calibrated(inputs, tmp_path / "out")
    assert ran == ([] if stop_after == "layer-1.json" else [1])
    assert digest_folder(tmp_path / "out") == digest_folder(tmp_path / "whole")
    names = [{file.name for file in (tmp_path / place).iterdir()} for place in ("out", "whole")]
    assert names[0] == names[1]


def test_what_cannot_be_calibrated_is_dithered_and_says_so(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3-moe")
    targets = ["q_proj", "gate_proj", "up_proj", "embed_tokens"]
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=targets)
    rows = write_rows(tmp_path / "rows.jsonl")
    record = calibrated((base, adapter, rows), tmp_path / "out")
    found = {tensor.name: (tensor.rounding, tensor.fallback) for tensor in record.tensors}
    assert found["model.layers.0.self_attn.q_proj.weight"] == ("calibrated", "")
    assert found["model.embed_tokens.weight"] == ("dithered", layers.OUTSIDE)
    experts = {value for name, value in found.items() if ".experts." in name}
    assert experts == {("dithered", layers.OUTSIDE)}
    assert prove(base, adapter, tmp_path / "out").grade == "bounded"


def test_too_few_tokens_fall_back(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = inputs
    one = tmp_path / "one.jsonl"
    row = {"id": "a", "prompt": "a", "response": "b", "metadata": {"source": "s", "domain": "d"}}
    one.write_text(json.dumps({**row, "metadata": {**row["metadata"], "difficulty": "easy"}}) + "\n")  # type: ignore[dict-item]
    record = calibrated((base, adapter, one), tmp_path / "out", template="plain")
    assert {tensor.rounding for tensor in record.tensors} == {"dithered"}
    assert all("tokens are too few for" in tensor.fallback for tensor in record.tensors)
    assert prove(base, adapter, tmp_path / "out").grade == "bounded"


def test_a_second_moment_that_cannot_be_inverted_falls_back(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """A norm of zeros silences the second half of a layer: what its linear layers get is 0."""
    base = shutil.copytree(inputs[0], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"] *= 0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    record = calibrated((base, *inputs[1:]), tmp_path / "out")
    silent = {tensor.name for tensor in record.tensors if tensor.rounding == "dithered"}
    assert silent and all(name.startswith("model.layers.1.mlp.") for name in silent)
    reasons = {tensor.fallback for tensor in record.tensors if tensor.name in silent}
    assert reasons == {"the second moment of the inputs cannot be inverted"}
    assert prove(base, inputs[1], tmp_path / "out").grade == "bounded"


def test_float32_has_nothing_to_calibrate(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    record = calibrated(inputs, tmp_path / "out", precision="float32")
    assert {tensor.fallback for tensor in record.tensors} == {"stored in F32, where nearly nothing is lost"}


def test_float16_is_calibrated_too(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    record = calibrated(inputs, tmp_path / "out", precision="float16")
    assert {tensor.rounding for tensor in record.tensors} == {"calibrated"}
    assert prove(inputs[0], inputs[1], tmp_path / "out").grade == "bounded"


def test_rows_of_the_test_set_are_refused(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    rows = inputs[2]
    shared = json.loads(rows.read_text().splitlines()[5])
    shared |= {"id": "renamed", "prompt": shared["prompt"].upper() + "  "}
    held_out = write_rows(tmp_path / "test.jsonl", 3, first=900)
    with held_out.open("a") as handle:
        handle.write(json.dumps(shared) + "\n")
    with pytest.raises(DataError, match="1 of 24 calibration rows are in the test set, such as 'row-5'"):
        calibrated(inputs, tmp_path / "out", test_set=held_out)
    assert not (tmp_path / "out").exists()
    write_rows(held_out, 3, first=900)
    assert calibrated(inputs, tmp_path / "out", test_set=held_out).calibration.test_set_checked


def test_auto_leaves_rows_of_the_test_set_out(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    rows = inputs[2]
    held_out = tmp_path / "test.jsonl"
    held_out.write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))
    use = calibrated(inputs, tmp_path / "out", rounding="auto", test_set=held_out).calibration
    assert (use.rows, use.left_out) == (20, 4)
    with pytest.raises(DataError, match="no calibration rows beside those of the test set"):
        calibrated(inputs, tmp_path / "none", rounding="auto", test_set=rows)
    for options in ({"calibration": None}, {"precision": "float32"}):
        record = calibrated(inputs, tmp_path / "plain", rounding="auto", **options)
        assert (record.rounding, record.seed, record.calibration) == ("nearest", None, None)


def test_auto_says_when_a_model_cannot_be_run_layer_by_layer(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llava")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    rows = write_rows(tmp_path / "rows.jsonl")
    record = calibrated((base, adapter, rows), tmp_path / "out", rounding="auto")
    assert record.rounding == "nearest"
    assert "not-calibrated" in {finding.code for finding in record.findings}
    assert prove(base, adapter, tmp_path / "out").grade == "exact"
    with pytest.raises(CheckpointError, match="cannot be built"):
        calibrated((base, adapter, rows), tmp_path / "other")


def test_several_files_are_one_set_of_rows(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    more = write_rows(tmp_path / "more.jsonl", 5, first=700)
    record = calibrated(inputs, tmp_path / "out", calibration=[inputs[2], more])
    assert record.calibration.rows == 29
    assert [file.path for file in record.calibration.files] == ["rows.jsonl", "more.jsonl"]


def test_a_budget_of_tokens_takes_some_of_the_rows(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    every = calibrated(inputs, tmp_path / "all").calibration
    some = calibrated(inputs, tmp_path / "some", calibration_tokens=every.tokens // 2).calibration
    assert 0 < some.rows < every.rows
    assert 0 < some.tokens <= every.tokens // 2
    with pytest.raises(UsageError, match="--calibration-tokens is 0"):
        calibrated(inputs, tmp_path / "none", calibration_tokens=0)


def test_no_rows_are_an_error(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        calibrated(inputs, tmp_path / "out", calibration=None)
    assert "--calibration" in str(caught.value.expected)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError):
        calibrated((*inputs[:2], empty), tmp_path / "out")


def test_activations_that_are_not_finite_are_an_error(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(inputs[0], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.gate_proj.weight"] *= 1e30
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e30
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="behind decoder layer 0 are not finite"):
        calibrated((base, *inputs[1:]), tmp_path / "out")

"""Compression: what is written loads again, holds the planned bytes, and says what it lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import LlamaTokenizer

import lorasmith
from lorasmith.compression import compress_several
from lorasmith.errors import (
    BusyError,
    CheckpointError,
    DataError,
    DiskError,
    InputError,
    MachineError,
    UsageError,
)
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import digest_folder
from lorasmith.files.jsonl import write_rows
from lorasmith.files.lock import only_one
from lorasmith.followup import compress_run
from lorasmith.followup.compress import compress
from lorasmith.followup.compress_quality import judge
from lorasmith.followup.compress_record import RECORD
from lorasmith.followup.compress_run import calibration_samples
from lorasmith.followup.compress_settings import CompressSettings
from lorasmith.followup.compress_table import write_page
from lorasmith.models import load
from lorasmith.proving.behaviour_pair import compare_pair
from lorasmith.records.compression import CompressionsRecord, CompressRecord
from tests.faults import in_child, was_killed
from tests.tiny import load_model, save_base, tiny_model, tiny_rows, tiny_tokenizer

TINY = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `rows.jsonl`, and `int4`: round to nearest in compressed-tensors, measured."""
    folder = tmp_path_factory.mktemp("compress")
    save_base(folder / "base", **TINY)
    write_rows(folder / "rows.jsonl", tiny_rows(24))
    compress(
        folder / "base", folder / "int4", test_set=folder / "rows.jsonl", compare=compare_pair,
        limits={"mean_kl": 100.0, "perplexity_ratio": 100.0, "top1_agreement": 0.0},
    )  # fmt: skip
    return folder


def record_of(folder: Path) -> CompressRecord:
    return read_record(folder / RECORD, CompressRecord)


def unpacked(folder: Path) -> Any:
    """The compressed model in float32, as every command loads it."""
    return load.load_model(folder).model


def test_what_is_written_is_what_was_planned(place: Path) -> None:
    record = record_of(place / "int4")
    tensors = load_file(place / "int4" / "model.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == record.planned_bytes
    assert record.bytes == (place / "int4" / "model.safetensors").stat().st_size
    assert record.bits_per_weight == pytest.approx(8 * record.bytes / tiny_model(**TINY).num_parameters())
    assert (record.group_size, record.calibration) == (64, None)


def test_every_weight_is_a_level_of_its_group(place: Path) -> None:
    """Round to nearest by hand in float64: no weight is further from the original than half a step."""
    loaded = unpacked(place / "int4")
    original = load_model(place / "base")
    ours = loaded.model.layers[1].mlp.up_proj.weight.detach().double().reshape(-1, 64)
    theirs = original.model.layers[1].mlp.up_proj.weight.detach().double().reshape(-1, 64)
    steps = np.array([np.diff(np.unique(row.numpy())).min() for row in ours])
    assert all(len(row.unique()) <= 16 for row in ours)
    # The outermost level of a symmetric grid lies one step inside: −8 … 7 steps for −max … max.
    assert float(((ours - theirs).abs().max(1).values / torch.tensor(steps)).max()) <= 1.01
    assert torch.equal(loaded.model.embed_tokens.weight, original.model.embed_tokens.weight)


def test_the_quality_is_that_of_plain_forwards(place: Path) -> None:
    """KL and agreement against softmaxes of both models in float64, over the response tokens."""
    found = record_of(place / "int4").quality
    assert found is not None
    a, b = load_model(place / "base").double(), unpacked(place / "int4").double()
    tokenizer, kl, same = tiny_tokenizer(), [], []
    for row in tiny_rows(24):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        ids = [
            *prompt,
            *tokenizer(row["response"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            p, q = (
                model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (a, b)
            )
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.kl.mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.kl.q99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found.top1_agreement == pytest.approx(np.mean(same), abs=2 / len(same))
    assert found.kl.mean > 1e-3
    assert {"source", "domain", "difficulty"} <= set(record_of(place / "int4").quality_groups)


def save_llama_with_sentencepiece(folder: Path) -> Path:
    """A base whose tokenizer the GGUF conversion knows: SentencePiece, trained on the rows."""
    import sentencepiece

    text = [f"{row['prompt']} {row['response']}" for row in tiny_rows(200)]
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    tiny_model(**TINY).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_calibrated_gguf_file_loads_again_and_is_what_was_planned(place: Path, tmp_path: Path) -> None:
    base = save_llama_with_sentencepiece(tmp_path / "base")
    settings = CompressSettings(
        method="calibrated", format="gguf:q4_0", iterations=2, calibration_rows=4, calibration_length=32
    )
    record = compress(base, tmp_path / "q4", settings=settings, calibration=place / "rows.jsonl")
    reader = GGUFReader(tmp_path / "q4" / "model-q4_0.gguf")
    assert sum(-(-tensor.n_bytes // 32) * 32 for tensor in reader.tensors) == record.planned_bytes
    assert record.calibration is not None and record.calibration.path == "rows.jsonl"
    ours, theirs = unpacked(tmp_path / "q4"), load_model(base)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    # The same model but for its rounding: far closer than two models of these weights in another order.
    assert 0.01 < float((a - b).std() / b.std()) < 0.7
    assert float((a - b.flip(1)).std() / b.std()) > 1


def test_a_finished_output_is_kept_and_a_damaged_one_is_made_again(place: Path, monkeypatch: Any) -> None:
    before = digest_folder(place / "int4")
    monkeypatch.setattr(compress_run, "WORKER", ("-c", "raise SystemExit('not again')"))
    assert compress(place / "base", place / "int4").quality is not None
    assert digest_folder(place / "int4") == before
    other = CompressSettings(group_size=32)
    with pytest.raises(MachineError, match="not again"):
        compress(place / "base", place / "int4", settings=other)
    assert digest_folder(place / "int4") == before  # a failure leaves the older output alone
    damaged = shutil.copytree(place / "int4", place / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(MachineError, match="not again"):
        compress(place / "base", damaged)


def test_a_failed_gate_is_an_answer(place: Path) -> None:
    record = compress(
        place / "base", place / "int4", test_set=place / "rows.jsonl", compare=compare_pair, limit=4,
        limits={"mean_kl": 1e-6},
    )  # fmt: skip
    assert record.passed is False
    assert [gate.verdict for gate in record.gates if gate.gate.metric == "compressed.mean_kl"] == ["fail"]


def questions() -> list[dict[str, Any]]:
    """Choices of two subjects; a model of random weights is right by luck alone."""
    return [
        {
            "id": f"MMLU/{index}",
            "prompt": f"the {'cat ' * (index % 7)}in rain\nA. one\nB. two\nC. in\nD. on\nAnswer:",
            "response": "ABCD"[index % 4],
            "metadata": {
                "source": "MMLU",
                "domain": ("anatomy", "law")[index % 3 == 0],
                "choices": ["one", "two", "in", "on"],
                "answer": "ABCD"[index % 4],
            },
        }
        for index in range(24)
    ]


def right_letters(model: Any) -> list[float]:
    """1 where the likeliest of the four letters is the answer: one plain forward a question, in float64."""
    tokenizer = tiny_tokenizer()
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]
    found = []
    for row in questions():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        with torch.no_grad():
            best = int(model.double()(torch.tensor([ids])).logits[0, -1, letters].argmax())
        found.append(float("ABCD"[best] == row["metadata"]["answer"]))
    return found


def test_task_accuracy_by_group_is_that_of_plain_forwards(place: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*questions(), *tiny_rows(3)])
    shutil.copytree(place / "int4", tmp_path / "int4")
    record = lorasmith.compress(
        place / "base", tmp_path / "int4", test_set=tmp_path / "rows.jsonl",
        limits={"perplexity_ratio": 100.0, "mean_kl": 100.0, "top1_agreement": 0.0, "accuracy_drop": 1.0},
    )  # fmt: skip
    a = right_letters(load_model(place / "base"))
    b = right_letters(unpacked(place / "int4"))
    assert record.tasks is not None and a != b
    assert record.tasks.overall.value_a == pytest.approx(np.mean(a))
    assert record.tasks.overall.value_b == pytest.approx(np.mean(b))
    law = record.tasks.groups["domain"]["law"]
    assert law.examples == 8
    assert (law.value_a, law.value_b) == pytest.approx((np.mean(a[::3]), np.mean(b[::3])))
    assert [effect.metric for effect in record.tasks.metrics] == ["accuracy"]
    [gate] = [gate for gate in record.gates if gate.gate.metric == "compressed.accuracy_drop"]
    assert gate.measured == pytest.approx(np.mean(a) - np.mean(b)) and gate.verdict == "pass"
    assert gate.interval is not None and gate.interval.low <= gate.measured <= gate.interval.high
    assert record.passed is True
    # The same record with a stricter gate fails.
    [strict] = judge(record, {"accuracy_drop": gate.measured - 0.01})
    assert strict.verdict == "fail"


def test_without_questions_it_says_so_and_an_asked_gate_does_not_pass(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "int4", tmp_path / "int4")
    loose = {"perplexity_ratio": 100.0, "mean_kl": 100.0, "top1_agreement": 0.0}
    options: dict[str, Any] = {"test_set": place / "rows.jsonl", "limit": 4}
    record = lorasmith.compress(place / "base", tmp_path / "int4", limits=loose, **options)
    assert [finding.code for finding in record.findings] == ["no-task"] and record.passed is True
    asked = {**loose, "accuracy_drop": 0.1}
    record = lorasmith.compress(place / "base", tmp_path / "int4", limits=asked, **options)
    assert record.passed is False
    assert [gate.verdict for gate in record.gates].count("not measured") == 1


def test_other_commands_take_a_compressed_folder(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "int4", tmp_path / "int4")
    options: dict[str, Any] = {"test_set": place / "rows.jsonl", "compare": compare_pair, "limit": 6}
    quality = compress(place / "base", tmp_path / "int4", **options).quality
    found = lorasmith.validate(place / "int4", place / "rows.jsonl", tmp_path / "found", limit=6)
    assert quality is not None
    # The same tokens by two ways of adding float32 losses up.
    assert found.overall.perplexity == pytest.approx(quality.perplexity_b, rel=1e-5)
    with pytest.raises(CheckpointError, match="is compressed"):
        lorasmith.train_draft(place / "int4", place / "rows.jsonl", tmp_path / "draft", layers=[0])


def test_a_size_is_a_gate(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(place / "int4")
    assert [gate.verdict for gate in judge(record, {"bytes": record.bytes})] == ["pass"]
    assert [gate.verdict for gate in judge(record, {"bytes": record.bytes - 1})] == ["fail"]
    assert [gate.verdict for gate in judge(record, {"q99_kl": 1e-9})] == ["fail"]
    monkeypatch.setattr(compress_run, "WORKER", ("-c", "raise SystemExit('too late')"))
    with pytest.raises(UsageError, match=r"the limit is 1\.0 kB"):  # before any work
        compress(place / "base", tmp_path / "out", limits={"bytes": 1000})
    with pytest.raises(UsageError, match="no limit 'speed'"):
        compress(place / "base", tmp_path / "out", limits={"speed": 1})
    with pytest.raises(UsageError, match="mean_kl is nan"):
        compress(place / "base", tmp_path / "out", limits={"mean_kl": float("nan")})


def test_what_cannot_be_measured_is_told_before_the_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_run, "WORKER", ("-c", "raise SystemExit('too late')"))
    with pytest.raises(InputError, match="does not exist"):
        lorasmith.compress(place / "base", tmp_path / "out", test_set=tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="24 of 24 calibration rows are in the test set"):
        lorasmith.compress(
            place / "base", tmp_path / "out", settings=CompressSettings(method="calibrated"),
            calibration=place / "rows.jsonl", test_set=place / "rows.jsonl",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_two_compressions_of_one_output_are_refused(place: Path, tmp_path: Path) -> None:
    with only_one(tmp_path / "out", "compression"), pytest.raises(BusyError, match="another compression"):
        compress(place / "base", tmp_path / "out")


def copies(place: Path) -> tuple[str, str]:
    """A worker that is done at once: it leaves what round to nearest gave."""
    return (
        "-c",
        "import json, sys, shutil; job = json.load(open(sys.argv[1]));"
        f"shutil.copytree({str(place / 'int4')!r}, job['output'] + '/m', "
        f"ignore=shutil.ignore_patterns({RECORD!r}))",
    )


def test_several_ways_in_one_call(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress_run, "WORKER", copies(place))
    write_rows(tmp_path / "rows.jsonl", [*questions()[:6], *tiny_rows(3)])
    write_rows(tmp_path / "train.jsonl", tiny_rows(30, seed=9))
    ways = [
        CompressSettings(),
        CompressSettings(
            method="calibrated", iterations=2, calibration_rows=2, calibration_length=16, group_size=32
        ),
    ]
    options: dict[str, Any] = {"calibration": tmp_path / "train.jsonl", "test_set": tmp_path / "rows.jsonl"}
    loose = {"perplexity_ratio": 100.0, "mean_kl": 100.0, "top1_agreement": 0.0, "accuracy_drop": 1.0}
    record = compress_several(place / "base", tmp_path / "all", ways, limits=loose, **options)
    assert record.folders == ["compressed-tensors-rtn", "compressed-tensors-calibrated"]
    assert [one.method for one in record.compressed] == ["rtn", "calibrated"]
    assert all(record_of(tmp_path / "all" / name).passed for name in record.folders)
    assert record.recommended in record.folders
    assert read_record(tmp_path / "all" / "compressions.json", CompressionsRecord) == record
    strict = compress_several(place / "base", tmp_path / "all", ways, limits={"mean_kl": 0.0}, **options)
    assert strict.recommended is None and "none passes" in strict.reason
    with pytest.raises(UsageError, match="more than once"):
        compress_several(place / "base", tmp_path / "all", [ways[0], ways[0]])


def test_table_and_plot(place: Path, tmp_path: Path) -> None:
    write_page([place / "int4"], tmp_path / "t.md")
    record = record_of(place / "int4")
    assert record.quality is not None
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert "compressed-tensors | rtn" in lines[2] and f"{record.quality.kl.mean:.4f}" in lines[2]
    write_page([place / "int4"], tmp_path / "t.html")
    text = (tmp_path / "t.html").read_text()
    assert "<svg" in text and "<circle" in text and "http" not in text


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise ModuleNotFoundError(\"No module named 'auto_round'\")", "not installed"),
        ("raise ValueError('no such layer')", "ValueError: no such layer"),
        ("import os; os.kill(os.getpid(), 9)", "killed or ran out of memory"),
    ],
)
def test_a_worker_that_fails_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(compress_run, "WORKER", ("-c", script))
    with pytest.raises(MachineError, match=said):
        compress(place / "base", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_point_the_output_is_whole_or_absent(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_run, "WORKER", copies(place))

    def work() -> None:
        compress(place / "base", tmp_path / "out")

    assert in_child(work, die_at=None, count_to=tmp_path / "count") == 0
    whole = digest_folder(tmp_path / "out")
    writes = int((tmp_path / "count").read_text())
    for at in (2, writes // 2, writes - 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert was_killed(in_child(work, die_at=at))
        assert not (tmp_path / "out").exists() or digest_folder(tmp_path / "out") == whole
        work()
        assert digest_folder(tmp_path / "out") == whole
        assert not list(tmp_path.glob(".*partial"))


def test_a_result_that_does_not_load_is_not_published(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that says it is done, but left a cut file."""
    script = (
        "import json, sys, pathlib, shutil; job = json.load(open(sys.argv[1]));"
        f"out = shutil.copytree({str(place / 'int4')!r}, job['output'] + '/m');"
        "f = pathlib.Path(out) / 'model.safetensors'; f.write_bytes(f.read_bytes()[:-100])"
    )
    monkeypatch.setattr(compress_run, "WORKER", ("-c", script))
    with pytest.raises(CheckpointError, match="does not load"):
        compress(place / "base", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "magic"}, "no method"),
        ({"format": "gguf:q1_x"}, "no format"),
        ({"bits": 3}, "3 bits"),
        ({"format": "gguf:q4_0", "bits": 5}, "has 4 bits"),
        ({"format": "gguf:q4_0", "group_size": 64}, "own groups"),
        ({"group_size": 48}, "no group of 48 divides"),
        ({"method": "calibrated"}, "needs rows"),
        ({"method": "calibrated", "calibration_rows": 0}, "--calibration-rows is 0"),
    ],
)
def test_wrong_settings_are_one_message(
    place: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        compress(place / "base", tmp_path / "out", settings=CompressSettings(**settings))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_not_replaced(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="did not write"):
        compress(place / "base", tmp_path / "mine")
    with pytest.raises(UsageError, match="own folder"):
        compress(place / "base", place / "base")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_compressed_model_is_not_compressed_again(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized"):
        compress(place / "int4", tmp_path / "out")


def test_no_disk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = os.statvfs(tmp_path)
    full = os.statvfs_result((state.f_bsize, state.f_frsize, state.f_blocks, 0, 0, *tuple(state)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(DiskError, match="too little disk space to compress"):
        compress(place / "base", tmp_path / "out")


def test_calibration_rows_are_laid_end_to_end(place: Path) -> None:
    samples = calibration_samples(place / "base", place / "rows.jsonl", 3, 40)
    assert [len(sample) for sample in samples] == [40, 40, 40]
    text = tiny_tokenizer().decode([token for sample in samples for token in sample])
    assert text.startswith("<|start|>user\n" + tiny_rows(1)[0]["prompt"])
    with pytest.raises(DataError, match="less than one sample"):
        calibration_samples(place / "base", place / "rows.jsonl", 3, 100_000)


def test_the_plan_command(place: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lorasmith.cli.main", "compress", "--model", str(place / "base")]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    refused = run("--plan", "--target-size", "1kB")
    assert refused.returncode == 1 and "No method reaches it" in refused.stdout
    assert "Traceback" not in refused.stderr
    fits = run("--plan", "--target-size", "1GB", "--json")
    assert fits.returncode == 0 and json.loads(fits.stdout)["reachable"] is True
    nonsense = run("--plan", "--target-size", "five")
    assert nonsense.returncode == 2 and "is not a size" in nonsense.stderr
    # A target that nothing reaches is refused before any work, also without --plan.
    assert run("--output", str(place / "never"), "--target-size", "1kB").returncode == 1
    assert not (place / "never").exists()

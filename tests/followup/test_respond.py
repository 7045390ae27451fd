"""Responses for a whole file: each row once, after a kill as well, and what must be known said aloud."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import torch

from lorasmith.errors import BusyError, DataError, DiskError, MachineError, UsageError
from lorasmith.files.atomic import read_record
from lorasmith.files.jsonl import read_examples
from lorasmith.followup.respond import RespondOptions, respond
from lorasmith.followup.respond_engines import Engine
from lorasmith.followup.respond_limit import Length, is_loop, judge_limit, suggest_limit
from lorasmith.followup.respond_rows import find_messages, read_prompts
from lorasmith.followup.respond_store import Store
from lorasmith.followup.respond_vllm import VllmEngine
from lorasmith.models.requests import Answer, Limits, Request
from lorasmith.models.sampling import Sampling
from lorasmith.records.base import Finding
from lorasmith.records.followup import RespondRecord
from tests.tiny import load_model, save_adapter, save_base, tiny_rows, tiny_tokenizer

COUNT = 14
SHORT = RespondOptions(max_new_tokens=12, batch_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("respond")
    save_base(folder / "base", dtype=torch.float32)
    save_adapter(folder / "adapter", folder / "base")
    write(folder / "data.jsonl", tiny_rows(COUNT))
    return folder


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Scripted(Engine):
    """No model: answers of a given length, failures and interruptions where they are asked for."""

    name, dtype, context = "scripted", "float32", 4096

    def __init__(self, length: Callable[[int], int] = lambda index: 3, **where: Any) -> None:
        self.tokenizer, self.length, self.where = tiny_tokenizer(), length, where
        self.asked: list[int] = []

    def stops(self, template: str) -> frozenset[int]:
        return frozenset([4])

    def answers(
        self,
        requests: Iterable[Request],
        limits: Limits,
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[Answer]:
        for request in requests:
            self.asked.append(request.index)
            if len(self.asked) > self.where.get("break_after", 1 << 30):
                raise RuntimeError("broken off")
            if request.index in self.where.get("fails", ()):
                yield Answer(request.index, [], "failed", error="the device gave up")
                continue
            wanted = self.length(request.index)
            kept = [
                40 + (place * 7 + request.index) % 60 for place in range(min(wanted, limits.max_new_tokens))
            ]
            on_tokens(len(kept))
            cut = wanted > limits.max_new_tokens
            yield Answer(request.index, kept, "length" if cut else "stop", None if cut else 4)


def plain(place: Path, prompt: str, most: int = 12, adapter: bool = False) -> str:
    """transformers' own generate under the chat template."""
    model: Any = load_model(place / "base")
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(place / "adapter"))
    tokenizer = tiny_tokenizer()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = model.generate(**ids, max_new_tokens=most, do_sample=False, eos_token_id=[2, 4], pad_token_id=0)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_responses_are_those_of_generate_in_the_rows_order_without_prompt_tails(
    place: Path, tmp_path: Path
) -> None:
    record = respond(place / "base", place / "data.jsonl", tmp_path / "r.jsonl", options=SHORT)
    rows = read(tmp_path / "r.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in tiny_rows(COUNT)]
    for row, given in zip(rows, tiny_rows(COUNT), strict=True):
        assert row["input"] == given
        assert row["metadata"] == given["metadata"]
        assert row["response"] == plain(place, given["prompt"])
    assert record.rows == COUNT == sum(record.finish.values())
    assert record.response_tokens == sum(row["response_tokens"] for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.jsonl", "r.timing.json"]
    assert len(read_examples(tmp_path / "r.jsonl")) == COUNT  # a test set or training file again


def test_an_adapter_answers_as_peft_does(place: Path, tmp_path: Path) -> None:
    options = RespondOptions(max_new_tokens=12, adapter=place / "adapter", limit=3)
    respond(place / "base", place / "data.jsonl", tmp_path / "r.jsonl", options=options)
    for row in read(tmp_path / "r.jsonl"):
        assert row["response"] == plain(place, row["prompt"], adapter=True)


def test_top_log_probabilities_lie_beside_the_responses(place: Path, tmp_path: Path) -> None:
    options = RespondOptions(max_new_tokens=12, batch_size=4, top_logprobs=3)
    respond(place / "base", place / "data.jsonl", tmp_path / "r.jsonl", options=options)
    table = pq.read_table(tmp_path / "r.logprobs.parquet").to_pylist()
    model = load_model(place / "base")
    assert [row["key"] for row in table] == [row["key"] for row in read(tmp_path / "r.jsonl")]
    for row, said in zip(table, read(tmp_path / "r.jsonl"), strict=True):
        assert len(row["tokens"]) == said["response_tokens"] + (said["finish_reason"] == "stop")
        with torch.no_grad():
            logits = model(torch.tensor([row["prompt"] + row["tokens"]])).logits[
                0, len(row["prompt"]) - 1 : -1
            ]
        best = logits.log_softmax(-1).topk(3)
        assert row["top_tokens"] == best.indices.tolist()
        # float32 forwards in another order of summation differ by less than 1e-5 nats here
        assert torch.tensor(row["top_logprobs"]).allclose(best.values, atol=1e-4)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lorasmith.followup.respond import RespondOptions, respond
from lorasmith.followup import respond_store
place, output, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
add, seen = respond_store.Store.add, []
def dying(self, *args, **more):
    add(self, *args, **more)
    seen.append(1)
    if len(seen) == number:
        os.kill(os.getpid(), signal.SIGKILL)
respond_store.Store.add = dying
respond(place / "base", place / "data.jsonl", output,
    options=RespondOptions(max_new_tokens=12, batch_size=4, top_logprobs=2))
"""


def test_a_killed_extraction_goes_on_and_ends_with_the_same_bytes(place: Path, tmp_path: Path) -> None:
    options = RespondOptions(max_new_tokens=12, batch_size=4, top_logprobs=2)
    command = [sys.executable, "-c", KILLED, str(place), str(tmp_path / "r.jsonl"), "5"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".r.jsonl.journal"]
    with (tmp_path / ".r.jsonl.journal").open("ab") as journal:
        journal.write(b'{"row": {"key": "torn')  # as a power cut leaves it
    began: list[tuple[int, int]] = []
    watcher = SimpleNamespace(
        began=lambda rows, before: began.append((rows, before)),
        moved=lambda rows, tokens: None,
        found=lambda finding: None,
    )
    respond(place / "base", place / "data.jsonl", tmp_path / "r.jsonl", options=options, watcher=watcher)
    assert began == [(COUNT, 5)]
    (tmp_path / "whole").mkdir()
    respond(place / "base", place / "data.jsonl", tmp_path / "whole" / "r.jsonl", options=options)
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "whole" / "r.jsonl").read_bytes()
    resumed, whole = (
        read_record(folder / "r.json", RespondRecord) for folder in (tmp_path, tmp_path / "whole")
    )
    assert resumed.model_copy(update={"logprobs": whole.logprobs}) == whole
    one, other = (pq.read_table(folder / "r.logprobs.parquet") for folder in (tmp_path, tmp_path / "whole"))
    for name in ("key", "id", "finish_reason", "prompt", "tokens", "top_tokens"):
        assert one[name].to_pylist() == other[name].to_pylist()
    for left, right in zip(one["logprobs"].to_pylist(), other["logprobs"].to_pylist(), strict=True):
        assert left == pytest.approx(right, abs=1e-4)  # other neighbours, another order of summation


def scripted(place: Path, tmp_path: Path, engine: Scripted, **options: Any) -> RespondRecord:
    return respond(
        place / "base",
        options.pop("data", place / "data.jsonl"),
        tmp_path / "r.jsonl",
        options=RespondOptions(**{"max_new_tokens": 12, **options}),
        watcher=options.pop("watcher", None),
        engine=engine,
    )


@pytest.mark.parametrize("after", [0, 1, 7, COUNT - 1])
def test_broken_off_at_any_row_none_is_lost_and_none_asked_twice(
    place: Path, tmp_path: Path, after: int
) -> None:
    first, second = Scripted(break_after=after), Scripted()
    with pytest.raises(RuntimeError, match="broken off"):
        scripted(place, tmp_path, first)
    scripted(place, tmp_path, second)
    assert sorted(first.asked[:after] + second.asked) == list(range(COUNT))
    assert len(read(tmp_path / "r.jsonl")) == COUNT


def test_a_finished_output_is_not_made_again_and_takes_new_rows(place: Path, tmp_path: Path) -> None:
    scripted(place, tmp_path, Scripted())
    before = (tmp_path / "r.jsonl").read_bytes()
    again = Scripted()
    scripted(place, tmp_path, again)
    assert again.asked == []
    assert (tmp_path / "r.jsonl").read_bytes() == before
    longer = write(tmp_path / "more.jsonl", [*tiny_rows(COUNT), {"prompt": "one more"}])
    scripted(place, tmp_path, again, data=longer)
    assert again.asked == [COUNT]
    assert len(read(tmp_path / "r.jsonl")) == COUNT + 1
    record = scripted(place, tmp_path, again)  # the shorter file once more: nothing is thrown away
    assert len(read(tmp_path / "r.jsonl")) == COUNT + 1
    assert [finding.code for finding in record.findings] == ["rows-not-in-data"]


def test_equal_rows_are_answered_each(place: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "the same"}] * 3)
    record = scripted(place, tmp_path, Scripted(), data=data)
    assert record.rows == 3
    assert len({row["key"] for row in read(tmp_path / "r.jsonl")}) == 3


@pytest.mark.parametrize("begun", [False, True], ids=["finished", "begun"])
def test_settings_are_not_mixed_in_one_output(place: Path, tmp_path: Path, begun: bool) -> None:
    engine = Scripted(break_after=3) if begun else Scripted()
    if begun:
        with pytest.raises(RuntimeError):
            scripted(place, tmp_path, engine)
    else:
        scripted(place, tmp_path, engine)
    with pytest.raises(UsageError, match="max_new_tokens was 12, now 13") as raised:
        scripted(place, tmp_path, Scripted(), max_new_tokens=13)
    assert "--output" in str(raised.value)
    with pytest.raises(UsageError, match="temperature"):
        scripted(place, tmp_path, Scripted(), sampling=Sampling(temperature=0.5))


def test_a_foreign_or_changed_output_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("mine\n")
    with pytest.raises(UsageError, match="not one of this command's"):
        scripted(place, tmp_path, Scripted())
    assert (tmp_path / "r.jsonl").read_text() == "mine\n"
    (tmp_path / "r.jsonl").unlink()
    scripted(place, tmp_path, Scripted())
    with (tmp_path / "r.jsonl").open("a") as output:
        output.write('{"key": "x"}\n')
    with pytest.raises(UsageError, match="changed"):
        scripted(place, tmp_path, Scripted())


def test_two_processes_do_not_write_one_output(place: Path, tmp_path: Path) -> None:
    with Store(tmp_path / ".r.jsonl.journal", {}), pytest.raises(BusyError):
        Store(tmp_path / ".r.jsonl.journal", {})


def test_a_full_disk_loses_no_finished_row(place: Path, tmp_path: Path) -> None:
    first, second = Scripted(), Scripted()
    append = Store._append

    def full(self: Store, content: bytes) -> int:
        if len(self.rows) == 4:
            self._handle.write(content[:20])  # the rest found no room
            self._handle.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, content)

    with patch.object(Store, "_append", full), pytest.raises(DiskError, match="disk is full"):
        scripted(place, tmp_path, first)
    scripted(place, tmp_path, second)
    assert sorted(first.asked[:4] + second.asked) == list(range(COUNT))


def test_failed_rows_lie_aside_and_are_tried_again_when_asked(place: Path, tmp_path: Path) -> None:
    record = scripted(place, tmp_path, Scripted(fails=(2, 5)))
    assert (record.rows, record.failed) == (COUNT - 2, 2)
    aside = read(tmp_path / "r.failed.jsonl")
    assert [(row["id"], row["error"]) for row in aside] == [
        ("row-2", "the device gave up"),
        ("row-5", "the device gave up"),
    ]
    patient = Scripted()
    assert scripted(place, tmp_path, patient).failed == 2
    assert patient.asked == []
    record = scripted(place, tmp_path, patient, retry_failed=True)
    assert (sorted(patient.asked), record.failed, record.rows) == ([2, 5], 0, COUNT)
    assert not (tmp_path / "r.failed.jsonl").exists()
    assert [row["id"] for row in read(tmp_path / "r.jsonl")] == [row["id"] for row in tiny_rows(COUNT)]


def test_rows_without_a_prompt_are_told_and_the_others_answered(place: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "good"}, {"prompt": " "}, {"text": "x"}, {"prompt": 3}])
    record = scripted(place, tmp_path, Scripted(), data=data)
    assert (record.rows, record.failed) == (1, 3)
    reasons = [row["error"] for row in read(tmp_path / "r.failed.jsonl")]
    assert reasons == [
        "the field 'prompt' is empty",
        "the row has no prompt",
        "the field 'prompt' is not text",
    ]
    mended = write(tmp_path / "d.jsonl", [{"prompt": "good"}, {"prompt": "better"}])
    record = scripted(place, tmp_path, Scripted(), data=mended)
    assert (record.rows, record.failed) == (2, 0)
    nothing = write(tmp_path / "n.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(DataError, match="none of the 3 rows has a prompt") as raised:
        read_prompts(nothing)
    assert '"messages"' in str(raised.value)
    with pytest.raises(DataError, match="no rows"):
        read_prompts(write(tmp_path / "e.jsonl", []))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "response": "b"}, [("user", "a")]),
        ({"question": "a", "answer": "b"}, [("user", "a")]),
        ({"instruction": "a", "input": "b", "output": "c"}, [("user", "a\n\nb")]),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            [("system", "s"), ("user", "u")],
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            [("user", "u")],
        ),
        ({"prompt": [{"role": "user", "content": "u"}]}, [("user", "u")]),
    ],
    ids=["prompt", "question", "alpaca", "messages", "sharegpt", "prompt as messages"],
)
def test_the_shapes_of_training_files_are_read(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    messages, fault = find_messages(row)
    assert ([(m["role"], m["content"]) for m in messages], fault) == (expected, "")


def test_a_limit_that_cuts_most_rows_is_told_after_the_first_hundred(place: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": f"question {number}"} for number in range(300)])
    found: list[tuple[int, Finding]] = []
    engine = Scripted(lambda index: 10 if index % 5 == 0 else 30)
    watcher = SimpleNamespace(
        began=lambda rows, before: None,
        moved=lambda rows, tokens: None,
        found=lambda finding: found.append((len(engine.asked), finding)),
    )
    record = respond(
        place / "base",
        data,
        tmp_path / "r.jsonl",
        options=RespondOptions(max_new_tokens=12),
        watcher=watcher,
        engine=engine,
    )
    [(asked, finding)] = found
    assert asked == 100  # 200 rows before it would have been too late
    assert "cut off at 12 tokens" in finding.message
    assert "--max-new-tokens" in (finding.remedy or "")
    assert record.cut_off == pytest.approx(0.8)
    assert record.findings == [finding]


def test_the_suggested_limit_leaves_few_rows_cut() -> None:
    """Lengths with a constant hazard, the case the estimate is exact for: 1 % must be left within 1 point."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.rand(20_000, generator=generator).log() * -200).tolist()
    lengths = [Length(min(int(one), 100), one > 100, False) for one in drawn]
    suggested = suggest_limit(lengths, 100)
    assert sum(one > suggested for one in drawn) / len(drawn) < 0.02
    assert suggested < 1100
    assert judge_limit([Length(5, False, False)] * 99 + [Length(9, True, False)], 9, None) is None


def test_loops_are_not_answered_with_a_larger_limit() -> None:
    assert is_loop([1, 2, 3, 9, 8, 9, 8, 9, 8, 9, 8])
    assert not is_loop([1, 2, 3, 4, 5, 6, 7, 8])
    looping = [Length(20, False, False)] * 50 + [Length(64, True, True)] * 50
    finding = judge_limit(looping, 64, 4096)
    assert finding is not None
    assert "repeat themselves" in finding.message
    assert suggest_limit(looping, 64) == 64


def test_wrong_options_are_refused(place: Path, tmp_path: Path) -> None:
    for options in (
        {"max_new_tokens": 0},
        {"sampling": Sampling(temperature=-1)},
        {"sampling": Sampling(top_p=0.5)},
        {"engine": "llama.cpp"},
        {"batch_size": 0},
        {"dtype": "int3"},
    ):
        with pytest.raises(UsageError):
            respond(
                place / "base", place / "data.jsonl", tmp_path / "r.jsonl", options=RespondOptions(**options)
            )
    assert list(tmp_path.iterdir()) == []


class StandInVllm:
    """What of vLLM's interface is used, with a scripted model behind it: 3 tokens, then the end token."""

    def __init__(self) -> None:
        self.waiting: dict[str, Any] = {}
        self.most_waiting = 0
        self.model_config = SimpleNamespace(max_model_len=64)
        self.LLMEngine = SimpleNamespace(from_engine_args=self.make)

    def EngineArgs(self, **arguments: Any) -> dict[str, Any]:
        return arguments

    def SamplingParams(self, **parameters: Any) -> SimpleNamespace:
        return SimpleNamespace(**parameters)

    def make(self, arguments: dict[str, Any]) -> StandInVllm:
        self.arguments = arguments
        return self

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> None:
        self.waiting[request_id] = [prompt, params, 0]
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def step(self) -> list[Any]:
        made = []
        for name, state in list(self.waiting.items()):
            prompt, params, _ = state
            state[2] += 1
            tokens = [50 + len(prompt["prompt_token_ids"]) % 7, 51, 52, params.stop_token_ids[-1]][: state[2]]
            reason = "stop" if state[2] == 4 else "length" if state[2] == params.max_tokens else None
            entry = SimpleNamespace(logprob=-0.5)
            places = [{token: entry, 7: SimpleNamespace(logprob=-1.0)} for token in tokens]
            output = SimpleNamespace(
                token_ids=tokens, finish_reason=reason, logprobs=places if params.logprobs else None
            )
            made.append(SimpleNamespace(request_id=name, finished=reason is not None, outputs=[output]))
            if reason:
                del self.waiting[name]
        return made


def test_the_vllm_engine_keeps_the_contract(place: Path, tmp_path: Path) -> None:
    package = StandInVllm()
    engine = VllmEngine(place / "base", None, device="auto", dtype="auto", batch_size=3, vllm=package)
    assert package.arguments["dtype"] == "float32"  # as the folder was saved
    data = write(tmp_path / "d.jsonl", [*tiny_rows(6), {"id": "long", "prompt": "word " * 80}])
    options = RespondOptions(max_new_tokens=9, top_logprobs=2)
    record = respond(place / "base", data, tmp_path / "r.jsonl", options=options, engine=engine)
    assert (record.rows, record.failed, record.finish) == (6, 1, {"stop": 6})
    assert package.most_waiting == 3
    rows = read(tmp_path / "r.jsonl")
    assert all(row["response_tokens"] == 3 for row in rows)
    table = pq.read_table(tmp_path / "r.logprobs.parquet").to_pylist()
    assert all(len(row["tokens"]) == 4 and row["top_tokens"][0] == [row["tokens"][0], 7] for row in table)
    assert "room for 64" in read(tmp_path / "r.failed.jsonl")[0]["error"]


def test_vllm_where_it_is_not(place: Path) -> None:
    with pytest.raises(MachineError, match="not installed") as raised:
        VllmEngine(place / "base", None, device="auto", dtype="auto", batch_size=None)
    assert "lorasmith[vllm]" in str(raised.value)
    with pytest.raises(UsageError, match="merged model"):
        VllmEngine(place / "base", place / "adapter", device="auto", dtype="auto", batch_size=None)


def test_the_command_as_typed(place: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lorasmith.cli.main", "respond", "--model", str(place / "base")]
    command += ["--data", str(place / "data.jsonl"), "--output", str(tmp_path / "r.jsonl")]
    command += ["--max-new-tokens", "5", "--price-per-hour", "2.5"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"Responses: {COUNT}" in done.stdout
    assert "rows/s" in done.stderr and "cost" in done.stderr
    assert "cut off at 5 tokens" in done.stderr
    assert json.loads((tmp_path / "r.timing.json").read_text())["cost"] > 0

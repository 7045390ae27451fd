"""The vLLM engine against a stand-in of its interface."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from lorasmith.errors import MachineError, UsageError
from lorasmith.followup.responses.engines import VllmEngine
from lorasmith.followup.responses.respond import respond
from lorasmith.options import RespondOptions
from tests.followup.responding import read, write
from tests.tiny import tiny_rows


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


def test_the_vllm_engine_keeps_the_contract(answering: Path, tmp_path: Path) -> None:
    package = StandInVllm()
    engine = VllmEngine(answering / "base", None, device="auto", dtype="auto", batch_size=3, vllm=package)
    assert package.arguments["dtype"] == "float32"  # as the folder was saved
    data = write(tmp_path / "d.jsonl", [*tiny_rows(6), {"id": "long", "prompt": "word " * 80}])
    options = RespondOptions(max_new_tokens=9, top_logprobs=2)
    record = respond(answering / "base", data, tmp_path / "r.jsonl", options=options, loaded=engine)
    assert (record.rows, record.failed, record.finish) == (6, 1, {"stop": 6})
    assert package.most_waiting == 3
    rows = read(tmp_path / "r.jsonl")
    assert all(row["response_tokens"] == 3 for row in rows)
    table = pq.read_table(tmp_path / "r.logprobs.parquet").to_pylist()
    assert all(len(row["tokens"]) == 4 and row["top_tokens"][0] == [row["tokens"][0], 7] for row in table)
    assert "room for 64" in read(tmp_path / "r.failed.jsonl")[0]["error"]


def test_vllm_where_it_is_not(answering: Path) -> None:
    with pytest.raises(MachineError, match="not installed") as raised:
        VllmEngine(answering / "base", None, device="auto", dtype="auto", batch_size=None)
    assert "lorasmith[vllm]" in str(raised.value)
    with pytest.raises(UsageError, match="merged model"):
        VllmEngine(answering / "base", answering / "adapter", device="auto", dtype="auto", batch_size=None)

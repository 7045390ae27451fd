"""What the tests of responses share: a scripted engine, and transformers' own generate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasmith.followup.responses.engines import Engine
from lorasmith.followup.responses.respond import respond
from lorasmith.followup.responses.work import GROUP_ROWS
from lorasmith.models.generation.decoding import GeneratedAnswer, GenerationLimits, Request, Sampling
from lorasmith.options import RespondOptions
from lorasmith.progress import Advance
from lorasmith.records.base import Finding
from lorasmith.records.followup import RespondRecord
from tests.tiny import load_model, tiny_tokenizer

COUNT = 14


class Hears:
    """A watcher that remembers how many rows were to come, and calls `told` with each finding."""

    def __init__(self, told: Callable[[Finding], None] = lambda finding: None) -> None:
        self.told, self.bars = told, list[int]()

    @contextmanager
    def progress(self, label: str, *, total: int, unit: str) -> Iterator[Advance]:
        self.bars.append(total)
        yield lambda rows: None

    def step(self, number: int, total: int, title: str) -> None: ...

    def finished(self, stage: str, *, reused: bool, seconds: float) -> None: ...

    def generated(self, tokens: int) -> None: ...

    def show(self, stage: str, record: Any) -> None:
        self.told(record)


SHORT = RespondOptions(max_new_tokens=12, batch_size=4)


_KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lorasmith.followup.responses import output, work
from lorasmith.followup.responses.respond import respond
from lorasmith.options import RespondOptions
place, target, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
work.GROUP_ROWS = int(sys.argv[4])
add, seen = output.ResponseJournal.add, []
def dying(self, *args, **more):
    add(self, *args, **more)
    seen.append(1)
    if len(seen) == number:
        os.kill(os.getpid(), signal.SIGKILL)
output.ResponseJournal.add = dying
options = RespondOptions(**json.loads(sys.argv[5]))
respond(place / "base", place / "data.jsonl", target, options=options)
"""


def kill_after(place: Path, output: Path, rows: int, group_rows: int = GROUP_ROWS, **options: Any) -> None:
    """Answer `data.jsonl` of a place by its `base` in another process, which dies after so many rows."""
    asked = [str(place), str(output), str(rows), str(group_rows), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *asked],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


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
        limits: GenerationLimits,
        sampling: Sampling,
        on_tokens: Callable[[int], None],
    ) -> Iterator[GeneratedAnswer]:
        for request in requests:
            self.asked.append(request.index)
            if len(self.asked) > self.where.get("break_after", 1 << 30):
                raise RuntimeError("broken off")
            if request.index in self.where.get("fails", ()):
                yield GeneratedAnswer(request.index, [], "failed", error="the device gave up")
                continue
            wanted = self.length(request.index)
            kept = [
                40 + (place * 7 + request.index) % 60 for place in range(min(wanted, limits.max_new_tokens))
            ]
            on_tokens(len(kept))
            cut = wanted > limits.max_new_tokens
            yield GeneratedAnswer(request.index, kept, "length" if cut else "stop", None if cut else 4)


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


def scripted(place: Path, tmp_path: Path, engine: Scripted, **options: Any) -> RespondRecord:
    return respond(
        place / "base",
        options.pop("data", place / "data.jsonl"),
        tmp_path / "r.jsonl",
        watcher=options.pop("watcher", None),
        loaded=engine,
        **{"max_new_tokens": 12, **options},
    )

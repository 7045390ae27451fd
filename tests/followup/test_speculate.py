"""Speculative decoding: the same texts as greedy decoding, an honest account, and advice that may be no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lorasmith.errors import DataError, UsageError
from lorasmith.followup.speculation import loop
from lorasmith.followup.speculation.loop import (
    Drafter,
    Greedy,
    LookupDrafter,
    ModelDrafter,
    Speculated,
    decode_speculatively,
)
from lorasmith.followup.speculation.speculate import (
    predicted_speedup,
    recommend,
    require_same_tokenizer,
    speculate,
    speedup,
)
from lorasmith.models.device import choose_route, use_route
from lorasmith.models.load import LoadedModel
from lorasmith.options import SpeculateOptions
from lorasmith.records.followup import SpeculationRecord, SpeculationSpeed
from tests.tiny import save_base, tiny_model, tiny_rows, tiny_tokenizer
from tests.typed import Typed

CPU = torch.device("cpu")
PROMPT = list(range(20, 40))
LENGTH = 24


def loaded(name: str = "llama", **settings: Any) -> LoadedModel:
    return LoadedModel(tiny_model(name, **settings), tiny_tokenizer(), "Tiny", 0, 300, 256, CPU)


def perturbed(strength: float) -> LoadedModel:
    model = loaded()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn_like(parameter) * strength)
    return model


class Scripted(Drafter):
    """Proposes what it is told."""

    def __init__(self, proposals: list[list[int]]) -> None:
        super().__init__()
        self.proposals = iter(proposals)

    def propose(self, text: Any, count: int) -> list[int]:
        return next(self.proposals, [])


def greedy(model: LoadedModel, most: int = LENGTH) -> list[int]:
    made = model.model.generate(
        torch.tensor([PROMPT]), max_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_any_draft_gives_the_text_of_plain_generate(name: str, count: int) -> None:
    target = loaded(name)
    for drafter in (ModelDrafter(loaded(name)), ModelDrafter(loaded("llama", seed=5)), LookupDrafter()):
        with use_route(choose_route("mkl", CPU)):
            found = decode_speculatively(target, drafter, PROMPT, count, LENGTH, frozenset())
        assert found.tokens == greedy(target)


def test_an_identical_draft_is_accepted_whole_and_another_in_part() -> None:
    with use_route(choose_route("mkl", CPU)):
        same = decode_speculatively(loaded(), ModelDrafter(loaded()), PROMPT, 3, LENGTH, frozenset())
        near = decode_speculatively(loaded(), ModelDrafter(perturbed(0.03)), PROMPT, 3, LENGTH, frozenset())
    assert same.accepted == same.reached == [6, 6, 6]
    assert same.rounds == LENGTH // 4
    assert 0 < sum(near.accepted) < sum(near.reached)
    assert near.tokens == same.tokens


def test_the_account_of_scripted_drafts() -> None:
    """Right, right, wrong; wrong at once; nothing proposed: what stands behind a rejection is not judged."""
    target = loaded()
    text = greedy(target, 8)
    wrong = [(token + 1) % 300 for token in text]
    script = [[text[0], text[1], wrong[2]], [wrong[3], text[4], text[5]], [], [text[5], text[6], text[7]]]
    with use_route(choose_route("mkl", CPU)):
        found = decode_speculatively(target, Scripted(script), PROMPT, 3, 8, frozenset())
    assert found.tokens == text
    assert (found.rounds, found.drafted) == (4, 9)
    assert found.reached == [3, 2, 2]
    assert found.accepted == [2, 2, 1]


def test_nothing_follows_a_stop_token_within_a_draft() -> None:
    target = loaded()
    text = greedy(target, 8)
    stop = next(token for place, token in enumerate(text) if place >= 2 and token not in text[:place])
    end = text.index(stop) + 1
    with use_route(choose_route("mkl", CPU)):
        found = decode_speculatively(target, ModelDrafter(loaded()), PROMPT, 5, 8, frozenset([stop]))
    assert found.tokens == text[:end]
    assert sum(found.reached) <= end


def test_prompt_lookup_proposes_what_followed_before() -> None:
    assert LookupDrafter().propose([1, 2, 3, 4, 9, 1, 2, 3], 2) == [4, 9]
    assert LookupDrafter().propose([1, 2, 3], 2) == []


def test_a_machine_that_is_held_up_once_does_not_move_the_speed_up() -> None:
    references = [Greedy([1] * 10, seconds=seconds) for seconds in (10.0, 10.0, 500.0, 12.0, 10.0)]
    texts = [Speculated([1] * 10, seconds=seconds) for seconds in (5.0, 5.0, 5.0, 6.0, 400.0)]
    assert speedup(texts, references) == pytest.approx(2.0)


def test_the_formula_is_the_published_one() -> None:
    # Leviathan et al. 2023, table 1: α = 0.8, γ = 5, c = 0.05 … expected tokens 3.69 over 1.25 units of time
    assert predicted_speedup(0.8, 5, 0.05) == pytest.approx((1 - 0.8**6) / 0.2 / 1.25)
    assert predicted_speedup(1.0, 4, 0.1) == pytest.approx(5 / 1.4)
    assert predicted_speedup(0.0, 4, 0.1) == pytest.approx(1 / 1.4)
    assert predicted_speedup(0.5, 2, 0.0, 1.5) == pytest.approx(1.75 / 1.5)


def test_it_says_plainly_when_nothing_pays() -> None:
    def speed(method: str, factor: float) -> SpeculationSpeed:
        return SpeculationSpeed(
            method=method,
            draft_tokens=4,
            tokens_per_second=1,
            speedup=factor,
            draft_cost=0.5,
            verify_cost=None,
            predicted=None,
            predicted_with_verify=None,
        )

    assert recommend([speed("draft", 0.6), speed("lookup", 1.02)])[0] is False
    assert "does not pay" in recommend([speed("draft", 0.6), speed("lookup", 1.02)])[1]
    assert recommend([speed("draft", 1.6), speed("lookup", 1.2)]) == (
        True,
        "use the draft model with 4 tokens: 1.60 times as fast",
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculate")
    save_base(folder / "target", dtype=torch.float32)
    save_base(folder / "draft", dtype=torch.float32, num_hidden_layers=1)
    # Rows of the embedding beyond the tokenizer's, as larger models of a family have.
    save_base(folder / "padded", dtype=torch.float32, vocab_size=320)
    rows = [json.dumps(row) + "\n" for row in tiny_rows(3)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    return folder


SMALL = SpeculateOptions(draft_tokens=(2, 4), max_new_tokens=10)


def test_the_record_holds_every_way_and_every_benchmark(place: Path, tmp_path: Path) -> None:
    record, timing = speculate(
        place / "target",
        place / "prompts.jsonl",
        draft=place / "draft",
        output=tmp_path / "s.json",
        options=SMALL,
    )
    ways = [(setting.method, setting.draft_tokens) for setting in record.settings]
    assert ways == [("draft", 2), ("draft", 4), ("lookup", 2), ("lookup", 4)]
    for setting in record.settings:
        assert (setting.equal + setting.ties, setting.different) == (3, 0)
        assert set(setting.by_source) == {"alpha", "beta", "gamma"}
        assert setting.overall.tokens == sum(part.tokens for part in setting.by_source.values())
        assert len(setting.overall.by_position) == setting.draft_tokens
    assert record.noise < 1e-3
    assert len(timing.speeds) == 4
    written = SpeculationRecord.from_json((tmp_path / "s.json").read_bytes(), "s.json")
    assert written == record
    assert (tmp_path / "s.timing.json").exists()


def test_padding_of_the_embedding_is_no_other_tokenizer(place: Path) -> None:
    for target, draft in (("padded", "draft"), ("draft", "padded")):
        record, _ = speculate(place / target, place / "prompts.jsonl", draft=place / draft, options=SMALL)
        assert all(setting.different == 0 for setting in record.settings)


def test_a_wrong_decoding_is_found(place: Path) -> None:
    """A loop that believes its drafts gives another text, by margins no noise explains."""
    real = loop.ModelDrafter.propose

    def rounds(target: Any, drafter: Any, prompt: Any, count: int, limit: int, stop: Any) -> Any:
        text = [*prompt, *real(drafter, prompt, limit)] if isinstance(drafter, ModelDrafter) else prompt
        logits = torch.zeros(limit, 300)
        yield text[len(prompt) :], logits, text[len(prompt) :][:count], count, 0.0

    with patch.object(loop, "rounds", rounds):
        record, _ = speculate(place / "target", place / "prompts.jsonl", draft=place / "draft", options=SMALL)
    assert record.settings[0].different == 3


def test_a_draft_with_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "other", chat=False)
    with pytest.raises(UsageError, match="another tokenizer") as raised:
        other = tiny_tokenizer()
        other.add_tokens(["<|more|>"])
        require_same_tokenizer(tiny_tokenizer(), other, tmp_path / "other")
    assert "--from-target" in str(raised.value)
    require_same_tokenizer(tiny_tokenizer(), tiny_tokenizer(chat=False), tmp_path)


def test_rows_that_are_left_out_are_told(place: Path, tmp_path: Path) -> None:
    rows = [*tiny_rows(2), {"text": "x"}, {"prompt": "word " * 100}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record, _ = speculate(place / "target", tmp_path / "p.jsonl", options=SMALL)
    assert record.settings[0].overall.prompts == 2
    assert [finding.code for finding in record.findings] == ["no-prompt", "no-room"]


def test_wrong_input_is_refused(place: Path, tmp_path: Path) -> None:
    for options in ({"draft_tokens": (0,)}, {"draft_tokens": ()}, {"max_new_tokens": 0}, {"limit": 0}):
        with pytest.raises(UsageError):
            speculate(place / "target", place / "prompts.jsonl", **options)
    with pytest.raises(DataError, match="no prompt leaves room"):
        speculate(place / "target", place / "prompts.jsonl", max_new_tokens=250)


def test_the_command_as_typed(place: Path, here: Typed) -> None:
    command: list[object] = ["speculate", "--target", place / "target", "--draft", place / "draft"]
    command += ["--prompts", place / "prompts.jsonl", "--draft-tokens", "3", "--max-new-tokens", "6"]
    done = here(*command)
    assert done.returncode == 0, done.stderr
    assert "Recommendation: " in done.stdout
    assert "α by source" in done.stdout

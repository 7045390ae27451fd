"""rank_pattern and alpha_pattern are expressions taken on trust: none may hang the merge or the proof."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorasmith
from lorasmith.checkpoint import patterns as ours
from lorasmith.checkpoint.patterns import Patterns, require_quick
from lorasmith.errors import AdapterError
from lorasmith.files.jsonl import write_rows
from lorasmith.proving.weights import adapter as proof
from tests.tiny import save_adapter, save_base, tiny_rows

HERE = Path("adapter_config.json")
EVIL = [
    r"(a+)+$",
    r"((\w+)+)+!",
    r"(.*)*(.*)*(.*)*x!",
    r"(\w|\w|\w)*!",
    r"(.|\w)+\.(.|\w)+\.(.|\w)+!",
    r"(?:(?:\w+\.?)+)+!",
    r"(x?){40}(_|p|r|o|j|q|\.|s|e|l|f|a|t|n|m|d|y|k|i|u|w|g|v|\d)*!",
]
"""Each takes Python's matcher exponential or very high polynomial time on some module path."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_adapter(folder / "adapter", save_base(folder / "base"))
    lorasmith.merge(folder / "base", folder / "adapter", folder / "merged")
    return folder


def with_patterns(inputs: Path, folder: Path, **fields: Any) -> Path:
    adapter = Path(shutil.copytree(inputs / "adapter", folder / "adapter"))
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return adapter


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", EVIL)
def test_an_evil_pattern_is_decided_or_refused_in_time(
    inputs: Path, tmp_path: Path, field: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The limits themselves are seconds; shorter ones keep the test short.
    monkeypatch.setattr(ours, "SECONDS", 0.3)
    monkeypatch.setattr(proof, "SECONDS", 0.6)
    adapter = with_patterns(inputs, tmp_path, **{field: {pattern: 4, "nothing": 4}})
    for work in (
        lambda: lorasmith.merge(inputs / "base", adapter, tmp_path / "merged"),
        lambda: lorasmith.prove(inputs / "base", adapter, inputs / "merged"),
    ):
        began = time.monotonic()
        try:
            work()  # no module ends in "!": where the matcher finds that out in time, nothing is wrong
        except AdapterError as error:
            assert field in error.found and pattern[:10] in error.found
            assert error.exit_code == 2
        assert time.monotonic() - began < 30


def test_both_give_up_on_what_takes_ages(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, name = r"(\w|\w\w)*!", "model.layers.0." + "q" * 60
    monkeypatch.setattr(proof, "SECONDS", 0.5)
    with pytest.raises(proof.PatternError, match="take longer than"):
        proof.first_fitting([slow], [name])
    monkeypatch.setattr(ours, "SECONDS", 0.3)
    found = Patterns({slow: 4}, "rank_pattern", HERE)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(AdapterError, match="takes too long"):
            found.of(name, 8)
    assert time.monotonic() - began < 60  # without a limit it would take years


def test_the_time_is_for_all_modules_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone is quick enough."""
    monkeypatch.setattr(ours, "SECONDS", 0.4)
    found = Patterns({r"(\w|\w\w)*!": 4}, "rank_pattern", HERE)
    began = time.monotonic()
    with pytest.raises(AdapterError, match="takes too long"):
        for number in range(10_000):
            found.of(f"{number}." + "q" * 20, 8)
    assert time.monotonic() - began < 60  # without a limit it would take years


IN_PEFT: list[tuple[str, Any]] = [
    ("rank_pattern", {"(": 4, EVIL[5]: 4}),
    ("alpha_pattern", {EVIL[5]: 4}),
    ("target_modules", EVIL[5]),
    ("target_modules", ["q_proj", EVIL[5]]),
    ("exclude_modules", EVIL[5]),
    ("modules_to_save", [EVIL[5], "("]),
    ("layers_pattern", EVIL[5]),
    ("layers_pattern", ["blocks", EVIL[5]]),
]
"""Each field whose texts PEFT takes as expressions, as a text or in a list."""


@pytest.mark.parametrize(("field", "value"), IN_PEFT)
def test_what_peft_would_match_for_ages_is_refused_before_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    monkeypatch.setattr(ours, "SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(AdapterError, match=f"matching the adapter's {field} takes too long"):
        require_quick({field: value}, ["lm_head", "model.layers.0." + "q" * 60], HERE)
    assert time.monotonic() - began < 60  # without a limit it would take years


def test_every_command_that_lets_peft_match_asks_first(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "SECONDS", 0.3)
    slow = r"(x?){40}(_|p|r|o|j|q|\.|s|e|l|f|a|t|n|m|d|y|k|i|u|w|g|v|\d|\w|.)*(\w|.|\w|.)*!"
    adapter = with_patterns(inputs, tmp_path, modules_to_save=[slow])
    write_rows(tmp_path / "test.jsonl", tiny_rows(2))
    with pytest.raises(AdapterError, match="modules_to_save takes too long"):
        lorasmith.validate(inputs / "base", tmp_path / "test.jsonl", tmp_path / "out", adapter=adapter)


@pytest.mark.parametrize("value", [["q_proj", "v_proj"], r".*\.layers\.\d+\..*_proj", "all-linear"])
def test_honest_targets_are_quick(value: Any) -> None:
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(200)]
    require_quick({"target_modules": value, "layers_pattern": "layers", "exclude_modules": None}, names, HERE)


def test_the_other_process_ends_with_the_patterns() -> None:
    found = Patterns({"(q|k)_proj": 4}, "rank_pattern", HERE)
    assert found.of("a.k_proj", 8) == 4
    assert found._other is not None
    process = found._other._process
    assert process.poll() is None
    del found
    assert process.poll() is not None


@pytest.mark.parametrize(
    "pattern", ["(", "(?i)q_proj", "a{99999999999}", "a?" * 1001, "(" * 5000 + ")" * 5000, "*"]
)
def test_what_is_no_pattern_is_refused(inputs: Path, tmp_path: Path, pattern: str) -> None:
    adapter = with_patterns(inputs, tmp_path, rank_pattern={pattern: 4})
    with pytest.raises(AdapterError, match="rank_pattern") as caught:
        lorasmith.merge(inputs / "base", adapter, tmp_path / "merged")
    assert caught.value.exit_code == 2


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(AdapterError, match="60,000 patterns"):
        Patterns({f"m{number}": 4 for number in range(60_000)}, "rank_pattern", HERE)


PARTS = st.sampled_from(
    ["q_proj", "layers", ".", r"\.", "0", r"\d+", "1", ".*", "(q|v)_proj", "[qv]", "_proj", "self_attn", "x?"]
)
NAMES = st.lists(st.sampled_from(["model", "layers", "0", "1", "10", "self_attn", "q_proj", "v_proj", "x"]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(PARTS, max_size=5).map("".join), max_size=4, unique=True), NAMES.map(".".join))
def test_both_find_what_peft_finds(patterns: list[str], module: str) -> None:
    """`get_pattern_key` of peft.utils is `re.match(rf"(.*\\.)?({key})$", name)`, the first that fits."""
    expected = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    values = {key: place for place, key in enumerate(patterns)}
    found = Patterns(values, "rank_pattern", HERE).of(module, -1)
    assert found == (-1 if expected is None else values[expected])


@pytest.mark.parametrize(
    "module", ["model.layers.1.self_attn.q_proj", "model.layers.10.q_proj", "q_proj", ""]
)
def test_the_proofs_process_finds_what_peft_finds(module: str) -> None:
    patterns = ["q.proj", r"layers\.1\..*", "(q|k)_proj", ".*"]
    for count in range(len(patterns)):
        asked = patterns[count:]
        expected = next((key for key in asked if re.match(rf"(.*\.)?({key})$", module)), None)
        assert proof.first_fitting(asked, [module, "other"])[module] == expected


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_loading_an_adapter_for_validation_does_not_hang_either(
    inputs: Path, tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT itself would match the expression, without any limit."""
    from lorasmith.models.load import load_model

    monkeypatch.setattr(ours, "SECONDS", 0.3)
    slow = r"(?:(?:\w+\.?)+)+!"
    adapter = with_patterns(inputs, tmp_path, **{field: {slow: 4} if "pattern" in field else slow})
    with pytest.raises(AdapterError, match=f"{field} takes too long"):
        load_model(inputs / "base", adapter=adapter)


def test_honest_expressions_load(inputs: Path, tmp_path: Path) -> None:
    from lorasmith.models.load import load_model

    every = r".*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
    adapter = with_patterns(inputs, tmp_path, target_modules=every, rank_pattern={r".*\.[kv]_proj": 4})
    assert load_model(inputs / "base", adapter=adapter).parameters > 0

"""What every benchmark of the registry must do; one without a case file fails here."""

from __future__ import annotations

import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorasmith.benchmarks.base import Benchmark, Item, RowError, SourceRow, Unscored
from lorasmith.benchmarks.registry import BENCHMARKS, by_name, choose
from lorasmith.benchmarks.sandbox import run
from lorasmith.errors import UsageError
from lorasmith.records.dataset import Example, Metadata
from lorasmith.records.release import is_redacted
from tests.benchmarks.layouts import case_file, layout, rows_of

LAYOUTS = [
    pytest.param(benchmark, shape, id=f"{benchmark.name}: {shape['name']}")
    for benchmark in BENCHMARKS
    for shape in case_file(benchmark.name)["layouts"]
]


def entries(kind: str) -> list[Any]:
    return [
        pytest.param(benchmark, entry, id=f"{benchmark.name}: {entry.get('why') or entry.get('reason')}")
        for benchmark in BENCHMARKS
        for entry in case_file(benchmark.name)[kind]
    ]


def example(benchmark: Benchmark, item: Item) -> Example:
    metadata = Metadata.model_validate({"source": benchmark.name, **item.extra})
    return Example(id=item.record_id, prompt=item.prompt, response=item.response, metadata=metadata)


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    name = str(request.node.name)
    if ("HumanEval" in name or "MBPP" in name) and "score" in name and run.refusal():
        pytest.skip(run.refusal())
    if "MATH" in name and "score" in name:
        pytest.importorskip("math_verify")
    if "language:" in name or "english_" in name:
        pytest.importorskip("py3langid")


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_it_is_one_file_that_names_its_source(benchmark: Benchmark) -> None:
    module = inspect.getmodule(type(benchmark))
    assert module is not None and module.__doc__ is not None
    assert (
        "Source:" in module.__doc__
        and benchmark.licence
        and benchmark.columns
        and benchmark.source.startswith("https://")
    )
    assert [type(other) for other in BENCHMARKS].count(type(benchmark)) == 1
    cases = case_file(benchmark.name)
    assert cases["about"] and cases["answers"] and cases["rejected"] and cases["foreign"]


@pytest.mark.parametrize(("benchmark", "shape"), LAYOUTS)
def test_a_layout_is_recognised_by_its_own_benchmark_alone(
    benchmark: Benchmark, shape: dict[str, Any], tmp_path: Path
) -> None:
    rows = rows_of(tmp_path, shape, benchmark)
    assert rows
    for row in rows:
        assert [other.name for other in BENCHMARKS if other.recognises(row)] == [benchmark.name]


@pytest.mark.parametrize(("benchmark", "shape"), LAYOUTS)
def test_a_layout_becomes_whole_items_the_same_each_time(
    benchmark: Benchmark, shape: dict[str, Any], tmp_path: Path
) -> None:
    rows = rows_of(tmp_path, shape, benchmark)
    items = [benchmark.read(row, seed=42) for row in rows]
    assert items == [benchmark.read(row, seed=42) for row in rows]
    assert len({item.record_id for item in items}) == len(items)
    for item in items:
        assert item.prompt.strip() and item.response.strip() and item.question.strip()
        level, field = benchmark.guide_difficulty(item)
        assert level in ("easy", "medium", "hard") and field
        assert item.extra.get("private", False) is benchmark.private


@pytest.mark.parametrize(("benchmark", "shape"), LAYOUTS)
def test_the_gold_answer_scores_one(benchmark: Benchmark, shape: dict[str, Any], tmp_path: Path) -> None:
    for row in rows_of(tmp_path, shape, benchmark):
        made = example(benchmark, benchmark.read(row, seed=42))
        assert made.has_reference is benchmark.references
        if not benchmark.references:
            continue
        if "unscored" in shape:
            with pytest.raises(Unscored, match=shape["unscored"]):
                benchmark.score(made, made.response)
        else:
            assert set(benchmark.score(made, made.response).values()) == {1.0}


@pytest.mark.parametrize(("benchmark", "entry"), entries("answers"))
def test_answers_score_as_the_reference(benchmark: Benchmark, entry: dict[str, Any], tmp_path: Path) -> None:
    row = rows_of(tmp_path, layout(benchmark.name, entry["layout"]), benchmark)[entry["row"]]
    made = example(benchmark, benchmark.read(row, seed=42))
    assert benchmark.score(made, entry["answer"]) == pytest.approx(entry["scores"])


WRONG: list[Any] = [None, 5, [], {}, [5], [[5]], [[]], [None] * 4, {"a": ["b"]}]


@pytest.mark.parametrize(("benchmark", "shape"), LAYOUTS)
def test_a_row_whose_metadata_was_made_by_hand_stops_nothing(
    benchmark: Benchmark, shape: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever a field that the benchmark added holds, or where it is missing: a verdict or `Unscored`."""
    item = benchmark.read(rows_of(tmp_path, shape, benchmark)[0], seed=42)
    whole = example(benchmark, item)
    assert benchmark.fault(whole) == ""
    metadata = whole.metadata.model_dump()
    for name in item.extra:
        damaged = [{**metadata, name: wrong} for wrong in WRONG]
        damaged.append({key: value for key, value in metadata.items() if key != name})
        for fields in damaged:
            row = whole.model_copy(update={"metadata": Metadata.model_validate(fields)})
            with suppress(Unscored):
                assert all(0.0 <= value <= 1.0 for value in benchmark.score(row, "7").values())
                assert benchmark.fault(row) == "" and name not in benchmark.needs


@pytest.mark.parametrize(("benchmark", "shape"), LAYOUTS)
def test_an_empty_answer_is_wrong(benchmark: Benchmark, shape: dict[str, Any], tmp_path: Path) -> None:
    """Under every metric of the benchmark: else one right answer and 99 blank ones would be a rate of 1."""
    row = example(benchmark, benchmark.read(rows_of(tmp_path, shape, benchmark)[0], seed=42))
    if benchmark.answered_by == "text":
        assert benchmark.score(row, " \n") == dict.fromkeys(benchmark.metrics, 0.0)
        with suppress(Unscored):  # a machine without a sandbox has no verdict
            assert set(benchmark.score(row, "x")) == set(benchmark.metrics)


@pytest.mark.parametrize(("benchmark", "entry"), entries("rejected"))
def test_unusable_rows_are_refused_without_being_quoted(benchmark: Benchmark, entry: dict[str, Any]) -> None:
    row = SourceRow("rows.jsonl", 1, entry["row"])
    assert benchmark.recognises(row)
    with pytest.raises(RowError) as caught:
        benchmark.read(row, seed=42)
    assert entry["reason"] in str(caught.value)
    texts = [value for value in entry["row"].values() if isinstance(value, str) and len(value) > 12]
    assert not any(text in str(caught.value) for text in texts)


@pytest.mark.parametrize(("benchmark", "entry"), entries("foreign"))
def test_other_sets_are_not_taken_for_it(benchmark: Benchmark, entry: dict[str, Any]) -> None:
    assert not benchmark.recognises(SourceRow(entry.get("file", "data.jsonl"), 1, entry["row"]))


def test_every_case_file_belongs_to_a_benchmark() -> None:
    folder = Path(__file__).parents[1] / "cases" / "benchmarks"
    assert {path.stem for path in folder.glob("*.json")} == {b.name.lower() for b in BENCHMARKS}


def test_texts_that_may_not_appear_are_hidden_by_name() -> None:
    """Reports and packages go by the source's name, and by nothing else."""
    assert {b.name for b in BENCHMARKS if b.private} == {b.name for b in BENCHMARKS if is_redacted(b.name)}


def test_gpqa_choices_stand_in_an_order_of_seed_and_row() -> None:
    source = layout("GPQA", "csv")["rows"][0]
    rows = [SourceRow("gpqa.csv", n, {**source, "Record ID": f"rec{n}"}) for n in range(200)]
    letters = [by_name("GPQA").read(row, seed=1).response for row in rows]
    # 200 draws of four letters: each 50 times on average, 30 to 70 but for a chance of 1 in 1000.
    assert all(30 <= letters.count(letter) <= 70 for letter in "ABCD")
    assert letters != [by_name("GPQA").read(row, seed=2).response for row in rows]
    item = by_name("GPQA").read(rows[0], seed=1)
    assert item.extra["choices"]["ABCD".index(item.response)] == source["Correct Answer"]
    assert f"{item.response}. {source['Correct Answer']}" in item.prompt.splitlines()


def test_names_are_found_in_any_case_and_unknown_ones_refused() -> None:
    assert by_name(" humaneval ").name == "HumanEval"
    assert [found.name for found in choose(["mmlu", "Drop"])] == ["DROP", "MMLU"]
    with pytest.raises(UsageError, match="DROP, GPQA, HumanEval, MATH, MMLU, ARC, "):
        by_name("CommonsenseQA")

"""Scores of wrong and near-right answers are those of the reference scorers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from lorasmith.benchmarks import ifeval, maths, maths_final
from lorasmith.benchmarks.base import Unscored
from lorasmith.benchmarks.choices import judge_letter, judge_likelihoods, read_letter
from lorasmith.benchmarks.drop import best_pairs, score, spans_score, stated
from lorasmith.benchmarks.gsm8k import final_number
from lorasmith.benchmarks.mbpp import code_of
from lorasmith.records.dataset import Example, Metadata

CASES = Path(__file__).parents[1] / "cases"


def cases(name: str) -> list[Any]:
    listed = json.loads((CASES / f"{name}.json").read_text())["cases"]
    return [pytest.param(case, id=case["why"]) for case in listed]


@pytest.mark.parametrize("case", cases("drop_metric"))
def test_drop_scores_as_the_reference(case: dict[str, Any]) -> None:
    assert spans_score(case["predicted"], case["gold"]) == (case["exact_match"], case["f1"])


def test_drop_takes_the_best_of_all_golds() -> None:
    assert score("17 August", [["17 August"], ["August"], ["17"]]) == {"exact_match": 1.0, "f1": 1.0}
    assert score("span1", [["span1", "span2"], ["span2"]]) == {"exact_match": 0.0, "f1": 0.5}
    assert score("answer", [["answer1"], ["answer2"]]) == {"exact_match": 0.0, "f1": 0.0}


def test_drop_reads_several_spans_between_semicolons_from_the_first_line() -> None:
    assert score("packers; bears\nQuestion: more", [["bears", "packers"]])["exact_match"] == 1.0
    assert score("5,734", [["5,734"]])["exact_match"] == 1.0


def test_the_best_pairing_is_the_best_of_all_pairings() -> None:
    draw = random.Random(0)
    for _ in range(200):
        rows, columns = draw.randint(1, 5), draw.randint(1, 5)
        table = [[draw.choice([0, 0.5, 1, draw.random()]) for _ in range(columns)] for _ in range(rows)]
        found = best_pairs(table)
        assert len({row for row, _ in found}) == len({c for _, c in found}) == min(rows, columns)
        turned = table if rows <= columns else [list(column) for column in zip(*table, strict=True)]
        best = max(
            sum(turned[row][column] for row, column in enumerate(order))
            for order in permutations(range(max(rows, columns)), min(rows, columns))
        )
        assert sum(table[row][column] for row, column in found) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("case", cases("math"))
def test_math_answers(case: dict[str, Any]) -> None:
    pytest.importorskip("math_verify")
    assert float(maths.equal(case["gold"], case["answer"])) == case["accuracy"]


def test_math_gold_against_gold_is_right_even_where_math_verify_cannot_read_it() -> None:
    for final in (r"\text{(A), (C)}", r"\spadesuit", r"x = 3 \text{ or } y", r"1,2,\ldots"):
        assert maths.equal(final, f"Hence $\\boxed{{{final}}}$.")


def test_math_has_a_time_limit_and_goes_on_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    worker = maths._Worker()
    try:
        told = worker.ask({"gold": r"\boxed{2}", "answer": "$9^{9^{9^{9}}}$"}, seconds=0.5)
        assert told == {"verdict": None, "reason": "math-verify gave no verdict within 0.5 s"}
        assert worker.ask({"gold": r"\boxed{2}", "answer": "$1+1$"}) == {"verdict": True}
    finally:
        worker.stop()


@pytest.mark.parametrize(
    "said", ["[" * 60000, "7", '{"other": 1}', '{"verdict": ', "words of a library"], ids=range(5)
)
def test_what_is_no_verdict_leaves_the_answer_unscored(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = maths._Worker()
    stub = f"import sys; print('ready', flush=True); sys.stdin.readline(); print({said!r}, flush=True)"
    monkeypatch.setattr(maths.subprocess, "Popen", partial(_stub, subprocess.Popen, stub))
    monkeypatch.setattr(maths, "_worker", lambda: worker)
    try:
        with pytest.raises(Unscored, match="something other than a verdict"):
            maths.equal("1", "2")
    finally:
        worker.stop()


def _stub(popen: Any, program: str, command: list[str], **options: Any) -> Any:
    return popen([sys.executable, "-c", program], **options)


def test_math_works_off_the_main_thread() -> None:
    import threading

    pytest.importorskip("math_verify")
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(maths.equal("4", "2+2 = $4$")))
    thread.start()
    thread.join()
    assert found == [True]


EQUAL = [
    ("1010_2", r"\boxed{1010_{2}}"),
    ("1010_2", r"In base 2 it is \boxed{1010}."),
    ("52", r"\boxed{52_{10}}"),
    ("10,000", r"\boxed{10000}"),
    ("10000", r"\boxed{10{,}000}"),
    ("1,2", r"\boxed{2, 1}"),
    (r"\frac{\pi}{4}", r"\boxed{\frac\pi4}"),
    (r"\frac{\pi}{4}", r"\boxed{π/4}"),
    (r"90^\circ", r"\boxed{90}"),
    ("90", r"\boxed{90°}"),
    ("-3", r"\boxed{−3}"),
    (r"50\%", r"\boxed{50}"),
    (r"\text{A, C}", r"\boxed{C \text{ and } A}"),
    (r"\text{B}", r"\boxed{\textbf{B}}"),
    ("7", r"\boxed{7.}"),
    ("7", "So the answer is 7."),
    (r"\$5", r"\boxed{5}"),
    (r"\sqrt{3}", r"\boxed{√3}"),
    (r"\frac12", r"\boxed{½}"),
    # Neither boxed nor stated: an answer that is one expression, else the last expression of its prose.
    ("32_5", "$32_{5}$"),
    ("32_5", "32"),
    ("32_5", "So we get $17 = 32_5$."),
    ("32_5", "It is 32 in base five."),
    ("32_5", r"\boxed{32_{\text{five}}}"),
    ("32", "32_{10}"),
    (r"2\sqrt{3}", "2√3"),
    (r"2\sqrt{3}", r"So we get 2\sqrt{3}."),
    (r"\frac{\pi}{4}", r"$\frac\pi4$"),
    (r"90^\circ", "90°"),
    ("10000", "It is 10,000."),
    ("5", "**5**"),
    ("5", "The value of $x$ is 5 cm."),
    ("3,-3", "x = 3 or x = -3"),
    (r"\text{A, C}", "C and A"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{June 5}", "The answer is June 5."),
    ("(2,5)", "It is the interval (2, 5)."),
    ("x^2+1", "So \\[f(x)\n= 1+x^2.\\]"),
]
UNEQUAL = [
    ("1010_2", r"\boxed{1010_3}"),
    ("52", r"\boxed{52_8}"),
    ("12", r"\boxed{1010_2}"),
    ("(1,234)", r"\boxed{1234}"),
    ("1,2", r"\boxed{12}"),
    (r"\text{A, C}", r"\boxed{A, B}"),
    ("(2,5)", r"\boxed{[2,5]}"),
    ("32_5", "32_6"),
    ("32_5", "$32_6$"),
    ("32_5", "So we get $17 = 32_6$."),
    ("32_5", "So 17 is 32 base 6."),
    ("32_5", r"\boxed{32_{\text{six}}}"),
    ("32_5", "17"),
    ("32_5", "I do not know."),
    ("32", "The number is 32_6."),
    ("33", "$32_6 + 1$"),
    ("326", "$32_6$"),
    ("3", r"So we get 2\sqrt{3}."),
    ("12", "1,2"),
]
VERDICTS = [*((*one, True) for one in EQUAL), *((*one, False) for one in UNEQUAL)]


@pytest.mark.parametrize(("final", "answer", "right"), VERDICTS)
def test_answers_in_math_that_are_only_written_otherwise(final: str, answer: str, right: bool) -> None:
    assert maths.equal(final, answer) is right


LOOPS = [
    r"\(",
    "$$",
    r"\boxed{",
    "answer is ",
    "1_",
    " ",
    "a and 1 ",
    "√(",
    "(",
    "*",
    "[",
    ".",
    "A. ",
    "\n",
    "<<",
]


@pytest.mark.parametrize("loop", LOOPS)
def test_no_answer_takes_long_to_read_however_it_is_made(loop: str) -> None:
    """Small models repeat themselves up to the limit of tokens, and many signs are one token."""
    answer = loop * (50_000 // len(loop)) + "x"
    began = time.process_time()
    maths_final.final_answers(answer)
    read_letter(answer, ["w", "x", "y", "z"])
    final_number(answer)
    score(stated(answer), [["5"]])
    ifeval.sentences(answer)
    ifeval._bullets(answer, num_bullets=1)
    ifeval._placeholders(answer, num_placeholders=1)
    ifeval._title(answer)
    code_of(answer)
    # Some 0.1 s together; a pattern that takes the square of the length takes 6 s and more.
    assert time.process_time() - began < 3


def test_an_answer_of_asterisks_is_wrong_in_drop() -> None:
    assert score(stated("****"), [["5"]]) == {"exact_match": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct option is B.", "B"),
        ("$B$", "B"),
        (r"\boxed{\textbf{B}}", "B"),
        (r"\boxed{\text{(A)}}", "A"),
        ("Correct answer: $C$", "C"),
        ("I think the correct choice is C", "C"),
        ("the answer is a force", None),
    ],
)
def test_letters_of_free_answers_are_read(answer: str, letter: str | None) -> None:
    assert read_letter(answer, ["w", "x", "y", "z"]) == letter


SENTENCES = ["5", "The answer is 5.", "**Answer:** 5", "It says three, then two.\nThe final answer is: 5."]


@pytest.mark.parametrize("answer", SENTENCES)
def test_drop_reads_answers_in_whole_sentences(answer: str) -> None:
    assert score(stated(answer), [["5"]]) == {"exact_match": 1.0, "f1": 1.0}


def test_a_math_reference_that_nobody_can_read_is_unscored() -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(Unscored, match="reference answer"):
        maths.equal("", r"\boxed{3}")


@pytest.mark.parametrize(
    ("solution", "final"),
    [
        (r"so $\boxed{32}$.", "32"),
        (r"$\boxed{1}$ then $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"$\boxed{\{1,2\}}$", r"\{1,2\}"),
        (r"$\fbox{7}$", "7"),
        (r"$\boxed 5$", "5"),
        (r"no box", None),
        (r"cut off \boxed{1 + {2}", None),
        (r"\boxed{}", None),
    ],
)
def test_the_last_box_is_found(solution: str, final: str | None) -> None:
    assert maths_final.last_boxed(solution) == final


def choice_example() -> Example:
    listed = json.loads((CASES / "choices.json").read_text())
    extra = {"choices": listed["choices"], "answer": listed["right"]}
    metadata = Metadata.model_validate({"source": "MMLU", **extra})
    return Example(id="x", prompt="p", response="B", metadata=metadata)


@pytest.mark.parametrize("case", cases("choices"))
def test_letters_are_read(case: dict[str, Any]) -> None:
    assert judge_letter(choice_example(), case["answer"]) == {"accuracy": case["accuracy"]}


def test_the_likeliest_letter_counts_and_the_first_of_equals() -> None:
    assert judge_likelihoods(choice_example(), [-3.0, -1.0, -2.0, -4.0]) == {"accuracy": 1.0}
    assert judge_likelihoods(choice_example(), [-1.0, -1.0, -2.0, -4.0]) == {"accuracy": 0.0}


def test_a_row_without_choices_is_unscored() -> None:
    bare = Example(id="x", prompt="p", response="r", metadata=Metadata(source="GPQA"))
    with pytest.raises(Unscored, match="no choices"):
        judge_letter(bare, "A")


@pytest.mark.parametrize("answer", ["hm", "A unit of force", "the answer is a newton", "Because", "An A"])
def test_prose_names_no_letter(answer: str) -> None:
    assert read_letter(answer, ["Joule", "Newton", "Watt", "Pascal"]) is None

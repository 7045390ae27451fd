"""Contamination is found in its three kinds, against plain reference implementations of each."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lorasmith.data.rows import read_examples
from lorasmith.errors import DataError, UsageError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.records.dataset import ContaminationRecord, DatasetStatistics
from lorasmith.testset.check import check
from lorasmith.testset.overlap import jaccard, repeats, shingles
from lorasmith.testset.rows import describe

VOCABULARY = [f"word{number}" for number in range(2000)]


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(VOCABULARY, k=words))


def write(path: Path, rows: list[tuple[str, str]], prefix: str) -> Path:
    made = [
        {"id": f"{prefix}{n}", "prompt": prompt, "response": response}
        for n, (prompt, response) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture
def clean(tmp_path: Path) -> tuple[Path, Path, list[tuple[str, str]], list[tuple[str, str]]]:
    draw = random.Random(0)
    test = [(text(draw, 40), text(draw, 20)) for _ in range(30)]
    train = [(text(draw, 60), text(draw, 30)) for _ in range(300)]
    return tmp_path / "test.jsonl", tmp_path / "train.jsonl", test, train


def run(clean: Any, train: list[tuple[str, str]], **options: Any) -> ContaminationRecord:
    test_path, train_path, test, _ = clean
    write(test_path, test, "t")
    write(train_path, train, "r")
    return check(test_path, [train_path], test_path.parent / "contamination.json", **options)


def kinds(record: ContaminationRecord) -> set[tuple[str, str, str]]:
    return {(hit.kind, hit.test_id, hit.train_id) for hit in record.hits}


def test_unrelated_data_is_independent(clean: Any) -> None:
    record = run(clean, clean[3])
    assert record.verdict == "independent" and record.hits == []
    assert record.counts == {"exact": 0, "question": 0, "ngram": 0, "near": 0, "test_rows": 0}
    assert (record.rows_test, record.rows_train) == (30, 300)
    path = clean[0].parent / "contamination.json"
    assert read_record(path, ContaminationRecord) == record


def test_an_exact_copy_but_for_case_and_spacing_is_found(clean: Any) -> None:
    prompt, response = clean[2][4]
    record = run(clean, [*clean[3], (f"  {prompt.upper()}\n", "another answer")])
    assert record.verdict == "contaminated"
    assert ("exact", "t4", "r300") in kinds(record)
    assert "1 of 30 test rows" in record.reason
    split_otherwise = run(clean, [*clean[3], (f"{prompt} {response.split()[0]}", response.split(" ", 1)[1])])
    assert ("exact", "t4", "r300") in kinds(split_otherwise)


def test_a_run_of_13_words_is_found_and_one_of_12_is_not(clean: Any) -> None:
    prompt, _ = clean[2][7]
    words = prompt.split()
    hidden = run(clean, [*clean[3], ("before it all", " ".join(words[10:23]) + " and after")])
    assert kinds(hidden) == {("ngram", "t7", "r300")}
    # 40 words of the prompt and 20 of the answer make 28 + 8 different 13-grams; one of them is shared.
    assert hidden.hits[0].score == pytest.approx(1 / 36, abs=1e-6)
    # That little is told, and is no verdict; from the share that is asked for on it is one.
    assert hidden.verdict == "independent" and hidden.counts["test_rows"] == 0
    train = [*clean[3], ("before it all", " ".join(words[10:23]) + " and after")]
    assert run(clean, train, share=0.02).verdict == "contaminated"
    shorter = run(clean, [*clean[3], ("before it all", " ".join(words[10:22]) + " and after")])
    assert shorter.verdict == "independent"
    wider = run(clean, [*clean[3], ("before", " ".join(words[10:22]) + " after")], ngram=12)
    assert kinds(wider) == {("ngram", "t7", "r300")}


def test_a_run_never_crosses_from_one_row_to_the_next(clean: Any) -> None:
    words = clean[2][7][0].split()
    record = run(clean, [("a", " ".join(words[:7])), (" ".join(words[7:14]), "b")])
    assert record.verdict == "independent"


def test_short_questions_are_looked_for_as_a_whole(clean: Any) -> None:
    clean[2][0] = ("one two three four five six", "seven eight nine ten")
    clean[2][1] = ("tiny row", "yes")
    long = "so one two, three four five six: seven eight nine ten and on it goes"
    record = run(clean, [*clean[3], (long, "x"), ("this tiny row yes is here", "x")])
    assert ("question", "t0", "r300") in kinds(record)
    assert all(hit.test_id != "t1" for hit in record.hits)


def choices_row(question: str, choices: tuple[str, ...] = ("one", "two", "three", "four")) -> dict[str, Any]:
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
    metadata = {"source": "MMLU", "choices": list(choices), "answer": "A"}
    return {"prompt": f"{question}\n{listed}Answer:", "response": " A", "metadata": metadata}


def flagged(folder: Path, test: list[dict[str, Any]], train: list[str]) -> list[str]:
    rows = "".join(json.dumps({"id": f"t{number}", **row}) + "\n" for number, row in enumerate(test))
    (folder / "asked.jsonl").write_text(rows)
    write(folder / "train.jsonl", [(row, "I see.") for row in train], "r")
    record = check(folder / "asked.jsonl", [folder / "train.jsonl"])
    counted = {hit.test_id for hit in record.hits if record.is_verdict(hit)}
    assert len(counted) == record.counts["test_rows"]
    return sorted(counted)


@pytest.mark.parametrize(
    ("row", "asks"),
    [
        ("The auditory tube", True),
        ("Complete this: The auditory tube and be brief.", True),
        ("<|im_start|>user\nThe auditory tube<|im_end|>", True),
        ("He had pain in the auditory tube. These were the choices: drum, nose, canal, eye.", True),
        ("The auditory tube joins the ear and the throat.", False),
        ("I read of the auditory tube today.", False),
    ],
)
def test_a_question_of_three_words_is_found_where_it_is_asked(tmp_path: Path, row: str, asks: bool) -> None:
    asked = choices_row("The auditory tube", ("drum", "nose", "canal", "eye"))
    assert flagged(tmp_path, [asked], [row]) == (["t0"] if asks else [])


def test_the_beginning_of_a_longer_question_is_not_the_question(tmp_path: Path) -> None:
    asked = choices_row("Which of these is true?")
    assert flagged(tmp_path, [asked], ["Which of these is true of the joint between jaw and skull?"]) == []
    assert flagged(tmp_path, [asked], ["Tell me. Which of these is true?"]) == ["t0"]


def test_questions_that_differ_in_signs_of_arithmetic_are_different(tmp_path: Path) -> None:
    asked = choices_row(
        "Find the degree of the given field extension of Q(sqrt(2) + sqrt(3)) over Q, please."
    )
    other = "Find the degree of the given field extension of Q(sqrt(2), sqrt(3)) over Q, please."
    assert flagged(tmp_path, [asked], [other]) == []
    assert flagged(tmp_path, [asked], [other.replace(",", " +", 1)]) == ["t0"]
    emphasised = "Find the **degree** of the given field-extension of Q(sqrt(2) + sqrt(3)) over Q, please."
    assert flagged(tmp_path, [asked], [emphasised]) == ["t0"]


def test_a_pattern_that_two_questions_of_a_benchmark_fill_in_is_boilerplate(tmp_path: Path) -> None:
    pattern = "Which one of these many structural assumptions is the one that most affects the outcome of {}?"
    first, second = choices_row(pattern.format("kernels")), choices_row(pattern.format("trees"))
    assert flagged(tmp_path, [first], [pattern.format("networks")]) == ["t0"]
    assert flagged(tmp_path, [first, second], [pattern.format("networks")]) == []
    assert flagged(tmp_path, [first, second], [pattern.format("trees")]) == ["t1"]


def test_a_question_on_a_passage_counts_with_its_passage_only(tmp_path: Path) -> None:
    passage, question = text(random.Random(8), 60), "How many percent were not from the county?"
    row = {
        "prompt": f"Passage: {passage}\nQuestion: {question}\nAnswer:",
        "response": " 5",
        "metadata": {"source": "DROP", "golds": [["5"]]},
    }
    assert flagged(tmp_path, [row], [f"{text(random.Random(9), 60)} {question}"]) == []
    words = passage.split()
    # One run of 13 words is what a pattern of two articles shares; half of the passage is the passage.
    assert flagged(tmp_path, [row], [f"{' '.join(words[:13])} {question}"]) == []
    assert flagged(tmp_path, [row], [f"{' '.join(words[:30])} {question}"]) == ["t0"]


def test_a_near_duplicate_is_found_with_its_similarity(clean: Any) -> None:
    words = clean[2][9][0].split()
    changed = [*words]
    for place in (8, 9, 17, 26):
        changed[place] = "other"
    record = run(clean, [*clean[3], (" ".join(changed), "else")])
    near = [hit for hit in record.hits if hit.kind == "near"]
    assert near == []
    record = run(clean, [*clean[3], (" ".join([*words[:20], "other", *words[21:]]), "else")])
    [near_hit] = [hit for hit in record.hits if hit.kind == "near"]
    own = {tuple(words[k : k + 3]) for k in range(38)}
    other_words = [*words[:20], "other", *words[21:]]
    other = {tuple(other_words[k : k + 3]) for k in range(38)}
    assert near_hit.score == pytest.approx(len(own & other) / len(own | other), abs=1e-6)


def test_all_hits_are_those_of_plain_python(tmp_path: Path) -> None:
    """Random texts of few words, so that everything overlaps somewhere: compare with sets of tuples."""
    draw = random.Random(3)
    short = VOCABULARY[:12]

    def few(count: int) -> str:
        return " ".join(draw.choices(short, k=count))

    test = [(few(draw.randint(5, 30)), few(draw.randint(1, 9))) for _ in range(25)]
    train = [(few(draw.randint(5, 60)), few(draw.randint(1, 20))) for _ in range(200)]
    record = check(
        write(tmp_path / "test.jsonl", test, "t"),
        [write(tmp_path / "train.jsonl", train, "r")],
        ngram=4,
        shingle=2,
        similarity=0.15,
        common=10**6,
        generic=10**6,
    )
    question = ngram = near = exact = 0
    for prompt, response in test:
        parts = (prompt.split(), response.split())
        own_grams = {tuple(own[k : k + 4]) for own in parts for k in range(len(own) - 3)}
        own_shingles = {tuple(prompt.split()[k : k + 2]) for k in range(len(prompt.split()) - 1)}
        for other_prompt, other_response in train:
            other = (other_prompt + " " + other_response).split()
            ngram += bool(own_grams & {tuple(other[k : k + 4]) for k in range(len(other) - 3)})
            # A question stands in a row where all its runs do.
            runs = {tuple(parts[0][k : k + 4]) for k in range(len(parts[0]) - 3)}
            spelled = f" {' '.join(other)} "
            question += runs <= {tuple(other[k : k + 4]) for k in range(len(other) - 3)} and (
                len(parts[0]) > 5 or f" {prompt} " in spelled
            )
            words = other_prompt.split()
            other_shingles = {tuple(words[k : k + 2]) for k in range(len(words) - 1)}
            near += len(own_shingles & other_shingles) >= 0.15 * len(own_shingles | other_shingles)
            exact += prompt == other_prompt
    assert record.counts == {
        "exact": exact,
        "question": question,
        "ngram": ngram,
        "near": near,
        "test_rows": record.counts["test_rows"],
    }
    assert near > 20 and ngram > 20


def test_an_instruction_in_most_test_rows_is_no_contamination(clean: Any) -> None:
    instruction = " please think step by step and then put the final answer into one single box at the end"
    test = [(prompt + instruction, response) for prompt, response in clean[2]]
    train = [(prompt + instruction, response) for prompt, response in clean[3]]
    clean = (clean[0], clean[1], test, train)
    unknown = " ".join(f"unknown{number}" for number in range(60))
    assert run(clean, [*train, (unknown, unknown)]).counts["ngram"] == 0


def test_a_passage_in_a_few_test_rows_counts(clean: Any) -> None:
    passage = text(random.Random(5), 30)
    for number in range(3):
        clean[2][number] = (f"{passage} question {number}", "answer")
    record = run(clean, [*clean[3], *((f"{passage} other {number}", "x") for number in range(50))])
    assert {"t0", "t1", "t2"} <= {hit.test_id for hit in record.hits}


def test_hits_are_listed_up_to_a_limit_and_counted_beyond_it(clean: Any) -> None:
    record = run(clean, [*clean[3], *[clean[2][2]] * 500])
    assert record.counts["exact"] == 500 and record.counts["test_rows"] == 1
    assert len([hit for hit in record.hits if hit.kind == "exact"]) == 10


def test_drop_removes_exactly_the_contaminated_rows(clean: Any) -> None:
    test_path = clean[0]
    write(test_path, clean[2], "t")
    write_record(test_path.parent / "statistics.json", describe(test_path))
    record = run(clean, [*clean[3], clean[2][2], clean[2][5]], drop=True)
    assert record.verdict == "independent" and record.counts["dropped"] == 2
    assert "2 contaminated rows were dropped" in record.reason
    examples = read_examples(test_path)
    assert [example.id for example in examples] == [f"t{n}" for n in range(30) if n not in (2, 5)]
    assert record.test is not None and record.test == describe(test_path).file
    assert read_record(test_path.parent / "statistics.json", DatasetStatistics).examples == 28
    assert check(test_path, [clean[1]]).verdict == "independent"


def test_dropping_everything_is_refused(clean: Any) -> None:
    with pytest.raises(DataError, match="every row"):
        run(clean, clean[2], drop=True)
    assert len(read_examples(clean[0])) == 30


def test_several_training_files_are_told_apart(clean: Any, tmp_path: Path) -> None:
    write(clean[0], clean[2], "t")
    first, second = (
        write(tmp_path / "a.jsonl", clean[3], "r"),
        write(tmp_path / "b.jsonl", [clean[2][0]], "s"),
    )
    record = check(clean[0], [first, second])
    assert {hit.train_file for hit in record.hits} == {"b.jsonl"}
    assert [file.path for file in record.train] == ["a.jsonl", "b.jsonl"] and record.rows_train == 301


def test_blocks_do_not_change_the_result(clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [*clean[3], clean[2][3]]
    whole = run(clean, train)
    monkeypatch.setattr("lorasmith.testset.overlap._BLOCK_WORDS", 50)
    assert run(clean, train) == whole


def test_no_training_file_is_a_usage_error(clean: Any) -> None:
    write(clean[0], clean[2], "t")
    with pytest.raises(UsageError):
        check(clean[0], [])


@pytest.mark.parametrize("changes", [{"ngram": 1}, {"shingle": 0}, {"similarity": 0.0}, {"similarity": 1.5}])
def test_settings_that_make_no_sense_are_refused(clean: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        run(clean, clean[3], **changes)


def test_prefix_filtering_misses_no_pair() -> None:
    draw = random.Random(1)
    base = [draw.choices("abcdefgh", k=draw.randint(3, 25)) for _ in range(40)]
    base += base[:10]
    texts = [shingles(words, 2) for words in base]
    for words in base:
        changed = [*words]
        changed[draw.randrange(len(words))] = "z"
        texts.append(shingles(changed, 2))
    scopes = ["one" if number % 2 else "two" for number in range(len(texts))]
    for threshold in (0.5, 0.8, 1.0):
        expected: list[bool] = []
        for index, found in enumerate(texts):
            earlier = [k for k in range(index) if not expected[k] and scopes[k] == scopes[index]]
            expected.append(any(jaccard(texts[k], found) >= threshold for k in earlier))
        assert repeats(texts, scopes, threshold) == expected

"""DROP: a question about a passage that needs counting, sorting or arithmetic; exact match and F1.

Source: allenai.org/data/drop (Dua et al., 2019, arXiv:1903.00161), CC BY-SA 4.0. Layouts:

    original: {"nfl_653": {"passage": "…", "qa_pairs": [{"question": "How many …", "query_id": "…",
               "answer": {"number": "2", "date": {…}, "spans": []}, "validated_answers": [{…}]}]}}
    hub:      {"section_id": "nfl_653", "query_id": …, "passage": …, "question": …,
               "answers_spans": {"spans": ["2"], "types": ["number"]}}
    jsonl:    {"context": "Passage: …\\nQuestion: …\\nAnswer:", "completion": " 2", "ref_text": "2|two"}
    or        {"passage": …, "question": …, "answers": ["2"]}

Several spans of one answer are written and read with "; " between them.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from annotated_types import MinLen

from lorasmith.benchmarks.base import Benchmark, Item, RowError, Scores, Source, SourceRow, text
from lorasmith.records.dataset import Example

# The one-to-one pairing with the largest sum: Kuhn 1955, by the shortest paths of Jonker and Volgenant.


_FAR = float("inf")


def best_pairs(values: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs (row, column) with the largest sum of values; min(rows, columns) of them, sorted by row."""
    rows, columns = len(values), len(values[0]) if values else 0
    if rows > columns:
        turned = [[values[row][column] for row in range(rows)] for column in range(columns)]
        return sorted((row, column) for column, row in best_pairs(turned))
    row_price, column_price = [0.0] * rows, [0.0] * columns
    owner: list[int | None] = [None] * columns
    for start in range(rows):
        _assign(values, start, row_price, column_price, owner)
    return sorted((row, column) for column, row in enumerate(owner) if row is not None)


def _assign(
    values: Sequence[Sequence[float]],
    start: int,
    row_price: list[float],
    column_price: list[float],
    owner: list[int | None],
) -> None:
    """Give row `start` a column along the cheapest alternating path; prices stay feasible."""
    columns = len(owner)
    distance, before = [_FAR] * columns, [-1] * columns
    reached: list[int] = []
    row, length, via = start, 0.0, -1
    while True:
        for column in range(columns):
            if column not in reached:
                cost = length - values[row][column] - row_price[row] - column_price[column]
                if cost < distance[column]:
                    distance[column], before[column] = cost, via
        via = min((c for c in range(columns) if c not in reached), key=lambda c: distance[c])
        length = distance[via]
        reached.append(via)
        holder = owner[via]
        if holder is None:
            break
        row = holder
    row_price[start] += length
    for column in reached[:-1]:
        holder = owner[column]
        if holder is not None:
            row_price[holder] += length - distance[column]
        column_price[column] -= length - distance[column]
    while via >= 0:
        previous = before[via]
        owner[via] = start if previous < 0 else owner[previous]
        via = previous


# Exact match and F1 of DROP, from the published definition (AllenNLP's `drop_eval`).
#
# An answer is a list of spans. Each span is cut at spaces and hyphens; tokens lose case, punctuation (unless
# they are numbers) and the articles, and numbers are written as floats. Exact match: the same normalised
# spans, equally many. F1: bags of tokens are aligned one to one for the largest sum of F1; a pair whose gold
# has numbers counts only if they share one; the mean is over the longer of both lists, to two decimals.


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(answer: str, golds: Sequence[Sequence[str]]) -> Scores:
    """The best exact match and the best F1 over all golds, for the better reading of the answer.

    The first line that is not empty is the answer: as one span, and as spans between semicolons.
    """
    line = next(iter(answer.strip().splitlines()), "").strip()
    readings = [[line]]
    parts = [part.strip() for part in line.split(";") if part.strip()]
    if len(parts) > 1:
        readings.append(parts)
    results = [spans_score(spans, gold) for spans in readings for gold in golds if gold[0].strip()]
    return {"exact_match": max(em for em, _ in results), "f1": max(f1 for _, f1 in results)}


def spans_score(predicted: Sequence[str], gold: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of one list of spans against one gold answer."""
    own, other = [normalise(span) for span in predicted], [normalise(span) for span in gold]
    exact = float(set(own) == set(other) and len(own) == len(other))
    bags, gold_bags = [set(span.split()) for span in own], [set(span.split()) for span in other]
    table = [
        [_bag_f1(bag, gold_bag) if _numbers_agree(gold_bag, bag) else 0.0 for bag in bags]
        for gold_bag in gold_bags
    ]
    aligned = np.zeros(max(len(bags), len(gold_bags)))
    for row, column in best_pairs(table):
        aligned[row] = table[row][column]
    return exact, float(np.round(np.mean(aligned), 2))


def normalise(span: str) -> str:
    """The tokens of a span in their normal form, joined by spaces."""
    return " ".join(token for part in re.split(" |-", span) if (token := _token(part)))


def _token(part: str) -> str:
    lower = part.lower()
    plain = lower if _is_number(lower) else lower.translate(_PUNCTUATION)
    if _is_number(plain):
        plain = str(float(plain))
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _numbers_agree(gold: set[str], predicted: set[str]) -> bool:
    numbers = {token for token in gold if _is_number(token)}
    return not numbers or bool(numbers & predicted)


def _bag_f1(predicted: set[str], gold: set[str]) -> float:
    shared = len(predicted & gold)
    precision = shared / len(predicted) if predicted else 1.0
    recall = shared / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


_CONTEXT = re.compile(r"\s*Passage:(.*)\nQuestion:(.*?)(?:\nAnswer:\s*)?", re.DOTALL)
Golds = list[list[str]]
"""Alternative answers, each a list of spans."""


_Any = TypeVar("_Any")
_Several = Annotated[list[_Any], MinLen(1)]


INSTRUCTION = "Give only the answer: a number, a date, or words of the passage."
_STATES = re.compile(
    r"(?:final |correct )?answer(?: to the question)?(?: is|:)\s*:?\s*(.+?)\s*(?:\.(?=\s|$)|\n|$)",
    re.IGNORECASE,
)


def stated(answer: str) -> str:
    """What an answer in whole sentences names: "The answer is 5." is 5; others as they are."""
    plain = answer.replace("**", "").strip()
    found = _STATES.findall(plain)
    return found[-1] if found else plain


class Drop(Benchmark):
    """9,536 development questions as published; the test answers are not public."""

    name = "DROP"
    domain = "reading comprehension"
    source = "https://huggingface.co/datasets/ucinlp/drop"
    licence = "CC BY-SA 4.0"
    columns = (
        "passage, question, and answers_spans or answers; context, completion, ref_text; or the "
        "original JSON by passage"
    )
    hub = Source(
        "ucinlp/drop",
        "95cda593fae71b60b5b19f82de3fcf3298c1239c",
        ("data/validation-00000-of-00001.parquet",),
        "the hub's copy lost which spans of several annotators belong together; for scores exactly as "
        "published use the original drop_dataset_dev.json",
    )
    metrics = ("exact_match", "f1")
    max_new_tokens = 64
    stop_texts = ("\n",)
    needs: ClassVar[Mapping[str, Any]] = {
        "golds": Annotated[list[Annotated[list[str], MinLen(1)]], MinLen(1)]
    }

    def recognises(self, row: SourceRow) -> bool:
        fields = row.value.keys()
        if {"context", "completion", "ref_text"} <= fields:
            return True
        answered = {"answer", "answers_spans"} & fields or isinstance(row.value.get("answers"), list)
        return {"passage", "question"} <= fields and bool(answered) and not _is_yes_no(row.value)

    def read(self, row: SourceRow, *, seed: int) -> Item:
        passage, question, golds = _parse(row)
        passage_id = str(row.value.get("section_id") or row.value.get("passage_id") or "")
        scope = hashlib.sha256(passage.encode()).hexdigest()[:16]
        return Item(
            record_id=str(row.value.get("query_id") or row.sha256[:16]),
            prompt=f"Passage: {passage}\nQuestion: {question}\n{INSTRUCTION}\nAnswer:",
            response="; ".join(golds[0]),
            question=question,
            scope=scope,
            subdomain=passage_id.split("_")[0] if "_" in passage_id else "unknown",
            extra={"golds": golds, "passage_id": passage_id or scope},
        )

    def question_in(self, prompt: str) -> tuple[str, str]:
        passage, sign, rest = prompt.partition("\nQuestion: ")
        return (passage.removeprefix("Passage: "), rest.partition("\n")[0]) if sign else ("", prompt)

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return "easy", "benchmark"

    def judge(self, example: Example, answer: str) -> Scores:
        return score(stated(answer), example.metadata.extra()["golds"])

    def unpack(self, document: Any) -> Iterable[dict[str, Any]] | None:
        if not isinstance(document, dict) or not document:
            return None
        if not all(isinstance(entry, dict) and "qa_pairs" in entry for entry in document.values()):
            return None
        return _questions(document)


def _questions(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for passage_id, entry in document.items():
        pairs = entry["qa_pairs"]
        for pair in pairs if isinstance(pairs, list) else [pairs]:
            fields = pair if isinstance(pair, dict) else {}
            yield {**fields, "passage": entry.get("passage"), "section_id": passage_id}


def _is_yes_no(row: Mapping[str, Any]) -> bool:
    """BoolQ has a passage and a question as well, and a boolean answer."""
    return isinstance(row.get("answer"), bool)


def _parse(row: SourceRow) -> tuple[str, str, Golds]:
    if "context" in row.value:
        match = _CONTEXT.fullmatch(text(row, "context"))
        if match is None:
            raise RowError("the context is not 'Passage: … Question: …'")
        first = text(row, "completion").strip()
        others = [part.strip() for part in text(row, "ref_text").split("|")]
        return match[1].strip(), match[2].strip(), _distinct([[first], *([part] for part in others if part)])
    passage, question = text(row, "passage").strip(), text(row, "question").strip()
    if "answers_spans" in row.value:
        golds = _from_hub(row.value["answers_spans"])
    elif "answers" in row.value:
        golds = [spans for answer in row.value["answers"] if (spans := _spans(answer))]
    else:
        validated = row.value.get("validated_answers") or []
        golds = [spans for answer in (row.value["answer"], *validated) if (spans := _spans(answer))]
    if not golds:
        raise RowError("there is no answer")
    return passage, question, _distinct(golds)


def _spans(answer: Any) -> list[str]:
    """Number, else spans, else date, as the reference reads an answer; empty where nothing is given."""
    if isinstance(answer, str | int | float) and not isinstance(answer, bool):
        return [str(answer).strip()] if str(answer).strip() else []
    if not isinstance(answer, dict):
        raise RowError("an answer is neither text nor number, date or spans")
    if str(answer.get("number") if answer.get("number") is not None else "").strip():
        return [str(answer["number"]).strip()]
    spans = [span for span in answer.get("spans") or [] if isinstance(span, str) and span.strip()]
    if spans:
        return spans
    date = answer.get("date") or {}
    stated = " ".join(str(date.get(part, "")) for part in ("day", "month", "year")).strip()
    return [stated] if stated else []


def _from_hub(answers: Any) -> Golds:
    """The hub's copy lists the spans of all annotators in one row, so what belongs together is lost.

    Numbers and dates are alternatives. Of text spans, those that most annotators gave are taken as one
    answer, and every span alone as an alternative; scores can therefore be higher than on the original.
    """
    if not isinstance(answers, dict) or not isinstance(answers.get("spans"), list):
        raise RowError("answers_spans has no list of spans")
    spans = [str(span).strip() for span in answers["spans"] if str(span).strip()]
    counts = Counter(spans)
    if set(answers.get("types") or ["span"]) != {"span"} or not spans:
        return [[span] for span in counts]
    together = [span for span in counts if counts[span] == max(counts.values())]
    return [together, *([span] for span in counts)]


def _distinct(golds: Golds) -> Golds:
    return [list(spans) for spans in dict.fromkeys(tuple(gold) for gold in golds)]

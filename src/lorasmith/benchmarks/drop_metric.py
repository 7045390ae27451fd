"""Exact match and F1 of DROP, from the published definition (AllenNLP's `drop_eval`).

An answer is a list of spans. Each span is cut at spaces and hyphens; tokens lose case, punctuation (unless
they are numbers) and the articles, and numbers are written as floats. Exact match: the same normalised
spans, equally many. F1: bags of tokens are aligned one to one for the largest sum of F1; a pair whose gold
has numbers counts only if they share one; the mean is over the longer of both lists, to two decimals.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

from lorasmith.benchmarks.assignment import best_pairs
from lorasmith.benchmarks.base import Scores

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(answer: str, golds: Sequence[Sequence[str]]) -> Scores:
    """The best exact match and the best F1 over all golds, for the better reading of the answer.

    The first line that is not empty is the answer: as one span, and as spans between semicolons.
    """
    line = answer.strip().splitlines()[0].strip()
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

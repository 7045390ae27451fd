"""Find word n-grams of a few texts in a stream of many, exactly and vectorised.

The words of the few texts get fixed random 64-bit numbers; every other word is 0. An n-gram's hash is
sum(number[word_k] · odd_k) mod 2^64, computed for all positions of a block of rows at once. Two different
n-grams collide with a chance of about 2^-64 each, which a run of 10^9 positions against 10^5 n-grams meets
with a chance below 10^-5.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorasmith.benchmarks.registry import BY_NAME
from lorasmith.data.rows import fault_error, iterate_rows
from lorasmith.options import OverlapOptions
from lorasmith.records.dataset import ContaminationHit, Example

Words = Sequence[str]
U64 = NDArray[np.uint64]


def number_of(word: str) -> int:
    """A fixed 64-bit number for a word, never 0."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()) | 1


def _odd(position: int) -> np.uint64:
    return np.uint64(number_of(f"position {position}"))


def grams(numbers: U64, n: int) -> tuple[NDArray[np.int64], U64]:
    """Start and hash of each run of n words; a 0 is a gap that no run crosses."""
    if len(numbers) < n:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    gaps = np.concatenate(([0], np.cumsum(numbers == 0)))
    starts = np.flatnonzero(gaps[n:] == gaps[:-n])
    total = np.zeros(len(starts), np.uint64)
    for position in range(n):
        total += numbers[starts + position] * _odd(position)
    return starts, total


def numbers_of(words: Words) -> U64:
    """The numbers of all words of a text."""
    return np.fromiter((number_of(word) for word in words), np.uint64, len(words))


@dataclass(frozen=True)
class Hits:
    """How many different n-grams of a text each row of a block shares, one entry per (row, text) pair."""

    row: NDArray[np.int64]
    text: NDArray[np.int64]
    shared: NDArray[np.int64]


class GramIndex:
    """The distinct n-grams of some texts, given as numbers; `grams[i]` counts those of text i."""

    def __init__(self, texts: Sequence[U64], n: int) -> None:
        self.n = n
        self.texts = texts
        hashes, owners, counts = [], [], []
        for index, numbers in enumerate(texts):
            own = np.unique(grams(numbers, n)[1])
            hashes.append(own)
            owners.append(np.full(len(own), index, np.int64))
            counts.append(len(own))
        flat = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        order = np.argsort(flat, kind="stable")
        self.hashes: U64 = flat[order]
        self.owners: NDArray[np.int64] = (np.concatenate(owners) if owners else np.empty(0, np.int64))[order]
        self.grams: NDArray[np.int64] = np.array(counts, np.int64)
        self.distinct: U64 = np.unique(self.hashes)

    def find(self, numbers: U64, rows: NDArray[np.int32]) -> Hits:
        """Shared n-grams of a block: the numbers of its words (0 for a word of no text) and their rows.

        Rows must be separated by at least one 0.
        """
        starts, total = grams(numbers, self.n)
        if not len(starts) or not len(self.hashes):
            nothing = np.empty(0, np.int64)
            return Hits(nothing, nothing, nothing)
        known = self.holds(total)
        pairs = np.unique(np.stack([rows[starts[known]].astype(np.uint64), total[known]]), axis=1)
        return self._expand(pairs[0].astype(np.int64), pairs[1])

    def holds(self, hashes: U64) -> NDArray[np.bool_]:
        """Which of the hashes are of a text here; there has to be one."""
        places = np.searchsorted(self.distinct, hashes)
        places[places == len(self.distinct)] = 0  # larger than all: any place will do, it is not equal
        return self.distinct[places] == hashes

    def _expand(self, rows: NDArray[np.int64], hashes: U64) -> Hits:
        """(row, distinct hash) becomes (row, text, how many): one n-gram may stand in several texts."""
        # In the sorted hashes equal ones stand side by side, one for each text that has them: from `low` to
        # `high`. `index` lists all these places, for one hash after the other, without a loop.
        low = np.searchsorted(self.hashes, hashes, "left")
        high = np.searchsorted(self.hashes, hashes, "right")
        repeat = high - low
        index = np.repeat(low - np.concatenate(([0], np.cumsum(repeat)[:-1])), repeat) + np.arange(
            repeat.sum()
        )
        code = np.repeat(rows, repeat) * len(self.grams) + self.owners[index]
        codes, shared = np.unique(code, return_counts=True)
        return Hits(codes // len(self.grams), codes % len(self.grams), shared.astype(np.int64))


# One form of a text for comparing: case and spacing do not make two questions different.


_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_TERM = re.compile(
    r"""\w+|[+/=<>^±×÷·−≤≥≠∈∪∩]
    |(?<=[\d)\]}])-|-(?=\d)|(?<=\s)-(?=\s)      # a minus, not the hyphen of a word
    |(?<=[\w)\]}])\*(?=[\w(\[{])|(?<=\s)\*(?=\s)  # a product, not emphasis""",
    re.VERBOSE,
)


def normalise(text: str) -> str:
    """Lower case, composed characters (NFKC), single spaces.

    Punctuation stays: `x + 1` and `x - 1`, or "(" and "<" in a task on brackets, are different questions.
    """
    return " ".join(_plain(text).split())


def words(text: str) -> list[str]:
    """The words of the normalised text, as n-gram comparisons use them: letters and digits of all scripts."""
    return _WORD.findall(_plain(text))


def terms(text: str) -> list[str]:
    """The words and the signs of arithmetic: Q(√2 + √3) is another field than Q(√2, √3)."""
    return _TERM.findall(_plain(text))


def tokens(text: str) -> list[str]:
    """The words and every single sign of the normalised text."""
    return _TOKEN.findall(_plain(text))


def _plain(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).lower()


# Near duplicates among many texts, exactly: pairs whose word shingles have a high Jaccard similarity.
#
# Prefix filtering (Chaudhuri et al. 2006; Xiao et al. 2008, "PPJoin"): with the shingles of every text in
# one order, rarest first, two texts with similarity ≥ t share a shingle among the first |A| - ⌈t·|A|⌉ + 1 of
# each. So only few pairs are compared, and none is missed.


Shingles = frozenset[tuple[str, ...]]


def shingles(tokens: Sequence[str], n: int) -> Shingles:
    """All runs of n tokens; a shorter text is one shingle of its own."""
    if len(tokens) < n:
        return frozenset([tuple(tokens)])
    return frozenset(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def jaccard(first: Shingles, second: Shingles) -> float:
    """Shared part of both sets: 1 for equal ones, 0 for nothing in common."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def repeats(texts: Sequence[Shingles], scopes: Sequence[str], threshold: float) -> list[bool]:
    """Whether an earlier text of the same scope that is kept has a similarity of at least `threshold`."""
    common = Counter(shingle for text in texts for shingle in text)
    starts: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    verdicts: list[bool] = []
    for index, (text, scope) in enumerate(zip(texts, scopes, strict=True)):
        ordered = sorted(text, key=lambda shingle: (common[shingle], shingle))
        # Rarest first: the shingles that must be shared are then those that few other texts have.
        prefix = ordered[: len(ordered) - math.ceil(threshold * len(ordered)) + 1]
        candidates = {other for shingle in prefix for other in starts.get((scope, shingle), ())}
        repeated = any(
            min(len(texts[other]), len(text)) >= threshold * max(len(texts[other]), len(text))
            and jaccard(texts[other], text) >= threshold
            for other in candidates
        )
        verdicts.append(repeated)
        if not repeated:
            for shingle in prefix:
                starts.setdefault((scope, shingle), []).append(index)
    return verdicts


_BLOCK_WORDS = 1 << 18
_LISTED_HITS = 10
"""Per test row and kind: a row that stands in the training data a million times needs no million lines."""
_FEWEST_WORDS, _FEWEST_TOKENS, _PLAIN_WORDS = 2, 5, 6
"""Questions of fewer words are compared as a whole row only: "Why?" stands everywhere. Those of fewer words
and signs count where they stand alone, or with their choices or passage. Six words tell a question by
themselves; with fewer its signs do as well: "Find $2+3$" is not "Find $2-3$"."""
_GENERIC_SHARE = 0.01
"""Part of the training rows from which on a short question, or a run of words, is nobody's own."""


class _TrainRow(NamedTuple):
    name: str
    forms: tuple[str, str]
    words: list[str]
    """Words of prompt and response."""
    prompt_words: int
    text: str


class _Hit(NamedTuple):
    score: float
    train_id: str
    file: str
    grams: tuple[int, ...] = ()
    """The shared n-grams."""
    certain: bool = True
    """False for a question that was found without its choices."""


@dataclass(frozen=True)
class _Asked:
    """What of a test row is its own: the parts of its text, without what we put around them."""

    passage: str
    """What the question is about; without it "How many points were scored?" is no row's own question."""
    question: str
    choices: tuple[str, ...]
    parts: tuple[str, ...]
    """Question, choices and answer: runs of words do not cross from one to the next, or into the passage."""
    of_benchmark: bool

    @classmethod
    def of(cls, example: Example) -> _Asked:
        """By the benchmark that made the row, else the last message of the user."""
        benchmark = BY_NAME.get(example.metadata.source)
        asked = [turn.content for turn in example.turns if turn.role == "user"]
        prompt = asked[-1] if asked else example.response
        if benchmark is None:
            return cls("", prompt, (), (prompt, example.response) if asked else (prompt,), False)
        before, question = benchmark.question_in(prompt)
        held = example.metadata.extra().get("choices")
        choices = tuple(str(one) for one in held) if isinstance(held, list) else ()
        return cls(before, question, choices, (question, *choices, example.response), True)


class Matcher:
    """Holds the test rows; `read` streams training files past them."""

    def __init__(self, examples: Sequence[Example], options: OverlapOptions) -> None:
        self.options = options
        self.ids = [example.id for example in examples]
        self.prompts = [terms(example.prompt) for example in examples]
        self.asked = [_Asked.of(example) for example in examples]
        self.exact: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            for form in _forms(example.prompt, example.response):
                self.exact.setdefault(form, []).append(index)
        self.numbers = {
            word: number_of(word)
            for prompt, asked in zip(self.prompts, self.asked, strict=True)
            for text in (prompt, terms(asked.passage), *map(terms, asked.parts))
            for word in text
        }
        self.index = GramIndex(self._without_boilerplate(), options.ngram)
        self.seen: Counter[int] = Counter()
        """N-gram of a test row → training rows that hold it."""
        self.questions = self._question_indices()
        self.shingles = GramIndex([numbers_of(prompt) for prompt in self.prompts], options.shingle)
        self.found: Counter[tuple[int, str]] = Counter()
        self.best: dict[tuple[int, str], list[_Hit]] = {}
        self.rows = 0

    def _question_indices(self) -> list[GramIndex]:
        """The bare questions, each at its own length or that of a run, whichever is shorter."""
        asked = [terms(one.question) for one in self.asked]
        lengths = [min(self.options.ngram, len(own)) if len(own) >= _FEWEST_WORDS else 0 for own in asked]
        numbers = [numbers_of(own) for own in asked]

        def of_length(length: int) -> list[U64]:
            return [own if have == length else own[:0] for own, have in zip(numbers, lengths, strict=True)]

        return [GramIndex(of_length(length), length) for length in sorted(set(lengths) - {0})]

    def _without_boilerplate(self) -> list[U64]:
        """The numbers of each test row's words, with gaps in place of what several test rows say alike.

        Headers of a subject, lists of choices and instructions stand in some rows of a benchmark, a passage
        in the rows that ask about it: such runs are no row's own. A run that two questions of a benchmark
        hold is a pattern that its authors filled in. What is asked is looked for by itself.
        """
        common = self.options.common
        passages = _gapped([_numbers_apart([one.passage]) for one in self.asked], common, self.options.ngram)
        parts = [_numbers_apart(one.parts) for one in self.asked]
        limits = [1 if one.of_benchmark else common for one in self.asked]
        rest = _gapped(parts, limits, self.options.ngram)
        return [np.concatenate(both) for both in zip(passages, rest, strict=True)]

    def read(self, path: Path) -> int:
        """Compare every row of a training file; returns how many there were."""
        count = 0
        for block in _blocks(path):
            count += len(block)
            self._compare(path, block)
        self.rows += count
        return count

    def _compare(self, path: Path, block: list[_TrainRow]) -> None:
        flat: list[int] = []
        lengths: list[int] = []
        lookup = self.numbers.get
        for row in block:
            for text in {text for form in row.forms for text in self.exact.get(form, ())}:
                self._hit("exact", text, _Hit(1.0, row.name, path.name))
            flat.extend(map(lookup, row.words, repeat(0)))
            flat.append(0)  # no n-gram reaches from one row into the next
            lengths.append(len(row.words) + 1)
        numbers = np.array(flat, np.uint64)
        rows = np.repeat(np.arange(len(block), dtype=np.int32), lengths)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        for index in self.questions:
            self._questions_in(path, block, index.find(numbers, rows), index)
        self._runs_in(path, block, numbers, rows, starts)
        self._near(path, block, numbers, rows)

    def _questions_in(self, path: Path, block: list[_TrainRow], hits: Hits, index: GramIndex) -> None:
        """A question stands in a row where all its words do, in their order; a short one with its signs."""
        whole = hits.shared == index.grams[hits.text]
        spelled: dict[int, str] = {}
        for place, text in zip(hits.row[whole].tolist(), hits.text[whole].tolist(), strict=True):
            if place not in spelled:
                spelled[place] = f" {' '.join(tokens(block[place].text))} "
            certain = self._asks(self.asked[text], block[place], spelled[place])
            if certain is not None:
                self._hit("question", text, _Hit(1.0, block[place].name, path.name, certain=certain))

    def _asks(self, asked: _Asked, row: _TrainRow, spelled: str) -> bool | None:
        """Whether a row that holds the words of a question asks it: for certain, or perhaps; None if not."""
        own = terms(asked.question)
        signs = f" {' '.join(tokens(asked.question))} "
        if len(own) < _PLAIN_WORDS and signs not in spelled:
            return None
        if asked.passage:
            return self._shares(asked.passage, row.words) or None
        if asked.choices and all(f" {' '.join(tokens(choice))} " in spelled for choice in asked.choices):
            return True
        if len(own) >= self.options.ngram or (not asked.choices and len(signs.split()) >= _FEWEST_TOKENS):
            return True
        return False if _stands_alone(asked.question, row.text) else None

    def _shares(self, passage: str, row: Words) -> bool:
        """Whether the row holds as much of the passage as makes a test row contaminated."""
        n = min(self.options.ngram, len(terms(passage)))
        one, two = (np.unique(grams(numbers_of(text), n)[1]) for text in (terms(passage), row))
        return bool(np.isin(one, two).mean() >= self.options.share)

    def _runs_in(
        self,
        path: Path,
        block: list[_TrainRow],
        numbers: U64,
        rows: NDArray[np.int32],
        starts: NDArray[np.int64],
    ) -> None:
        """Runs of words that a test and a training row share; which are common is known at the end."""
        hits = self.index.find(numbers, rows)
        shared_by: dict[int, U64] = {}
        for place in sorted(set(hits.row.tolist())):
            own = np.unique(grams(numbers[starts[place] : starts[place + 1]], self.index.n)[1])
            shared_by[place] = own[self.index.holds(own)]
            self.seen.update(shared_by[place].tolist())
        for place, text, shared in zip(
            hits.row.tolist(), hits.text.tolist(), hits.shared.tolist(), strict=True
        ):
            score = shared / int(self.index.grams[text])
            if self._is_listed("ngram", text, score):
                own = np.unique(grams(self.index.texts[text], self.index.n)[1])
                both = tuple(own[np.isin(own, shared_by[place])].tolist())
                self._hit("ngram", text, _Hit(score, block[place].name, path.name, both))
            else:
                self.found[text, "ngram"] += 1

    def _near(self, path: Path, block: list[_TrainRow], numbers: U64, rows: NDArray[np.int32]) -> None:
        """Jaccard ≥ t needs at least t · (shingles of the test prompt) in common: few pairs get that far."""
        hits = self.shingles.find(numbers, rows)
        enough = hits.shared >= self.options.similarity * self.shingles.grams[hits.text]
        for place, index in zip(hits.row[enough], hits.text[enough], strict=True):
            row = block[place]
            own = shingles(self.prompts[index], self.options.shingle)
            other = shingles(row.words[: row.prompt_words], self.options.shingle)
            similarity = jaccard(own, other)
            if similarity >= self.options.similarity:
                self._hit("near", int(index), _Hit(similarity, row.name, path.name))

    def _is_listed(self, kind: str, index: int, score: float) -> bool:
        best = self.best.get((index, kind), [])
        return len(best) < _LISTED_HITS or score >= best[0].score

    def _hit(self, kind: str, index: int, hit: _Hit) -> None:
        self.found[index, kind] += 1
        best = self.best.setdefault((index, kind), [])
        heapq.heappush(best, hit)
        if len(best) > _LISTED_HITS:
            heapq.heappop(best)

    def judge(self) -> None:
        """Leave out what is common to many training rows; to be called once, when all files are read."""
        limit = max(self.options.generic, _GENERIC_SHARE * self.rows)
        common = {gram for gram, count in self.seen.items() if count > limit}
        for (index, kind), best in list(self.best.items()):
            kept = best
            if kind == "ngram":
                own = set(grams(self.index.texts[index], self.index.n)[1].tolist()) - common
                kept = [
                    hit._replace(score=len(set(hit.grams) - common) / len(own))
                    for hit in best
                    if own and set(hit.grams) - common
                ]
            elif kind == "question" and not any(hit.certain for hit in best):
                kept = best if self.found[index, kind] <= limit else []
            if kept:
                self.best[index, kind] = kept
            else:
                del self.best[index, kind], self.found[index, kind]

    @property
    def counts(self) -> dict[str, int]:
        """Hits by kind."""
        return {
            kind: sum(count for (_, of), count in self.found.items() if of == kind)
            for kind in ("exact", "question", "ngram", "near")
        }

    def affected(self) -> set[str]:
        """The ids of the test rows that are not independent: shared runs count from the share that is set."""
        return {
            self.ids[index]
            for (index, kind), best in self.best.items()
            if kind != "ngram" or max(round(hit.score, 6) for hit in best) >= self.options.share
        }

    def hits(self) -> list[ContaminationHit]:
        """The strongest hits, by test row, kind and score."""
        return [
            ContaminationHit(
                kind=kind,
                test_id=self.ids[index],
                train_id=hit.train_id,
                train_file=hit.file,
                score=round(hit.score, 6),
            )
            for (index, kind), best in sorted(self.best.items())
            for hit in sorted(best, key=lambda hit: (-hit.score, hit.train_id, hit.file))
        ]


_BEGINS = r"(?:\A|[\n:;.?!>\"“”'‘(\[*#])[ \t]*"
_ENDS = r"[ \t]*(?:\Z|[\n<\"”'’)\]*?!.…])"


def _stands_alone(question: str, text: str) -> bool:
    """Whether a question is a line, a field or a sentence of a text, or is introduced by a colon."""
    own = r"\s+".join(map(re.escape, question.split()))
    ends = r"(?!\w)" if question.rstrip()[-1:] in "?!.:" else _ENDS
    return bool(re.search(rf"{_BEGINS}{own}{ends}|:[ \t]*{own}(?!\w)", text))


def _gapped(texts: Sequence[U64], limits: int | Sequence[int], n: int) -> list[U64]:
    """The texts, with gaps in place of the runs of n words that more of them hold than each text's limit."""
    limits = [limits] * len(texts) if isinstance(limits, int) else limits
    holders = Counter(gram for own in texts for gram in set(grams(own, n)[1].tolist()))
    kept = []
    for text, limit in zip(texts, limits, strict=True):
        own = text.copy()
        starts, hashes = grams(text, n)
        for start, gram in zip(starts.tolist(), hashes.tolist(), strict=True):
            if holders[gram] > limit:
                own[start : start + n] = 0
        kept.append(own)
    return kept


def _numbers_apart(parts: Sequence[str]) -> U64:
    """The numbers of the words of some texts, a 0 between one text and the next."""
    numbers: list[int] = []
    for part in parts:
        numbers += [*map(number_of, terms(part)), 0]
    return np.array(numbers, np.uint64)


def _blocks(path: Path) -> Iterator[list[_TrainRow]]:
    """The rows in blocks of many words."""
    block: list[_TrainRow] = []
    size = 0
    for row in iterate_rows(path):
        if row.example is None:
            raise fault_error(row, path)
        first = terms(row.example.prompt)
        text = first + terms(row.example.response)
        name = str(row.value.get("id") or f"line {row.number}")
        forms = _forms(row.example.prompt, row.example.response)
        whole = f"{row.example.prompt}\n{row.example.response}"
        block.append(_TrainRow(name, forms, text, len(first), whole))
        size += len(text)
        if size >= _BLOCK_WORDS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _forms(prompt: str, response: str) -> tuple[str, str]:
    first = normalise(prompt)
    return first, f"{first} {normalise(response)}"

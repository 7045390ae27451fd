"""HellaSwag: which of four endings goes on with what happens; right when the likeliest ending is.

Source: github.com/rowanz/hellaswag (Zellers et al., 2019, arXiv:1905.07830), 10,042 validation rows, MIT; the
labels of the test rows were never published. Layout of the original and the hub, with an invented text:

    {"ind": 24, "activity_label": "Planting", "ctx_a": "A man digs a hole.", "ctx_b": "he",
     "ctx": "A man digs a hole. he", "endings": ["puts a tree in.", …], "label": 0 (hub: "0"),
     "source_id": "activitynet~v_…", "split": "val", "split_type": "indomain"}

Prompt, cleaning and both metrics are those of lm-evaluation-harness: `accuracy_norm` divides the
log-probability of an ending by its number of characters, `accuracy` does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lorasmith.benchmarks.base import Benchmark, Item, RowError, Scores, Source, SourceRow, text
from lorasmith.benchmarks.choices import LETTERS, choice_needs, require_choices
from lorasmith.records.dataset import Example


class HellaSwag(Benchmark):
    """10,042 validation rows as published, a third from ActivityNet and two from WikiHow."""

    name = "HellaSwag"
    domain = "commonsense"
    source = "https://huggingface.co/datasets/Rowan/hellaswag"
    licence = "MIT"
    columns = "activity_label, ctx_a, ctx_b, endings, label"
    hub = Source(
        "Rowan/hellaswag",
        "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        ("data/validation-00000-of-00001.parquet",),
    )
    splits = ("validation", "unnamed", "train", "test")
    answered_by = "ending"
    needs: ClassVar[Mapping[str, Any]] = choice_needs(4, 4)

    def recognises(self, row: SourceRow) -> bool:
        return row.value.keys() >= {"ctx_a", "ctx_b", "endings", "label", "activity_label"}

    def read(self, row: SourceRow, *, seed: int) -> Item:
        label = str(row.value["label"]).strip()
        if not label:
            raise RowError("the field 'label' is empty, as in the test split, whose labels are not published")
        if label not in tuple("0123"):
            raise RowError("the field 'label' is not 0..3")
        endings = row.value["endings"]
        if not isinstance(endings, list):
            raise RowError("the field 'endings' is not a list")
        choices = [cleaned(ending) for ending in require_choices(endings)]
        begun, going_on = text(row, "ctx_a"), row.value["ctx_b"]
        if not isinstance(going_on, str):
            raise RowError("the field 'ctx_b' is not text")
        context = f"{text(row, 'activity_label')}: {begun} {going_on.capitalize()}"
        origin = str(row.value.get("source_id", "")).partition("~")[0]
        return Item(
            record_id=row.sha256[:16],
            prompt=cleaned(context),
            response=choices[int(label)],
            question=" ".join([context, *choices]),
            subdomain=origin or "unknown",
            extra={
                "choices": choices,
                "answer": LETTERS[int(label)],
                "choice_order": "published",
                "split_type": str(row.value.get("split_type", "unknown")),
            },
        )

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return "medium", "benchmark"

    def judge(self, example: Example, answer: str) -> Scores:
        """1.0 for an answer that is the right ending word by word, else 0.0."""
        extra = example.metadata.extra()
        right = extra["choices"][LETTERS.index(extra["answer"])]
        return {"accuracy": float(" ".join(answer.split()) == " ".join(right.split()))}

    def judge_likelihoods(self, example: Example, likelihoods: Sequence[float]) -> Scores:
        extra = example.metadata.extra()
        right, lengths = LETTERS.index(extra["answer"]), [len(choice) for choice in extra["choices"]]
        by_length = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
        return {
            "accuracy_norm": float(by_length.index(max(by_length)) == right),
            "accuracy": float(likelihoods.index(max(likelihoods)) == right),
        }


def cleaned(written: str) -> str:
    """The text without WikiHow's marks: `[title]` ends a sentence, `[step]` and its like go."""
    plain = re.sub(r"\[.*?\]", "", written.strip().replace(" [title]", ". "))
    return plain.replace("  ", " ")

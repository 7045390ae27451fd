"""MMLU: four choices over 57 subjects; right when the letter is.

Source: github.com/hendrycks/test (Hendrycks et al., 2021, arXiv:2009.03300), MIT. Layouts:

    {subject}_{split}.csv, no header:  Which of these is the SI unit of force?,Joule,Newton,Watt,Pascal,B
    the same with a header:            question,A,B,C,D,answer    (answer 0..3 or a letter)
    columns:                           question,choice0,choice1,choice2,choice3,answer
    {"question": …, "options": […], "answer": "B"}, {"choices": {"text": […], "label": […]}}, a `type`
    hub:  {"question": "Which …", "subject": "conceptual_physics", "choices": ["Joule", …], "answer": 1}

The choices stay in their published order: some refer to each other ("Both A and B").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasmith.benchmarks.base import Item, Source, SourceRow, text
from lorasmith.benchmarks.choices import (
    LETTERS,
    LetteredChoices,
    letter_of,
    listed_choices,
    prompt_of,
    require_choices,
)

_BARE = tuple("012345")
"""Column numbers of a CSV without a header."""

CATEGORIES = {
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
}
CATEGORY_OF = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects.split()}

HARD_SUBJECTS = frozenset(
    [
        "abstract_algebra",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "econometrics",
        "formal_logic",
        "high_school_mathematics",
        "high_school_physics",
        "machine_learning",
        "moral_scenarios",
        "professional_law",
    ]
)
"""The guide's policy calls these hard: formal and quantitative subjects at college level, and law."""


class Mmlu(LetteredChoices):
    """57 subjects, 14,042 test questions as published."""

    name = "MMLU"
    domain = "multitask understanding"
    source = "https://huggingface.co/datasets/cais/mmlu"
    licence = "MIT"
    columns = (
        "question, choices (or options; A to D; choice0 to choice3), answer; or six columns "
        "without a header, the last of them a letter A to D"
    )
    hub = Source(
        "cais/mmlu",
        "c30699e8356da336a370243923dbaf21066bb9fe",
        ("all/test-00000-of-00001.parquet",),
        known={
            "all/test-00000-of-00001.parquet": (
                "74a41822ce7d3def56e1682f958469c04642a5336a5ce912fa375fdb90fb25d7"
            )
        },
    )

    def recognises(self, row: SourceRow) -> bool:
        fields = _lower(row.value)
        if tuple(row.value) == _BARE:
            return str(row.value["5"]).strip() in tuple(LETTERS[:4])
        other = fields.keys() & {"answerkey", "solution", "answer_index", "cot_content", "question_id"}
        choices = listed_choices(fields)
        right = not other and "gpqa" not in row.file.lower()
        return right and {"question", "answer"} <= fields.keys() and choices is not None

    def read(self, row: SourceRow, *, seed: int) -> Item:
        if tuple(row.value) == _BARE:
            fields: dict[str, Any] = dict(
                zip(("question", *"abcd", "answer"), row.value.values(), strict=True)
            )
        else:
            fields = _lower(row.value)
        choices = require_choices(listed_choices(fields) or [])
        question = text(SourceRow(row.file, row.number, fields), "question")
        subject = _subject(fields, row.file)
        letter = letter_of(fields["answer"], choices)
        return Item(
            record_id=f"{subject}/{row.sha256[:12]}",
            prompt=prompt_of(question, choices),
            response=letter,
            question=" ".join([question, *choices]),
            subdomain=subject,
            extra={
                "category": CATEGORY_OF.get(subject, "unknown"),
                "question": question,
                "choices": choices,
                "answer": letter,
                "choice_order": "published",
            },
        )

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        return ("hard" if item.subdomain in HARD_SUBJECTS else "medium"), "subject"


def _lower(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.lower(): value for key, value in row.items()}


def _subject(fields: Mapping[str, Any], file: str) -> str:
    """The row's subject, else the one of the file's name: `college_physics_test.csv`."""
    for name in ("subject", "type", "category"):
        own = fields.get(name)
        if isinstance(own, str) and own.strip():
            return own.strip().lower().replace(" ", "_")
    stem = file.rsplit("/", 1)[-1].split(".")[0].lower()
    for split in ("_test", "_val", "_dev", "_validation", "_train"):
        stem = stem.removesuffix(split)
    return stem if stem in CATEGORY_OF else "unknown"

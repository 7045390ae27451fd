"""Where each benchmark lies on the Hugging Face hub: repository, pinned revision, files."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Source:
    """Where a benchmark lies on the hub."""

    repository: str
    revision: str
    files: tuple[str, ...]
    note: str = ""
    """What a person should know about this copy."""
    known: dict[str, str] = field(default_factory=dict)
    """File → SHA-256, where it is known from elsewhere."""


SOURCES: dict[str, Source] = {
    "DROP": Source(
        "ucinlp/drop",
        "95cda593fae71b60b5b19f82de3fcf3298c1239c",
        ("data/validation-00000-of-00001.parquet",),
        "the hub's copy lost which spans of several annotators belong together; for scores exactly as "
        "published use the original drop_dataset_dev.json",
    ),
    "GPQA": Source(
        "Idavidrein/gpqa",
        "633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        ("gpqa_main.csv",),
        "its authors ask that no example appears in plain text: keep this file to yourself",
    ),
    "HumanEval": Source(
        "openai/openai_humaneval",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        ("openai_humaneval/test-00000-of-00001.parquet",),
    ),
    "MATH": Source(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        ("test.jsonl",),
        "the whole of MATH was taken down from the hub after a notice of the problems' rights holder "
        "(January 2025); this is the subset of 500 problems, as long as the hub has it",
    ),
    "MMLU": Source(
        "cais/mmlu",
        "c30699e8356da336a370243923dbaf21066bb9fe",
        ("all/test-00000-of-00001.parquet",),
        known={
            "all/test-00000-of-00001.parquet": (
                "74a41822ce7d3def56e1682f958469c04642a5336a5ce912fa375fdb90fb25d7"
            )
        },
    ),
}

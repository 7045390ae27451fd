"""What was made of the merged model after the release: figures laid out for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorasmith.files.run_layout import FollowupRecords
from lorasmith.records.compression import CompressRecord
from lorasmith.records.followup import (
    ClassifierReport,
    GeneratorReport,
    RespondRecord,
    SpeculationSetting,
    SpeculationSpeed,
)
from lorasmith.records.scoring import TaskEffect
from lorasmith.reporting.figures import Axis, linear_axis, log_axis

ENDS = {
    "stop": "ended by themselves",
    "length": "cut off at the limit",
    "context": "cut off by the model’s context",
}


@dataclass(frozen=True)
class Decoded:
    """One way to draft: what was accepted, and how fast it was where that is shown."""

    name: str
    setting: SpeculationSetting
    speed: SpeculationSpeed | None


@dataclass(frozen=True)
class SizePoint:
    """A compressed model in the plot of quality over size, in percent of the axes."""

    number: int
    right: float
    up: float
    record: CompressRecord


@dataclass(frozen=True)
class SizePlot:
    """Mean KL, logarithmic, over size from 0 to the original's: lower and further left is better."""

    size: Axis
    """Axis of sizes in megabytes (10⁶ bytes)."""
    divergence: Axis
    points: list[SizePoint]


@dataclass(frozen=True)
class FollowupView:
    """What the section shows; a part that is None was not asked for."""

    records: FollowupRecords
    ends: list[tuple[str, int, float]]
    """How the responses ended: words, rows, fraction."""
    generators: list[tuple[str, GeneratorReport]]
    confusion: list[tuple[str, list[tuple[int, float]]]]
    """True label → rows by predicted label, each with its fraction of the true label."""
    ways: list[Decoded]
    sources: list[str]
    """Sources of the prompts, where there is more than one."""
    places: int
    """Tokens of the longest draft."""
    sizes: SizePlot | None
    asked: list[tuple[CompressRecord, str, TaskEffect]]
    """Benchmarks' questions to compressed models: which, what kind of question, against the original."""


def followup_view(records: FollowupRecords) -> FollowupView | None:
    """None where nothing was asked for after the release."""
    if not records:
        return None
    draft, spoken = records.draft, records.speculation
    speeds = records.speculation_speed.speeds if records.speculation_speed else []
    by_way = {(speed.method, speed.draft_tokens): speed for speed in speeds}
    ways = [
        Decoded(_name(setting), setting, by_way.get((setting.method, setting.draft_tokens)))
        for setting in (spoken.settings if spoken else [])
    ]
    sources = sorted({name for way in ways for name in way.setting.by_source})
    return FollowupView(
        records=records,
        ends=_ends(records.responses) if records.responses else [],
        generators=[("before training", draft.before), ("after", draft.generator)] if draft else [],
        confusion=_confusion(draft.classifier) if draft and draft.classifier else [],
        ways=ways,
        sources=sources if len(sources) > 1 else [],
        places=max((len(way.setting.overall.by_position) for way in ways), default=0),
        sizes=size_plot(records.compressed),
        asked=[
            (record, name, effect)
            for record in records.compressed
            if record.tasks
            for name, effect in record.tasks.named
        ],
    )


def _name(setting: SpeculationSetting) -> str:
    method = "draft model" if setting.method == "draft" else "prompt lookup"
    return f"{method}, {setting.draft_tokens} token{'' if setting.draft_tokens == 1 else 's'}"


def _ends(record: RespondRecord) -> list[tuple[str, int, float]]:
    """Every way to end, also those that no row took, and rows without an answer."""
    total = max(1, record.rows + record.failed)
    counts = [(words, record.finish.get(name, 0)) for name, words in ENDS.items()]
    counts += [("failed", record.failed)] if record.failed else []
    return [(words, count, count / total) for words, count in counts]


def _confusion(report: ClassifierReport) -> list[tuple[str, list[tuple[int, float]]]]:
    return [
        (label, [(count, count / max(1, sum(counts))) for count in counts])
        for label, counts in zip(report.labels, report.confusion, strict=True)
    ]


def size_plot(records: Sequence[CompressRecord]) -> SizePlot | None:
    """None where no compressed model was measured."""
    measured = [(number, record) for number, record in enumerate(records, 1) if record.quality]
    if not measured:
        return None
    size = linear_axis([0.0, max(record.original_bytes for _, record in measured) / 1e6])
    divergence = log_axis([record.quality.kl.mean for _, record in measured if record.quality])
    points = [
        SizePoint(number, size.at(record.bytes / 1e6), divergence.at(record.quality.kl.mean), record)
        for number, record in measured
        if record.quality
    ]
    return SizePlot(size, divergence, points)

"""Several compressed models side by side: a table, and quality over size as a plot in one SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from lorasmith.errors import InputError
from lorasmith.files.atomic import StrPath, read_record, write_bytes
from lorasmith.followup.compression.settings import RECORD
from lorasmith.machine.resources import human_bytes
from lorasmith.records.compression import CompressRecord
from lorasmith.records.scoring import TaskEffect

COLUMNS = (
    "format",
    "method",
    "size",
    "bits",
    "ppl ratio",
    "mean KL",
    "99 % KL",
    "top-1",
    "accuracy (Δ)",
    "gates",
)

_LETTER, _LINE = 6.0, 13
"""Mean width of a letter and height of a line in the plot's labels."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 640, 320, 70, 46, 24


def write_page(folders: Sequence[StrPath], target: StrPath) -> None:
    """Compare compressed folders of one model: Markdown for a name that ends in .md, else an HTML page.

    Raises `InputError` for a folder without record, and for folders of different models or test sets.
    """
    target = Path(target)
    records = [read_record(Path(folder) / RECORD, CompressRecord) for folder in folders]
    _check_alike(records, folders)
    records.sort(key=lambda record: record.bytes)
    text = markdown(records) if target.suffix == ".md" else page(records)
    write_bytes(target, text.encode())


def _check_alike(records: Sequence[CompressRecord], folders: Sequence[StrPath]) -> None:
    for name in ("model_sha256", "test_set"):
        values = [getattr(record, name) for record in records if getattr(record, name) is not None]
        for record, folder in zip(records, folders, strict=True):
            value = getattr(record, name)
            if value is not None and value != values[0]:
                what = "model" if name == "model_sha256" else "test set"
                raise InputError(
                    f"the {what} of this folder is not that of the first one",
                    where=folder,
                    expected=f"compressed folders of one {what}",
                )


def recommend(names: Sequence[str], records: Sequence[CompressRecord]) -> tuple[str | None, str]:
    """The smallest of these models that passes every gate, None where none does, and the reason."""
    passed = [
        (record.bytes, name, record) for name, record in zip(names, records, strict=True) if record.passed
    ]
    if not passed:
        measured = any(record.passed is not None for record in records)
        return None, "none passes every gate" if measured else "nothing was measured: no test set was given"
    _, name, record = min(passed, key=lambda one: one[:2])
    quality = record.quality
    assert quality is not None  # gates were judged on it
    return name, (
        f"{name} is the smallest that passes every gate: {human_bytes(record.bytes)}, mean KL "
        f"{quality.kl.mean:.4f}, the same next token at {quality.top1_agreement:.2%}"
    )


def cells(record: CompressRecord) -> tuple[str, ...]:
    """One row of the table."""
    quality = record.quality
    verdict = {None: "–", True: "✓ pass", False: "✗ fail"}[record.passed]
    return (
        _name(record),
        record.method,
        human_bytes(record.bytes),
        f"{record.bits_per_weight:.2f}",
        *(
            ("", "", "", "")
            if quality is None
            else (
                f"{quality.perplexity_ratio:.4f}",
                f"{quality.kl.mean:.4f}",
                f"{quality.kl.q99:.3f}",
                f"{quality.top1_agreement:.2%}",
            )
        ),
        "" if record.tasks is None else _accuracy(record.tasks.overall),
        verdict,
    )


def _name(record: CompressRecord) -> str:
    """The format as the plan names it, short enough for a terminal and a plot: `int4 g64`, `gguf q4_0`."""
    return record.kind.removeprefix("compressed-tensors ")


def _accuracy(effect: TaskEffect) -> str:
    return f"{effect.value_b:.1%} ({effect.delta:+.1%})"


def markdown(records: Sequence[CompressRecord]) -> str:
    """The table alone."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 3) + "---|"]
    lines += ["| " + " | ".join(cells(record)) + " |" for record in records]
    return "\n".join(lines) + "\n"


def page(records: Sequence[CompressRecord]) -> str:
    """A page of its own, without scripts and without anything from elsewhere."""
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(record)) + "</tr>" for record in records
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Compressed models</title>\n'
        "<style>body{font:15px system-ui;margin:2em}table{border-collapse:collapse}"
        "td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right}"
        "td:first-child,th:first-child{text-align:left}</style>\n"
        f"<h1>Compressed models</h1>\n<table><tr>{head}</tr>{rows}</table>\n{plot(records)}\n</html>\n"
    )


def plot(records: Sequence[CompressRecord]) -> str:
    """Mean KL over size, both from 0: lower and further left is better. Empty where nothing was measured."""
    points = [(record.bytes, record.quality.kl.mean, record) for record in records if record.quality]
    if not points:
        return ""
    most_bytes = 1.15 * max(size for size, _, _ in points)
    most_kl = 1.15 * max(kl for _, kl, _ in points) or 1.0
    right, top = _WIDTH - _MARGIN, _MARGIN
    drawn: list[str] = []
    labels: list[tuple[float, float, float]] = []
    for size, kl, record in points:
        x = _LEFT + (right - _LEFT) * size / most_bytes
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - top) * kl / most_kl
        name = escape(f"{_name(record)} {record.method}")
        height = y - 9
        begins = x - _LETTER * len(name)
        while any(begins < right and left < x and abs(height - up) < _LINE for left, right, up in labels):
            height -= _LINE  # above the label that is there
        labels.append((begins, x, height))
        drawn.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#0b6fa4"><title>{name}: {human_bytes(size)}, '
            f'mean KL {kl:.4f}</title></circle><text x="{x - 8:.1f}" y="{height:.1f}" '
            f'text-anchor="end">{name}</text>'
        )
    floor = _HEIGHT - _BOTTOM
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        'aria-label="Mean KL over size" style="font:12px system-ui">'
        f'<path d="M{_LEFT} {top}V{floor}H{right}" fill="none" stroke="#666"/>'
        f'<text x="{_LEFT}" y="{floor + 18}">0</text>'
        f'<text x="{right}" y="{floor + 18}" text-anchor="end">{human_bytes(most_bytes)}</text>'
        f'<text x="{(right + _LEFT) / 2:.0f}" y="{floor + 36}" text-anchor="middle">size</text>'
        f'<text x="{_LEFT - 6}" y="{top + 10}" text-anchor="end">{most_kl:.3g}</text>'
        f'<text x="{_LEFT - 6}" y="{floor}" text-anchor="end">0</text>'
        f'<text x="{_LEFT + 8}" y="{top + 10}">mean KL to the original, nats</text>'
        + "".join(drawn)
        + "</svg>"
    )

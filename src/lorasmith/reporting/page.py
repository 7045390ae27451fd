"""One self-contained HTML page from the records of a run: nothing is loaded, nothing in the data can run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lorasmith.errors import DataError
from lorasmith.files.atomic import write_bytes
from lorasmith.files.costs import costs
from lorasmith.files.output_folder import require_own_file
from lorasmith.files.run_layout import ALL, REPORT, UNTIMED, RunRecords, load_records
from lorasmith.machine.resources import human_bytes
from lorasmith.records.release import is_redacted
from lorasmith.reporting.explorer import Explorer, build_explorer
from lorasmith.reporting.fidelity import FLOOR, QUANTILES, divergence_tables, heat_map, shifts
from lorasmith.reporting.followup import followup_view
from lorasmith.reporting.groups import effect_tables, model_tables, sort_groups
from lorasmith.reporting.sections import (
    GLOSSARY,
    claims,
    facts,
    headline,
    provenance,
    render_page,
    task_table,
)

_TITLE = b"lorasmith report</title>"
"""What stands in the head of every page."""
_HEAD_BYTES = 8192


def write_report(run: Path, output: Path, *, timings: bool = True) -> None:
    """Write the page of the run in `run` to `output`; `timings` adds the section that differs between runs.

    A section whose record is absent says that it was not measured. Rows whose text must not be published show
    their id and scores. Raises `DataError` for a folder without records, `InputError` for a damaged record.
    """
    if output.resolve() != (run / REPORT).resolve():  # that place is the run's own
        require_own_page(output)
    write_bytes(output, render(report_records(run, timings=timings)).encode())


def require_own_page(output: Path) -> None:
    """Raise `UsageError` where something is at `output` that is no page of lorasmith's."""
    require_own_file(output, "report", lambda path: _TITLE in path.read_bytes()[:_HEAD_BYTES])


def report_records(run: Path, *, timings: bool) -> RunRecords:
    """Every record of a run; `timings` says whether those that differ between two runs are among them.

    Raises `DataError` where there is no record, `InputError` for a damaged one.
    """
    records = load_records(run, ALL if timings else UNTIMED)
    if records.run is None and not records.validations and records.merge is None:
        raise DataError(
            "there is no record of a run here",
            where=run,
            expected="a run folder, or validation_results of an unpacked package",
            remedy="give the folder that holds run.json",
        )
    return records


def render(records: RunRecords) -> str:
    """The page as text."""
    explorer = build_explorer(records)
    sentence, state = headline(records)
    view: dict[str, Any] = {
        "records": records,
        "headline": sentence,
        "state": state,
        "claims": claims(records),
        "facts": facts(records),
        "base_warnings": records.merge.base_warnings if records.merge else [],
        "sections": _sections(records),
        "models": model_tables(records),
        "tasks": task_table(records),
        "effects": effect_tables(records),
        "divergences": divergence_tables(records),
        "heat": heat_map(records.merge),
        "shift": shifts(explorer.index) if explorer else None,
        "explorer": explorer,
        "index_json": _script_json(explorer.index) if explorer else Markup(),
        "visible": visible_ids(explorer),
        "findings": records.findings(),
        "provenance": provenance(records),
        "glossary": GLOSSARY,
        "after": followup_view(records.followup),
        "floor": FLOOR,
        "quantiles": QUANTILES,
        **_test_set_view(records),
        **_timing_view(records),
    }
    return render_page("page.html", view, scripts=("map.js", "tokens.js", "explorer.js"))


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, whatever the strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def visible_ids(explorer: Explorer | None) -> frozenset[str]:
    """Examples whose text may be shown: none where the test set, which says so, is gone."""
    if explorer is None:
        return frozenset()
    sources = explorer.index["source"]
    pairs = zip(explorer.index["id"], sources["of"], strict=True)
    return frozenset(name for name, place in pairs if not is_redacted(sources["names"][place]))


def _sections(records: RunRecords) -> list[tuple[str, str]]:
    sections = [
        ("gates", "Gates"),
        ("models", "Models"),
        ("effect", "Adapter"),
        ("fidelity", "Merge"),
        ("examples", "Examples"),
        ("testset", "Test set"),
    ]
    if records.followup:
        sections.insert(-1, ("after", "After"))
    if records.timing:
        sections.append(("time", "Time"))
    return [*sections, ("provenance", "Provenance")]


def _test_set_view(records: RunRecords) -> dict[str, Any]:
    statistics = records.statistics
    return {
        "difficulties": sort_groups("difficulty", set(statistics.by_difficulty)) if statistics else [],
        "crossing": statistics.crossings.get("source × difficulty", {}) if statistics else {},
    }


def _timing_view(records: RunRecords) -> dict[str, Any]:
    if records.timing is None:
        return {}
    shown = {
        name.removesuffix("_bytes"): human_bytes(value) if name.endswith("_bytes") else value
        for name, value in records.timing.hardware.items()
    }
    summary = costs([records.folder])
    longest = max((phase.wall_seconds for phase in summary.phases), default=0.0)
    return {
        "hardware": list(shown.items()),
        "costs": summary,
        "any_gpu": any(phase.gpu_seconds is not None for phase in summary.phases),
        "longest": longest or 1.0,
    }


__all__ = ["Explorer", "render", "write_report"]

"""One self-contained HTML page from the records of a run: nothing is loaded, nothing in the data can run."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lorasmith.files.atomic import write_bytes
from lorasmith.files.machine import human_bytes
from lorasmith.reporting import figures
from lorasmith.reporting.explorer import Explorer, build_explorer
from lorasmith.reporting.fidelity import FLOOR, QUANTILES, divergence_tables, heat_map, shifts
from lorasmith.reporting.groups import ALL, effect_tables, model_tables, sort_groups
from lorasmith.reporting.load import RunRecords, load_run
from lorasmith.reporting.provenance import GLOSSARY, facts, provenance
from lorasmith.reporting.verdict import claims, headline


def write_report(run: Path, output: Path, *, timings: bool = True) -> None:
    """Write the page of the run in `run` to `output`; `timings` adds the section that differs between runs.

    A section whose record is absent says that it was not measured. Rows whose text must not be published show
    their id and scores. Raises `DataError` for a folder without records, `InputError` for a damaged record.
    """
    write_bytes(output, render(load_run(run, timings=timings)).encode())


def render(records: RunRecords) -> str:
    """The page as text."""
    explorer = build_explorer(records)
    sentence, state = headline(records)
    script = _asset("page.js") + _asset("explorer.js")
    view: dict[str, Any] = {
        "records": records,
        "headline": sentence,
        "state": state,
        "claims": claims(records),
        "facts": facts(records),
        "sections": _sections(records),
        "models": model_tables(records),
        "effects": effect_tables(records),
        "divergences": divergence_tables(records),
        "heat": heat_map(records.merge),
        "shift": shifts(explorer.index) if explorer else None,
        "explorer": explorer,
        "index_json": _script_json(explorer.index) if explorer else Markup(),
        "findings": records.findings(),
        "provenance": provenance(records),
        "glossary": GLOSSARY,
        "comparisons": {"<": "<", "<=": "≤", ">": ">", ">=": "≥", "==": "=", "!=": "≠"},
        "all_examples": ALL,
        "floor": FLOOR,
        "quantiles": QUANTILES,
        "css": Markup(_asset("page.css")),
        "js": Markup(script),
        "policy": _policy(script),
        **_test_set_view(records),
        **_timing_view(records),
    }
    return _environment().get_template("page.html").render(view)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lorasmith.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        number=figures.number,
        plain=figures.plain,
        plural=figures.plural,
        signed=figures.signed,
        percent=figures.percent,
        count=figures.count,
        duration=figures.duration,
        human_bytes=human_bytes,
    )
    return environment


def _asset(name: str) -> str:
    return (files("lorasmith.reporting") / "templates" / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """A content security policy under which only our own script runs and no request leaves the page."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, whatever the strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _sections(records: RunRecords) -> list[tuple[str, str]]:
    found = [
        ("gates", "Gates"),
        ("models", "Models"),
        ("effect", "Adapter"),
        ("fidelity", "Merge"),
        ("examples", "Examples"),
        ("testset", "Test set"),
    ]
    if records.timing:
        found.append(("time", "Time"))
    return [*found, ("provenance", "Provenance")]


def _test_set_view(records: RunRecords) -> dict[str, Any]:
    statistics = records.statistics
    return {
        "difficulties": sort_groups("difficulty", set(statistics.by_difficulty)) if statistics else [],
        "crossing": statistics.crossings.get("source × difficulty", {}) if statistics else {},
    }


def _timing_view(records: RunRecords) -> dict[str, Any]:
    if records.timing is None:
        return {"hardware": [], "longest": 1.0}
    shown = {
        name.removesuffix("_bytes"): human_bytes(value) if name.endswith("_bytes") else value
        for name, value in records.timing.hardware.items()
    }
    longest = max((stage.wall_seconds for stage in records.timing.stages), default=0.0)
    return {"hardware": list(shown.items()), "longest": longest or 1.0}


__all__ = ["Explorer", "render", "write_report"]

"""Verdicts for machines and merge requests: JUnit XML, Markdown, GitHub workflow commands, JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from xml.etree import ElementTree

from lorasmith.records.release import GateRecord, GateResult

MARKS = {"pass": "✓", "fail": "✗", "not measured": "?"}


def show(value: float | str | None) -> str:
    """A measured value or a threshold, short and without losing its size."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.6g}"


def wanted(result: GateResult) -> str:
    """`adapter.perplexity (difficulty=easy) < 1.5`."""
    gate = result.gate
    group = f" ({gate.group})" if gate.group else ""
    return f"{gate.metric}{group} {gate.comparison} {show(gate.threshold)}"


def measured(result: GateResult) -> str:
    """What was measured, with its interval."""
    span = result.interval
    interval = f" [{show(span.low)} … {show(span.high)}]" if span else ""
    return f"{show(result.measured)}{interval}"


def advice(result: GateResult) -> str:
    """What to do about a gate that failed, or why one was not measured; empty for one that passed."""
    return {"pass": "", "fail": result.gate.advice, "not measured": result.reason}[result.verdict]


def count_of(record: GateRecord) -> str:
    """How many gates passed or did not, as a sentence without its full stop."""
    total = len(record.gates)
    failed = sum(result.verdict != "pass" for result in record.gates)
    if not total:
        return "No gate was judged"
    if total == 1:
        return "The only gate did not pass" if failed else "The only gate passed"
    return f"{failed} of {total} gates did not pass" if failed else f"All {total} gates passed"


def to_json(record: GateRecord) -> str:
    """The record itself."""
    return record.to_json().decode()


def to_markdown(record: GateRecord) -> str:
    """A table for a merge request or a job summary."""
    title = count_of(record)
    lines = [
        f"### lorasmith: {title}",
        "",
        "| | gate | wanted | measured | what to do |",
        "|---|---|---|---|---|",
    ]
    for result in record.gates:
        cells = (MARKS[result.verdict], result.gate.name, wanted(result), measured(result), advice(result))
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that cannot leave its cell nor become markup."""
    plain = " ".join(text.split())
    for character in "\\|<>`*_[]":
        plain = plain.replace(character, f"&#{ord(character)};")
    return plain


def to_junit(record: GateRecord) -> str:
    """One test case a gate, as CI systems read them; a gate without data is a failure too."""
    failed = sum(result.verdict != "pass" for result in record.gates)
    counts = {"tests": str(len(record.gates)), "failures": str(failed), "errors": "0"}
    root = ElementTree.Element("testsuites", {"name": "lorasmith", **counts})
    about = {"name": "gates", **counts, "skipped": "0", "time": "0"}
    suite = ElementTree.SubElement(root, "testsuite", about)
    for result in record.gates:
        case = ElementTree.SubElement(
            suite, "testcase", name=_xml(result.gate.name), classname="lorasmith.gates", time="0"
        )
        text = f"wanted {wanted(result)}, measured {measured(result)}"
        if result.verdict != "pass":
            failure = ElementTree.SubElement(
                case, "failure", type=result.verdict, message=_xml(f"{result.verdict}: {text}")
            )
            failure.text = _xml(advice(result))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(text)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _xml(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold in any form."""
    return "".join(
        character
        for character in text
        if character in "\t\n\r" or 0x20 <= ord(character) < 0xFFFE or ord(character) > 0xFFFF
    )


def to_github(record: GateRecord) -> str:
    """Workflow commands: one annotation a gate that did not pass, one notice for all that did."""
    lines = []
    for result in record.gates:
        if result.verdict == "pass":
            continue
        text = f"wanted {wanted(result)}, measured {measured(result)}. {advice(result)}".strip()
        title = _property(f"{result.gate.name}: {result.verdict}")
        lines.append(f"::error title={title}::{_message(text)}")
    lines.append(f"::notice title=lorasmith::{count_of(record)}")
    return "\n".join(lines) + "\n"


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


FORMATS: Mapping[str, Callable[[GateRecord], str]] = {
    "json": to_json,
    "junit": to_junit,
    "markdown": to_markdown,
    "github": to_github,
}

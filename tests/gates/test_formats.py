"""Verdicts as CI systems read them: each format is read back by a parser that is not ours."""

from __future__ import annotations

import json
import re

import pytest
from junitparser import Failure, JUnitXml

from lorasmith.gates.formats import FORMATS, to_github, to_junit, to_markdown
from lorasmith.records.base import Interval
from lorasmith.records.release import Gate, GateRecord, GateResult

HOSTILE = "a|b <x> & `c`\n::error::no %0A ]]> \x00\x1b"


def gate(name: str, threshold: float | str = 0.1) -> Gate:
    return Gate(
        name=name, metric="adapter.loss", group="source=MATH", threshold=threshold, advice="train again"
    )


RECORD = GateRecord(
    passed=False,
    gates=[
        GateResult(gate=gate("good"), measured=0.05, interval=Interval(low=0.04, high=0.06), verdict="pass"),
        GateResult(gate=gate("bad"), measured=1.53e-4, verdict="fail"),
        GateResult(
            gate=gate(HOSTILE), measured=None, verdict="not measured", reason="no example in source=MATH"
        ),
    ],
)
ALL_GOOD = GateRecord(passed=True, gates=RECORD.gates[:1])


def test_junit_is_read_by_a_junit_parser() -> None:
    suite = next(iter(JUnitXml.fromstring(to_junit(RECORD).encode())))
    assert (suite.name, suite.tests, suite.failures, suite.errors, suite.skipped) == ("gates", 3, 2, 0, 0)
    good, bad, blank = suite
    assert (good.name, good.classname, good.is_passed) == ("good", "lorasmith.gates", True)
    assert "0.05 [0.04 … 0.06]" in good.system_out
    (failure,) = bad.result
    assert isinstance(failure, Failure)
    assert failure.type == "fail"
    assert "adapter.loss (source=MATH) < 0.1, measured 1.53e-04" in failure.message
    assert failure.text == "train again"
    (failure,) = blank.result
    assert failure.type == "not measured"
    assert "no example in source=MATH" in failure.text
    assert blank.name.startswith("a|b <x> & `c`")


def test_junit_counts_agree_with_what_it_holds() -> None:
    xml = JUnitXml.fromstring(to_junit(RECORD).encode())
    said = (xml.tests, xml.failures, xml.errors)
    xml.update_statistics()
    assert said == (xml.tests, xml.failures, xml.errors) == (3, 2, 0)


def test_markdown_keeps_every_text_in_its_cell() -> None:
    lines = to_markdown(RECORD).splitlines()
    assert lines[0] == "### lorasmith: 2 of 3 gates did not pass"
    assert [line.count("|") for line in lines[2:]] == [6] * 5
    assert "<x>" not in lines[-1]
    assert "| ✗ | bad | adapter.loss (source=MATH) &#60; 0.1 | 1.53e-04 | train again |" in lines
    assert to_markdown(ALL_GOOD).startswith("### lorasmith: The only gate passed")


def test_github_commands_cannot_be_broken_out_of() -> None:
    lines = to_github(RECORD).splitlines()
    assert [line.split("::")[1].split(" ")[0] for line in lines] == ["error", "error", "notice"]
    assert lines[0].startswith("::error title=bad%3A fail::wanted adapter.loss (source=MATH) < 0.1")
    assert lines[0].endswith("train again")
    title = re.match(r"::error title=(.*?)::", lines[1])
    assert title is not None
    decoded = title[1].replace("%3A", ":").replace("%2C", ",").replace("%0A", "\n").replace("%25", "%")
    assert decoded == f"{HOSTILE}: not measured"
    assert lines[2] == "::notice title=lorasmith::2 of 3 gates did not pass"


def test_json_is_the_record() -> None:
    found = FORMATS["json"](RECORD)
    assert json.loads(found)["format"] == "lorasmith/gates/1"
    assert GateRecord.from_json(found, "here") == RECORD


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_every_gate_that_did_not_pass(name: str) -> None:
    text = FORMATS[name](RECORD)
    assert "bad" in text
    assert "train again" in text
    assert text.endswith("\n")

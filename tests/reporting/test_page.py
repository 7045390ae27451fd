"""The page: whole without a network, honest about what is missing, deaf to hostile strings."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import DataError, InputError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.records.base import Finding
from lorasmith.records.dataset import ContaminationHit, ContaminationRecord, Example, Metadata
from lorasmith.records.merging import MergeRecord
from lorasmith.records.release import TimingRecord
from lorasmith.reporting.page import write_report
from tests.samples import SECRET, sample_examples, sample_run


class Page(HTMLParser):
    """Elements with their attributes, text by section, and the contents of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._section = "top"
        self._script: dict[str, str | None] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag == "script":
            self._script = dict(attrs)
            self.scripts.append((self._script, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[-1] = (self._script, self.scripts[-1][1] + data)
        else:
            self.sections[self._section] = self.sections.get(self._section, "") + data

    def index(self) -> dict[str, Any]:
        """The explorer's index."""
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "index"))

    def details(self) -> list[dict[str, Any]]:
        """The explorer's examples, unpacked as the script does."""
        chunks = [text for attrs, text in self.scripts if attrs.get("class") == "chunk"]
        return [
            entry
            for chunk in chunks
            for entry in json.loads(zlib.decompress(base64.b64decode(chunk), -zlib.MAX_WBITS))
        ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    return sample_run(tmp_path / "run")


def render(run: Path, **options: Any) -> Page:
    """The page of a run, parsed."""
    page = run.parent / "report.html"
    write_report(run, page, **options)
    return Page(page.read_text())


def test_the_claims_come_first(run: Path) -> None:
    top = render(run).sections["top"]
    assert "The adapter helps, the merged weights are exact, the merged model drifted" in top
    assert "2 of 4 gates did not pass" in top
    for word in ("helps", "exact", "drifted", "2 of 4 did not pass", "independent", "134,515,008 elements"):
        assert word in top


def test_rows_that_share_little_with_the_training_data_are_not_counted_as_found_again(run: Path) -> None:
    path = run / "testset" / "contamination.json"
    record = read_record(path, ContaminationRecord)
    hit = ContaminationHit(kind="ngram", test_id="a", train_id="r", train_file="train.jsonl", score=0.1)
    changed = {"hits": [hit], "parameters": {**record.parameters, "share": 0.2}}
    write_record(path, record.model_copy(update=changed))
    assert "0 of 40 test rows found again" in render(run).sections["top"]
    write_record(path, record.model_copy(update={**changed, "hits": [hit.model_copy(update={"score": 0.3})]}))
    assert "1 of 40 test rows found again" in render(run).sections["top"]


def test_nothing_is_loaded_from_anywhere(run: Path) -> None:
    page = render(run)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "img", "base", "form")
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    text = (run.parent / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    policy = next(a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


RECORDS = {
    "gates.json": {"gates"},
    "proof/comparison.json": {"effect"},
    "proof/weights.json": {"fidelity"},
    "proof/behaviour.json": {"fidelity"},
    "merged/lorasmith_merge.json": {"fidelity"},
    "testset/test_set.jsonl": {"examples"},
    "testset/statistics.json": {"testset"},
    "testset/contamination.json": {"testset"},
}


@pytest.mark.parametrize("missing", RECORDS)
def test_a_missing_record_is_said_to_be_missing(run: Path, missing: str) -> None:
    whole = {name for name, text in render(run).sections.items() if "Not measured." in text}
    assert whole == set()
    (run / missing).unlink()
    partly = {name for name, text in render(run).sections.items() if "Not measured." in text}
    assert partly == RECORDS[missing]


def test_a_run_with_one_record_still_has_a_page(tmp_path: Path) -> None:
    whole = sample_run(tmp_path / "run")
    only = tmp_path / "only"
    only.mkdir()
    (whole / "run.json").rename(only / "run.json")
    page = render(only)
    assert "Nothing has been measured yet." in page.sections["top"]
    assert page.sections["top"].count("not measured") == 5


def test_a_folder_without_records_and_a_damaged_record_are_errors(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no record"):
        write_report(tmp_path / "empty", tmp_path / "page.html")
    (run / "gates.json").write_text('{"format": "lorasmith/gates/1", "passed": "perhaps"}')
    with pytest.raises(InputError, match="gates"):
        write_report(run, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_every_number_of_a_model_stands_in_a_table(run: Path) -> None:
    text = render(run).sections["models"]
    record = json.loads((run / "validation" / "adapter.json").read_text())
    for kind in ("source", "domain", "difficulty"):
        assert f"By {kind}" in text
        for name, metrics in record["groups"][kind].items():
            assert name in text
            assert f"PPL {metrics['perplexity']:.4g}" in text


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{ 7*7 }}<!--\u2028"


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    rows = sample_examples(10)
    rows[0] = Example(
        id=HOSTILE, prompt=HOSTILE, response=HOSTILE, metadata=Metadata(source=HOSTILE, domain=HOSTILE)
    )
    run = sample_run(tmp_path / "run", rows=rows)
    record = read_record(run / "merged" / "lorasmith_merge.json", MergeRecord)
    finding = Finding(severity="warning", code="x", message=HOSTILE, where=HOSTILE, remedy=HOSTILE)
    tensors = [record.tensors[0].model_copy(update={"name": HOSTILE}), *record.tensors[1:]]
    write_record(
        run / "merged" / "lorasmith_merge.json",
        record.model_copy(update={"findings": [finding], "tensors": tensors}),
    )
    page = render(run)
    clean = render(sample_run(tmp_path / "clean", count=10))
    assert [attrs for attrs, _ in page.scripts] == [attrs for attrs, _ in clean.scripts]
    assert page.scripts[-1][1] == clean.scripts[-1][1], "the script is not our own"
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert HOSTILE in page.sections["testset"]
    assert HOSTILE in page.sections["fidelity"]
    assert page.index()["id"][0] == HOSTILE
    assert page.details()[0]["prompt"] == HOSTILE
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in clean.elements} | {"ul", "li"}


def test_forbidden_text_is_nowhere_in_the_page(run: Path) -> None:
    page = render(run)
    assert "other than" in page.sections["fidelity"], "what may be shown is not shown"
    assert SECRET not in (run.parent / "report.html").read_text()
    assert SECRET not in json.dumps(page.details())
    index = page.index()
    gpqa = index["source"]["names"].index("GPQA")
    for place, detail in enumerate(page.details()):
        assert detail.get("redacted", False) == (index["source"]["of"][place] == gpqa)
        if detail.get("redacted"):
            assert set(detail) == {"redacted"}
            assert index["adapter"][place] > 0


def test_the_explorer_holds_every_token_with_its_losses(run: Path) -> None:
    import pyarrow.parquet as pq

    page = render(run)
    tables = {
        role: pq.read_table(run / "validation" / f"{role}.parquet").to_pylist()
        for role in ("base", "adapter", "merged")
    }
    originals = sample_examples(40)
    for place, detail in enumerate(page.details()):
        if detail.get("redacted"):
            continue
        assert detail["response"] == originals[place].response
        assert "".join(detail["pieces"]) == f"{originals[place].response}<end>"
        adapter, merged = ([-x for x in tables[role][place]["logprobs"]] for role in ("adapter", "merged"))
        assert detail["adapter"] == pytest.approx(adapter, rel=5e-3)
        moved = [right - left for left, right in zip(adapter, merged, strict=True)]
        assert detail["delta"] == pytest.approx(moved, rel=5e-2)


def test_without_timings_the_page_is_the_same_on_every_machine(run: Path) -> None:
    write_report(run, run.parent / "first.html", timings=False)
    timing = read_record(run / "timing.json", TimingRecord)
    slow = [stage.model_copy(update={"wall_seconds": 9e3, "started": "later"}) for stage in timing.stages]
    write_record(run / "timing.json", timing.model_copy(update={"stages": slow, "hardware": {"cores": 512}}))
    write_report(run, run.parent / "second.html", timings=False)
    assert (run.parent / "first.html").read_bytes() == (run.parent / "second.html").read_bytes()
    page = render(run)
    assert "2 h 30 min" in page.sections["time"]
    assert "512" in page.sections["time"]


def test_the_report_never_needs_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lorasmith.reporting.page import write_report; "
        f"write_report(Path({str(run)!r}), Path({str(run.parent / 'page.html')!r})); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_anchors_lead_somewhere_and_ids_are_unique(run: Path) -> None:
    page = render(run)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {(attrs["href"] or "")[1:] for tag, attrs in page.elements if tag == "a"}
    assert targets <= set(ids)
    script = page.scripts[-1][1]
    assert set(re.findall(r'\$\("([a-z-]+)"\)', script)) <= set(ids)


def test_another_base_than_the_adapters_is_told_on_the_first_screen(tmp_path: Path) -> None:
    run = sample_run(tmp_path / "run", count=5)
    path = run / "merged" / "lorasmith_merge.json"
    merge = read_record(path, MergeRecord)
    told = "the adapter was trained on <b>'other'</b>"
    findings = [
        Finding(severity="warning", code="base-name", message=told),
        Finding(severity="note", code="base-twin", message="of a quantized copy"),
    ]
    write_record(path, merge.model_copy(update={"findings": findings}))
    write_report(run, tmp_path / "page.html")
    hero = (tmp_path / "page.html").read_text().partition('<section id="gates">')[0]
    assert "The adapter was trained on &lt;b&gt;" in hero
    assert "of a quantized copy" not in hero

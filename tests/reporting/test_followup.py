"""What came after the release, on the page: every figure, drawn in a browser; nothing where nothing was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from lorasmith.errors import InputError
from lorasmith.files.run_layout import load_records
from lorasmith.machine.resources import human_bytes
from lorasmith.reporting.followup import followup_view, size_plot
from lorasmith.reporting.page import write_report
from tests.reporting.browser import CHROMIUM, Browser
from tests.reporting.followup_records import HOSTILE, add_followup, compressed
from tests.reporting.test_browser import CONTRAST, READY
from tests.reporting.test_page import Page
from tests.samples import sample_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = sample_run(tmp_path_factory.mktemp("after") / "run", count=20)
    add_followup(made)
    write_report(made, made.parent / "report.html")
    return made


def section(run: Path, *, timings: bool = True) -> str:
    """The words of the section, a space at every tag."""
    page = run.parent / f"page-{timings}.html"
    write_report(run, page, timings=timings)
    _, _, rest = page.read_text().partition('<section id="after">')
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", rest.partition("</section>")[0])).split())


def test_every_step_is_told_with_its_figures(run: Path) -> None:
    text = section(run)
    for told in (
        "responses 95", "ended by themselves 76 76.0 %", "cut off at the limit 19 19.0 %", "failed 5 5.0 %",
        "120 median; 3 to 256, 90 % up to 256", "0.475 rows/s 70.0 tokens/s, $0.50",
        "25.0 % of the target’s, cut from its layers 0, 3", "weights of step 20, stopped early",
        "before training 6.500", "after 2.250", "50.0 %", "classifier 70.0 % 0.650 0.110",
        "always “easy” 60.0 % 0.375", "does not pay", "23.5 tokens/s",
        "draft model, 4 tokens 7 1 0 45.0 % 1.50 20.0 0.845 1.10 0.900", "prompt lookup, 2 tokens",
        "1. gguf q8_0", human_bytes(113_000_000), "not measured",
        "all questions 40 50.0 % 40.0 % −10.0", "points −12.5 … +2.50",
        "domain anatomy 16 50.0 % 25.0 % −25.0 points",
    ):  # fmt: skip
        assert told in text, told


def test_a_page_without_timings_shows_no_speed(run: Path) -> None:
    text = section(run, timings=False)
    assert "rows/s" not in text and "tokens/s" not in text and "speed-up" not in text
    assert "ended by themselves 76" in text and "45.0 %" in text


def test_findings_of_the_steps_are_among_the_findings(run: Path) -> None:
    found = [(sources, finding.code) for sources, finding in load_records(run).findings()]
    assert (["responses"], "cut-off") in found


def test_a_run_without_such_steps_has_no_such_section(tmp_path: Path) -> None:
    run = sample_run(tmp_path / "run", count=5)
    write_report(run, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "after" not in page.sections
    assert followup_view(load_records(run).followup) is None


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    run = sample_run(tmp_path / "run", count=5)
    add_followup(run)
    (run / "followup" / "speculation.json").write_text("{}")
    with pytest.raises(InputError, match=r"speculation\.json"):
        write_report(run, tmp_path / "report.html")


def test_the_plot_puts_less_loss_lower_and_fewer_bytes_further_left() -> None:
    records = [compressed("big", 200_000_000, 0.001), compressed("small", 100_000_000, 0.3)]
    plot = size_plot(records)
    assert plot is not None
    big, small = plot.points
    assert (big.number, small.number) == (1, 2)
    assert big.right > small.right and big.up < small.up
    # Linear in bytes from 0 to the original's 269 MB (3 % margin on both sides), logarithmic in KL.
    assert small.right == pytest.approx(100 * (100 / 269 + 0.03) / 1.06, abs=0.01)
    assert size_plot([compressed("unmeasured", 1, None)]) is None


@pytest.fixture(scope="module")
def browser(run: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with Browser() as opened:
        opened.open(run.parent / "report.html")
        opened.until(READY)
        yield opened


def test_the_section_draws_without_an_error(browser: Browser) -> None:
    assert browser.problems == [] and len(browser.requests) == 1
    points = browser.run(
        "[...document.querySelectorAll('.scatter .point')].map(p => {"
        "const b = p.getBoundingClientRect(), s = p.parentElement.getBoundingClientRect();"
        "return [p.textContent, b.left >= s.left - 20 && b.right <= s.right + 20"
        " && b.top >= s.top - 20 && b.bottom <= s.bottom + 20]; })"
    )
    assert points == [["1", True], ["2", True]]
    # What the plot shows to the eye the table beside it says in words.
    assert browser.run("document.querySelector('.scatter').getAttribute('aria-hidden')") == "true"
    cells = browser.run(
        "[...document.querySelectorAll('#compressed table.rows tbody tr')].map(r => r.cells.length)"
    )
    assert cells == [8, 8, 8]


def test_strings_of_the_data_stay_text(browser: Browser) -> None:
    assert browser.run("document.querySelectorAll('#after img').length") == 0
    assert HOSTILE in browser.run("document.getElementById('draft').textContent")


def test_it_is_in_the_bar_and_its_details_open(browser: Browser) -> None:
    assert browser.run("!!document.querySelector('.bar nav a[href=\"#after\"]')")
    browser.run("document.querySelector('#speculation summary').click()")
    assert "place 4" in browser.run("document.querySelector('#speculation details').innerText")


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_and_a_phone_scrolls_one_way(run: Path, dark: bool) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with Browser(width=390, height=844, dark=dark) as phone:
        phone.open(run.parent / "report.html")
        phone.until(READY)
        assert phone.run("document.documentElement.scrollWidth") <= 390
        assert phone.run(CONTRAST) == []

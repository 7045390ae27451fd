"""The page in a real browser: no error, no request, filters that work, fluid with 5,000 examples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.reporting.page import write_report
from tests.reporting.browser import CHROMIUM, Browser
from tests.reporting.test_tasks import add_costs, add_tasks
from tests.samples import SECRET, sample_examples, sample_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

READY = "document.querySelectorAll('#list .row').length > 0 && !!document.querySelector('#detail .text')"
CHOOSE = """((id, value, kind = 'change') => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event(kind));
})"""
CONTRAST = """(() => {
  const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll('p, dt, dd, .badge, .word, th, td, h2, h3, a, label, button')) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) low.push([e.className || e.tagName, e.textContent.trim().slice(0, 30), ratio]);
  }
  return low;
})()"""
"""Elements whose text does not stand out, after the definition of contrast ratio in WCAG 2.2."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small run."""
    folder = tmp_path_factory.mktemp("page")
    run = sample_run(folder / "run", count=60)
    add_tasks(run)
    add_costs(run)
    write_report(run, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Browser]:
    """A browser on that page."""
    with Browser() as opened:
        opened.open(page)
        opened.until(READY)
        yield opened


def test_it_loads_without_an_error_and_asks_for_nothing(browser: Browser, page: Path) -> None:
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]


def test_a_request_from_within_is_refused(page: Path) -> None:
    with Browser() as fresh:
        fresh.open(page)
        fresh.run("{ const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i); }")
        fresh.run("fetch('http://127.0.0.1:9/').catch(() => 0)")
        fresh.run(
            "{ const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
            " document.body.append(s); }"
        )
        assert fresh.run("window.ran") is None, "a foreign script ran"
        assert sum("Content Security Policy" in problem for problem in fresh.problems) >= 3


def _count(browser: Browser) -> str:
    return str(browser.run("document.getElementById('f-count').textContent"))


def test_filters_and_search_narrow_the_list(browser: Browser) -> None:
    assert _count(browser) == "60 of 60 examples"
    browser.run(f"{CHOOSE}('f-source', '0')")
    assert _count(browser) == "12 of 60 examples"
    groups = browser.run("[...document.querySelectorAll('#list .group')].map(e => e.textContent)")
    assert all(group.startswith("DROP") for group in groups)
    browser.run(f"{CHOOSE}('f-verdict', 'worse')")
    assert _count(browser) == "0 of 60 examples"
    browser.run(f"{CHOOSE}('f-source', '')")
    browser.run(f"{CHOOSE}('f-verdict', 'flips')")
    assert _count(browser) == "10 of 60 examples"
    browser.run(f"{CHOOSE}('f-verdict', 'all')")
    rows = sample_examples(60)
    words = " ".join(rows[7].response.split()[:2])
    browser.run(f"{CHOOSE}('f-search', {words!r}, 'input')")
    browser.until("!document.getElementById('f-count').textContent.startsWith('60')")
    shown = [row for row in rows if row.metadata.source != "GPQA"]
    expected = sum(words in f"{row.prompt}\n{row.response}" for row in shown)
    assert _count(browser) == f"{expected} of 60 examples"
    browser.run(f"{CHOOSE}('f-search', '', 'input')")
    browser.until("document.getElementById('f-count').textContent.startsWith('60')")


def test_an_example_shows_its_tokens_in_colour_and_as_a_table(browser: Browser) -> None:
    browser.run("document.querySelectorAll('#list .row')[0].click()")
    browser.until("document.querySelectorAll('#detail .tok').length > 0")
    row = sample_examples(60)[0]
    assert browser.run("document.querySelector('#detail .text').textContent") == row.prompt
    tokens = browser.run("[...document.querySelectorAll('#detail .tok')].map(t => t.textContent)")
    assert "".join(tokens) == f"{row.response}<end>"
    before = browser.run("document.querySelector('.tok').style.background")
    browser.run("[...document.querySelectorAll('#detail .pick button')].at(-1).click()")
    browser.until(f"document.querySelector('.tok').style.background !== {before!r}")
    browser.run("document.querySelector('#detail summary').click()")
    browser.until(f"document.querySelectorAll('#detail tbody tr').length === {len(tokens)}")


def test_a_hidden_row_says_why(browser: Browser) -> None:
    browser.run("document.querySelectorAll('#list .row')[1].click()")
    browser.until("document.getElementById('detail').textContent.includes('must not be published')")
    assert SECRET not in browser.run("document.documentElement.outerHTML")


def test_a_point_of_the_map_opens_its_example(browser: Browser) -> None:
    browser.run("document.querySelectorAll('#list .row')[0].click()")
    box = browser.run(
        "(() => { const m = document.getElementById('map'); return [m.clientWidth, m.clientHeight]; })()"
    )
    picked = set()
    for across in range(1, 12):
        for up in range(1, 12):
            x, y = box[0] * across / 12, box[1] * up / 12
            browser.run(
                "(() => { const m = document.getElementById('map'), b = m.getBoundingClientRect();"
                "m.dispatchEvent(new MouseEvent('click',"
                f" {{clientX: b.left + {x}, clientY: b.top + {y}}})); }})()"
            )
            picked.add(browser.run("(document.querySelector('#list [aria-selected=true]') || {}).id"))
    assert len(picked) > 5


def test_a_group_leads_to_its_examples(browser: Browser) -> None:
    browser.run("document.querySelector('.group-link[data-name=MMLU]').click()")
    browser.until("document.getElementById('f-count').textContent === '12 of 60 examples'")
    browser.run(f"{CHOOSE}('f-source', '')")


def test_tables_sort_and_all_examples_stay_on_top(browser: Browser) -> None:
    table = "document.querySelector('#effect table')"
    names = f"[...{table}.tBodies[0].rows].map(row => row.cells[0].textContent.trim())"
    delta = f"{table}.tHead.rows[0].cells[3].querySelector('button')"
    browser.run(f"{delta}.click()")
    up = browser.run(names)
    browser.run(f"{delta}.click()")
    down = browser.run(names)
    assert up[0] == down[0] == "all examples"
    assert up[1:] == down[1:][::-1]
    assert sorted(up[1:]) == ["DROP", "GPQA", "HumanEval", "MATH", "MMLU"]


def test_keys_move_through_the_list_and_the_theme_turns(browser: Browser) -> None:
    browser.run(f"{CHOOSE}('f-order', 'file')")
    browser.run(
        "document.getElementById('list').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}))"
    )
    chosen = browser.run("document.querySelector('#list [aria-selected=true]').id")
    assert chosen == "ex-1"
    assert browser.run("document.getElementById('list').getAttribute('aria-activedescendant')") == chosen
    colour = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(colour)
    browser.run("document.getElementById('theme').click()")
    assert browser.run(colour) != light
    browser.run("document.getElementById('theme').click()")
    assert browser.run(colour) == light
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(page: Path, dark: bool) -> None:
    """WCAG 2.2, success criterion 1.4.3: a contrast of at least 4.5 for text."""
    with Browser(dark=dark) as opened:
        opened.open(page)
        opened.until(READY)
        assert opened.run(CONTRAST) == []


def test_a_phone_scrolls_in_one_direction_only(page: Path) -> None:
    with Browser(width=390, height=844) as phone:
        phone.open(page)
        phone.until(READY)
        assert phone.run("document.documentElement.scrollWidth") <= 390
        assert phone.problems == []


def test_print_shows_every_kind_of_group_and_no_controls(browser: Browser) -> None:
    visible = "[...document.querySelectorAll('#models .tab')].filter(e => e.getClientRects().length).length"
    assert browser.run(visible) == 1
    browser.emulate_media("print")
    try:
        assert browser.run(visible) == 3
        assert browser.run("document.querySelector('.bar').getClientRects().length") == 0
        assert browser.run("document.querySelector('.pick').getClientRects().length") == 0
    finally:
        browser.emulate_media("")


def test_5000_examples_stay_light_and_fluid(tmp_path: Path) -> None:
    run = sample_run(tmp_path / "run", rows=sample_examples(5000, words=200))
    write_report(run, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 15_000_000
    with Browser() as opened:
        began = time.monotonic()
        opened.open(tmp_path / "report.html")
        opened.until(READY)
        assert time.monotonic() - began < 10, "too slow to open, even for a busy machine"
        assert opened.run("document.querySelectorAll('*').length") < 6000
        longest = opened.run(
            """(async () => {
              const list = document.getElementById('list');
              let longest = 0;
              for (let i = 0; i < 40; i++) {
                const began = performance.now();
                list.scrollTop = i * 6400;
                await new Promise(requestAnimationFrame);
                await new Promise(requestAnimationFrame);
                longest = Math.max(longest, performance.now() - began);
              }
              return longest;
            })()"""
        )
        # Two frames take 33 ms; five times that leaves room for a busy machine and still catches a full
        # redraw.
        assert longest < 170
        assert opened.run("document.querySelectorAll('#list .row').length") < 40
        opened.run(f"{CHOOSE}('f-search', 'lemma', 'input')")
        opened.until("!document.getElementById('f-count').textContent.startsWith('5,000')")
        assert opened.problems == []

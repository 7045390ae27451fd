"""Progress where nothing can be drawn: through a pipe, and from another machine."""

from __future__ import annotations

import pytest

from lorasmith.cli.console import bar


def test_long_work_tells_now_and_then_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with bar("Score", total=100, unit="rows") as advance:
        for _ in range(10):  # a row a second
            now[0] += 10
            advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  Score: 30%, 30 rows, about 70 s left",
        "  Score: 60%, 60 rows, about 40 s left",
        "  Score: 90%, 90 rows, about 10 s left",
        "  Score: 100 rows in 100.0 s (1.0 rows/s)",
    ]
    with bar("Long", total=1000, unit="row") as advance:
        for seconds in (30, 3000):
            now[0] += seconds
            advance(1)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "  Long: 0%, 1 row, about 8.3 h left",
        "  Long: 0%, 2 row, about 420.0 h left",
    ]
    with bar("Short", total=10, unit="rows") as advance:
        advance(10)
    assert capsys.readouterr().err.count("\n") == 1
    with bar("Nothing", total=0, unit="row"):
        pass
    assert capsys.readouterr().err == ""

"""Packs: every token of every row, in its place, and what rows share only once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorasmith.models.batches import SHARED, make_pack, plan_packs
from lorasmith.models.text import Encoded

HEADS = [[7] * SHARED, [7] * SHARED + [8] * SHARED, list(range(3 * SHARED)), []]


@st.composite
def many_rows(draw: st.DrawFn) -> list[Encoded]:
    tails = st.lists(st.integers(1, 3), min_size=2, max_size=3 * SHARED)
    pairs = draw(st.lists(st.tuples(st.sampled_from(HEADS), tails), min_size=1, max_size=12))
    rows = [head + tail for head, tail in pairs]
    starts = [draw(st.integers(1, len(ids) - 1)) for ids in rows]
    return [Encoded.behind(ids, start) for ids, start in zip(rows, starts, strict=True)]


@given(many_rows())
def test_a_pack_holds_every_row_token_by_token(rows: list[Encoded]) -> None:
    pack = make_pack(range(len(rows)), rows)
    assert pack.places is not None
    ids, places = pack.ids[0].tolist(), pack.places[0].tolist()
    assert [at for piece in pack.pieces for at in range(piece.start, piece.stop)] == list(range(len(ids)))
    beginnings: dict[int, list[int]] = {}
    for piece in pack.pieces:
        path = [at for span in (*piece.before, (piece.start, piece.stop)) for at in range(*span)]
        assert [places[at] for at in path] == list(range(piece.end))
        beginnings.update({at: [ids[one] for one in path[: place + 1]] for place, at in enumerate(path)})
    positions = iter(pack.positions.tolist())
    targets = iter(pack.targets.tolist())
    for row, count in zip(rows, pack.counts, strict=True):
        assert count == row.scored
        for place in row.scored_at:
            # The position that predicts a token has exactly the tokens before it behind it.
            assert beginnings[next(positions)] == row.ids[:place]
            assert next(targets) == row.ids[place]


@given(many_rows(), st.integers(1, 100), st.one_of(st.none(), st.integers(1, 4)))
def test_packs_hold_every_row_once_within_the_budget(
    rows: list[Encoded], budget: int, most: int | None
) -> None:
    packs = plan_packs(rows, budget, most)
    assert sorted(row for pack in packs for row in pack) == list(range(len(rows)))
    longest = [max(len(rows[row].ids) for row in pack) for pack in packs]
    assert longest == sorted(longest, reverse=True)
    for pack in packs:
        assert most is None or len(pack) <= most
        # Beginnings that are too short for a piece are counted as shared all the same.
        slack = SHARED * (len(pack) - 1)
        assert len(pack) == 1 or make_pack(pack, rows).ids.shape[1] <= budget + slack


def test_what_rows_share_is_there_once() -> None:
    head, question = list(range(100, 130)), list(range(200, 220))
    tails = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    rows = [Encoded.behind(head + question + tail, 50) for tail in tails]
    rows.append(Encoded.behind([*head, 1, 1, 1], 30))
    pack = make_pack(range(4), rows)
    assert pack.ids.shape[1] == 30 + 20 + 3 + 2 + 4 + 3
    assert plan_packs(rows, 62) == [(3, 0, 1, 2)]
    assert [sorted(pack) for pack in plan_packs(rows, 61)] == [[2], [0, 1, 3]]

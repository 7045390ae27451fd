"""Shares add up, rare strata are kept, and the choice is the same everywhere."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.errors import UsageError
from lorasmith.testset.sampling import allocate, require_size, sort_key

COUNTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.integers(1, 500), min_size=1, max_size=30
)


@given(COUNTS, st.integers(1, 600))
def test_shares_add_up_and_never_exceed_what_is_there(rows: dict[str, int], size: int) -> None:
    shares = allocate(rows, size, 42)
    assert sum(shares.values()) == min(size, sum(rows.values()))
    assert all(0 <= shares[name] <= rows[name] for name in rows)


@given(COUNTS, st.integers(1, 600))
def test_every_share_is_within_one_of_its_quota(rows: dict[str, int], size: int) -> None:
    total = sum(rows.values())
    shares = allocate(rows, size, 42)
    for name, count in rows.items():
        assert abs(shares[name] - Fraction(min(size, total) * count, total)) < 1


def test_largest_remainders_worked_by_hand() -> None:
    # Quotas for 7 of 20: a 3.5, b 2.1, c 1.4: floors 3, 2, 1, and the seat left over goes to a.
    assert allocate({"a": 10, "b": 6, "c": 4}, 7, 42) == {"a": 4, "b": 2, "c": 1}


def test_ties_are_drawn_by_the_seed_so_that_no_name_always_wins() -> None:
    rows = dict.fromkeys("abcdefgh", 5)
    winners = [frozenset(n for n, share in allocate(rows, 2, seed).items() if share) for seed in range(40)]
    assert all(len(pair) == 2 for pair in winners)
    assert len(set(winners)) > 10
    assert allocate(rows, 2, 7) == allocate(dict(reversed(rows.items())), 2, 7)


def test_rare_strata_keep_one_row_where_the_size_allows() -> None:
    rows = {"common": 990, "rare": 5, "rarer": 5}
    keep = dict.fromkeys(rows, 1)
    assert allocate(rows, 10, 42) == {"common": 10, "rare": 0, "rarer": 0}
    assert allocate(rows, 10, 42, at_least=keep) == {"common": 8, "rare": 1, "rarer": 1}
    assert sum(allocate(rows, 2, 42, at_least=keep).values()) == 2


def test_limits_hold_and_the_rest_goes_elsewhere() -> None:
    assert allocate({"a": 100, "b": 100}, 50, 42, at_most={"a": 10, "b": 100}) == {"a": 10, "b": 40}


def test_the_order_is_pinned_so_that_every_machine_and_version_chooses_alike() -> None:
    key = sort_key(42, "MMLU", {"question": "Größe?", "answer": 1, "choices": ["a", "b"]})
    same = sort_key(42, "MMLU", {"choices": ["a", "b"], "answer": 1, "question": "Größe?"})
    assert key == same
    # SHA-256 of [42,"MMLU",{"answer":1,"choices":["a","b"],"question":"Gr\u00f6\u00dfe?"}] by sha256sum
    assert key.hex() == "819486cf464bf8227f9cba3e2dfd38e7a52f51e785e4ca69dda6e24a0500f791"


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_below_one_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        require_size(size, "the size")

"""Intervals and p-values that say what they claim to."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from lorasmith.models.statistics import clustered_error, group_rows, mean_interval, perplexity, sign_flip_p


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        tokens = generator.integers(1, 40, size=80).astype(float)
        interval = mean_interval(tokens * generator.normal(2.0, 1.0, size=80), tokens, trial)
        assert interval is not None
        hits += interval.low <= 2.0 <= interval.high
    # Binomial(200, 0.95) is above 178 with p > 0.9999; a percentile bootstrap of 80 examples is a bit short.
    assert 178 <= hits <= 199


def test_the_standard_error_of_a_ratio_matches_its_spread() -> None:
    generator = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(400):
        tokens = generator.integers(1, 40, size=100).astype(float)
        sums = tokens * generator.normal(2.0, 1.0, size=100)
        means.append(sums.sum() / tokens.sum())
        errors.append(clustered_error(sums, tokens))
    assert float(np.mean(errors)) == pytest.approx(float(np.std(means)), rel=0.1)


def test_the_same_seed_gives_the_same_interval() -> None:
    sums, tokens = np.arange(30.0), np.full(30, 3.0)
    assert mean_interval(sums, tokens, 5) == mean_interval(sums, tokens, 5)
    assert mean_interval(sums, tokens, 5) != mean_interval(sums, tokens, 6)


def test_one_example_has_no_interval() -> None:
    assert mean_interval(np.array([1.0]), np.array([2.0]), 0) is None
    assert clustered_error(np.array([1.0]), np.array([2.0])) is None


def test_sign_flips_give_uniform_p_without_effect_and_small_p_with_one() -> None:
    generator = np.random.default_rng(2)
    below = sum(sign_flip_p(generator.normal(0, 1, 30), trial, draws=400) < 0.1 for trial in range(300))
    assert 12 <= below <= 50  # Binomial(300, 0.1) within five standard deviations, cut at 12
    assert sign_flip_p(generator.normal(1, 1, 40), 0) < 0.01
    assert sign_flip_p(np.array([-5.0, -5.0]), 0) > 0.3  # two examples never convince


def test_perplexity_stays_a_number() -> None:
    assert perplexity(0.0) == 1.0
    assert np.isfinite(perplexity(5000.0))


def test_groups_and_crossings_hold_every_row_once() -> None:
    rows = [{"source": s, "domain": d, "difficulty": "hard"} for s, d in [("x", "p"), ("y", "p"), ("x", "q")]]
    grouped = group_rows(rows)
    assert grouped["source"] == {"x": [0, 2], "y": [1]}
    assert grouped["source × domain"] == {"x / p": [0], "x / q": [2], "y / p": [1]}
    assert all(sorted(chain.from_iterable(groups.values())) == [0, 1, 2] for groups in grouped.values())
    assert len(grouped) == 6

"""Intervals and aggregates against hand values and the published cross-check fixture."""

from __future__ import annotations

import numpy as np
import pytest

from ndp_gym.statistics import (
    ConversationBootstrap,
    interquartile_mean,
    interquartile_mean_interval,
    percentile_interval,
    probability_of_improvement,
)


def test_interquartile_mean_drops_a_quarter_on_each_side() -> None:
    # sorted 1 2 3 4 5 6 7 100: 1, 2 and 7, 100 are dropped, (3 + 4 + 5 + 6) / 4
    assert interquartile_mean([100, 1, 7, 2, 6, 3, 5, 4]) == 4.5
    assert interquartile_mean([3.0]) == 3.0
    assert interquartile_mean([1.0, 2.0, 6.0]) == 3.0  # floor(3 / 4) = 0: nothing is dropped


def test_interquartile_mean_matches_the_rliable_cross_check() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.7, 0.1, (10, 6)), rng.normal(0.6, 0.05, (10, 6))
    assert interquartile_mean(a) == pytest.approx(0.7060, abs=1e-4)
    assert interquartile_mean(b) == pytest.approx(0.6045, abs=1e-4)
    assert interquartile_mean_interval(a) == pytest.approx((0.6831, 0.7316), abs=0.003)
    assert interquartile_mean_interval(b) == pytest.approx((0.5904, 0.6195), abs=0.003)
    assert probability_of_improvement(a, b) == pytest.approx(0.8567, abs=1e-4)


def test_probability_of_improvement_counts_ties_as_one_half() -> None:
    # pairs (1,1) tie, (1,2) lose, (3,1) win, (3,2) win: (0.5 + 0 + 1 + 1) / 4
    assert probability_of_improvement([1, 3], [1, 2]) == 0.625


def test_bootstrap_weights_count_whole_conversations() -> None:
    weights = ConversationBootstrap(n_conversations=5, n_resamples=50, seed=3).weights()
    assert weights.shape == (50, 5)
    assert np.all(weights.sum(axis=1) == 5)
    expected = np.random.default_rng(3).integers(0, 5, size=(50, 5))
    assert weights[7].tolist() == [int(np.sum(expected[7] == c)) for c in range(5)]


def test_blocks_of_neighbours_are_drawn_whole_and_the_last_may_be_smaller() -> None:
    boot = ConversationBootstrap(n_conversations=5, block_size=2, n_resamples=50, seed=3)
    assert (boot.n_blocks, boot.weights().shape) == (3, (50, 3))
    drawn = np.random.default_rng(3).integers(0, 3, size=(50, 3))
    tokens, seconds = np.array([1 + 2, 4 + 8, 16]), np.array([2, 2, 1])
    expected = tokens[drawn].sum(axis=1) / seconds[drawn].sum(axis=1)
    assert boot.ratios([1, 2, 4, 8, 16], np.ones(5)) == pytest.approx(expected)
    one_by_one = ConversationBootstrap(n_conversations=5, block_size=1, seed=3)
    assert np.array_equal(
        one_by_one.weights(), ConversationBootstrap(n_conversations=5, seed=3).weights()
    )


def test_neighbours_that_share_their_seconds_need_blocks_for_an_honest_interval() -> None:
    """Four neighbours share one rate; drawn one by one, they look four times as many."""
    rng = np.random.default_rng(8)
    covered = {1: 0, 4: 0}
    for trial in range(200):
        seconds = rng.uniform(1, 3, 160)
        tokens = seconds * np.repeat(rng.normal(100, 20, 40), 4)
        for size in covered:
            boot = ConversationBootstrap(
                n_conversations=160, block_size=size, n_resamples=400, seed=trial
            )
            low, high = percentile_interval(boot.ratios(tokens, seconds))
            covered[size] += low <= 100 <= high
    assert 0.88 <= covered[4] / 200 <= 0.98
    assert covered[1] / 200 < 0.75


def test_ratio_is_a_ratio_of_sums_and_not_a_mean_of_ratios() -> None:
    # one conversation: every resample is the conversation itself, 30 tokens in 2 s
    one = ConversationBootstrap(n_conversations=1, n_resamples=4)
    assert one.ratios([30.0], [2.0]).tolist() == [15.0] * 4
    # two: only 10/1, (10 + 20)/(1 + 4) and 20/4 are possible; a mean of ratios would give 7.5
    two = ConversationBootstrap(n_conversations=2, n_resamples=400)
    assert set(two.ratios([10.0, 20.0], [1.0, 4.0]).tolist()) == {10.0, 6.0, 5.0}


def test_pairing_makes_a_constant_speedup_exact() -> None:
    """Twice as fast everywhere is exactly 2, though either rate alone is uncertain."""
    rng = np.random.default_rng(1)
    tokens, seconds = rng.integers(10, 90, 20), rng.uniform(1, 9, 20)
    boot = ConversationBootstrap(n_conversations=20, seed=9)
    slow, fast = boot.ratios(tokens, seconds), boot.ratios(tokens, seconds / 2)
    assert percentile_interval(fast / slow) == pytest.approx((2.0, 2.0), rel=1e-12)
    low, high = percentile_interval(slow)
    assert low < tokens.sum() / seconds.sum() < high


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        seconds = rng.uniform(1, 3, 24)
        tokens = seconds * rng.normal(100, 20, 24)
        boot = ConversationBootstrap(n_conversations=24, n_resamples=400, seed=trial)
        low, high = percentile_interval(boot.ratios(tokens, seconds))
        covered += low <= 100 <= high
    assert 0.88 <= covered / 200 <= 0.98


def test_same_seed_gives_the_same_interval() -> None:
    boot = ConversationBootstrap(n_conversations=3, seed=1)
    first = boot.ratios([1, 2, 3], [1, 1, 2])
    assert np.array_equal(
        first, ConversationBootstrap(n_conversations=3, seed=1).ratios([1, 2, 3], [1, 1, 2])
    )


def test_percentile_interval_of_known_replicates() -> None:
    assert percentile_interval(np.arange(101.0), level=0.9) == pytest.approx((5.0, 95.0))
    assert percentile_interval([1.0, np.nan, 1.0]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConversationBootstrap(n_conversations=0), "n_conversations must be at least 1"),
        (
            lambda: ConversationBootstrap(n_conversations=2, block_size=0),
            "block_size must be at least 1",
        ),
        (
            lambda: ConversationBootstrap(n_conversations=2, n_resamples=0),
            "n_resamples must be at least 1",
        ),
        (
            lambda: ConversationBootstrap(n_conversations=2).ratios([1.0], [1.0, 1.0]),
            "numerator must have one value",
        ),
        (lambda: percentile_interval([np.nan]), "at least one finite replicate"),
        (lambda: percentile_interval([1.0], level=1.0), "level must be in"),
        (lambda: interquartile_mean([]), "at least one score"),
        (lambda: probability_of_improvement(np.ones((2, 2)), np.ones((2, 3))), "same tasks"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()

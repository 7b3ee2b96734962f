"""mdf_benchmarks.latency.statistics: against scipy, by simulation, and by law."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import quantile_test

from mdf_benchmarks.latency.statistics import (
    PERCENTILES,
    overlap,
    percentile_interval,
    ratio_interval,
    rounds_interval,
    summarize,
)
from mdf_benchmarks.latency.timing import ROUNDS


def test_percentiles_are_times_that_occurred() -> None:
    summary = summarize(np.arange(1.0, 101.0)[::-1])
    found = {key: summary[f"{key}_ms"] for key in ("min", "mean", *PERCENTILES)}
    assert found == {"min": 1, "mean": 50.5, "p50": 50, "p90": 90, "p95": 95, "p99": 99}
    assert summary["n"] == 100


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=200))
def test_percentiles_are_in_order_inside_their_intervals_and_cover_their_share(
    values: list[float],
) -> None:
    samples = np.array(values)
    summary = summarize(samples)
    percentiles = [summary[f"{name}_ms"] for name in PERCENTILES]
    assert [summary["min_ms"], *percentiles] == sorted([summary["min_ms"], *percentiles])
    assert set(percentiles) <= set(values)
    for (name, share), value in zip(PERCENTILES.items(), percentiles, strict=True):
        assert (samples <= value).mean() >= share
        low, high = summary[f"{name}_interval_ms"]
        assert low is None or low <= value
        assert high is None or value <= high


@pytest.mark.parametrize("n", [3, 6, 50, 333, 1024])
@pytest.mark.parametrize("share", PERCENTILES.values())
def test_intervals_of_percentiles_are_scipys(n: int, share: float) -> None:
    samples = np.random.default_rng(n).gamma(2.0, size=n)
    expected = quantile_test(samples, p=share).confidence_interval(0.95)
    found = [np.nan if end is None else end for end in percentile_interval(samples, share)]
    np.testing.assert_array_equal(found, [expected.low, expected.high])


def test_the_interval_over_rounds_holds_when_the_machine_drifts_and_the_plain_one_does_not() -> (
    None
):
    rng = np.random.default_rng(0)
    held = {"rounds": 0, "plain": 0}
    runs = 400
    for _ in range(runs):
        pace = 10 + rng.normal(0, 0.5, ROUNDS)  # of each round; the true median is 10
        rounds = [rng.normal(level, 0.2, 100) for level in pace]
        for name, (low, high) in (
            ("rounds", rounds_interval(rounds)),
            ("plain", percentile_interval(np.concatenate(rounds), 0.5)),
        ):
            assert low is not None
            assert high is not None
            held[name] += low <= 10 <= high
    assert held["rounds"] / runs >= 0.95
    assert held["plain"] / runs < 0.5


def test_two_runs_on_a_drifting_machine_overlap() -> None:
    rng = np.random.default_rng(1)

    def run() -> list[float | None]:
        return rounds_interval(
            [rng.normal(10 + rng.normal(0, 0.5), 0.2, 50) for _ in range(ROUNDS)]
        )

    assert np.mean([overlap(run(), run()) for _ in range(400)]) >= 0.99


def test_a_ratio_is_exact_where_times_are_and_its_interval_widens_with_noise() -> None:
    ones, threes = [np.ones(5)] * ROUNDS, [np.full(5, 3.0)] * ROUNDS
    assert ratio_interval(threes, ones) == (3.0, 3.0, 3.0)
    rng = np.random.default_rng(2)
    noisy = [rng.normal(3, 0.3, 5) for _ in range(ROUNDS)]
    ratio, low, high = ratio_interval(noisy, ones)
    assert low < ratio < high
    assert 2.5 < low < 3 < high < 3.5


def test_what_met_both_of_a_pair_is_in_neither_ratio_nor_interval() -> None:
    rng = np.random.default_rng(3)
    pace = rng.uniform(1, 3, ROUNDS)
    ours, theirs = ([factor * level * np.ones(5) for level in pace] for factor in (1.0, 2.0))
    assert ratio_interval(theirs, ours, paired=True) == (2.0, 2.0, 2.0)
    _, low, high = ratio_interval(theirs, ours)
    assert high - low > 0.5


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 2.0], [2.0, 3.0], True),
        ([1.0, 2.0], [2.1, 3.0], False),
        ([2.1, 3.0], [1.0, 2.0], False),
        ([None, 2.0], [1.0, None], True),
        ([2.1, None], [None, 2.0], False),
    ],
)
def test_an_open_end_reaches_everything(
    one: list[float | None], other: list[float | None], expected: bool
) -> None:
    assert overlap(one, other) is expected

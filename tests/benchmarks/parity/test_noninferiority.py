"""mdf_benchmarks.parity.noninferiority against independent implementations, and by simulation."""

import math
from functools import cache

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from mdf_benchmarks.parity.noninferiority import (
    PairedCounts,
    cases_expected,
    cases_needed,
    flip_bound,
    newcombe_interval,
    noninferiority_p,
    score_statistic,
    upper_bound,
)
from mdf_training.evaluation.statistics import exact_mcnemar

TABLES = [
    PairedCounts(59, 6, 16, 80),
    PairedCounts(1, 1, 7, 12),
    PairedCounts(180, 4, 6, 10),
    PairedCounts(0, 5, 9, 3),
    PairedCounts(150, 0, 0, 0),
    PairedCounts(118, 0, 0, 32),
]


def test_counts_are_those_of_the_answers() -> None:
    ours = np.array([True, True, False, False, True])
    theirs = np.array([True, False, True, False, True])
    counts = PairedCounts.of(ours, theirs)
    assert counts == PairedCounts(2, 1, 1, 1)
    assert (counts.n, counts.difference) == (5, 0.0)


def test_newcombes_interval_is_the_published_one() -> None:
    """Cavo et al. (2012), as Fagerland, Lydersen and Laake (2017) work it out: -0.1186, -0.0046."""
    low, high = newcombe_interval(PairedCounts(59, 6, 16, 80))
    assert (round(low, 4), round(high, 4)) == (-0.1186, -0.0046)


@pytest.mark.parametrize("counts", TABLES)
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_newcombes_interval_agrees_with_wilson_limits_of_statsmodels(
    counts: PairedCounts, confidence: float
) -> None:
    a, b, c, d, n = (
        counts.both,
        counts.only_candidate,
        counts.only_reference,
        counts.neither,
        counts.n,
    )
    p, q = (a + b) / n, (a + c) / n
    (l1, u1), (l2, u2) = (
        proportion_confint(k, n, 1 - confidence, method="wilson") for k in (a + b, a + c)
    )
    phi = 0.0
    if min(a + b, c + d, a + c, b + d) > 0:
        x = np.repeat([1, 1, 0, 0], [a, b, c, d])
        y = np.repeat([1, 0, 1, 0], [a, b, c, d])
        spread = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
        phi = float(np.corrcoef(x, y)[0, 1])
        phi = max(phi - n / 2 / spread, 0.0) if phi > 0 else phi
    low = p - q - math.sqrt((p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2)
    high = p - q + math.sqrt((q - l2) ** 2 - 2 * phi * (q - l2) * (u1 - p) + (u1 - p) ** 2)
    assert newcombe_interval(counts, confidence) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("counts", TABLES[:4])
@pytest.mark.parametrize("margin", [0.02, 0.1])
def test_the_score_statistic_has_the_likeliest_rates_under_the_hypothesis(
    counts: PairedCounts, margin: float
) -> None:
    b, c, n = counts.only_candidate, counts.only_reference, counts.n

    def unlikelihood(rate: float) -> float:  # of `only the candidate right`
        return -float(
            stats.multinomial.logpmf(
                [b, c, n - b - c], n, [rate, rate + margin, 1 - 2 * rate - margin]
            )
        )

    found = optimize.minimize_scalar(
        unlikelihood,
        bounds=(1e-12, (1 - margin) / 2 - 1e-12),
        method="bounded",
        options={"xatol": 1e-12},
    )
    variance = n * (2 * found.x + margin - margin**2)
    expected = (b - c + n * margin) / math.sqrt(variance)
    assert float(score_statistic(b, c, n, margin)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("b", "c", "n"), [(0, 0, 20), (1, 0, 20), (2, 1, 25), (0, 3, 25), (4, 4, 30)]
)
def test_the_exact_p_is_that_of_every_table(b: int, c: int, n: int) -> None:
    margin = 0.1
    observed = float(score_statistic(b, c, n, margin))
    tables = [(i, j) for i in range(n + 1) for j in range(n + 1 - i)]
    extreme = [
        [i, j, n - i - j] for i, j in tables if score_statistic(i, j, n, margin) >= observed - 1e-9
    ]
    rates = np.linspace(0, (1 - margin) / 2, 400)
    largest = max(
        float(stats.multinomial.pmf(extreme, n, [r, r + margin, max(0, 1 - 2 * r - margin)]).sum())
        for r in rates
    )
    found = noninferiority_p(PairedCounts(n - b - c, b, c, 0), margin)
    assert found == pytest.approx(largest, rel=2e-3)


@cache
def p_of(b: int, c: int, n: int, margin: float) -> float:
    return noninferiority_p(PairedCounts(n - b - c, b, c, 0), margin)


@pytest.mark.parametrize("only_candidate", [0.0, 0.005, 0.05])
def test_the_test_holds_its_error_rate_where_newcombes_limit_does_not(
    only_candidate: float,
) -> None:
    """Candidates that are just as much worse as the margin; accuracy 0.7, 200 cases."""
    n, margin, draws = 200, 0.02, 4000
    rates = [0.7 - only_candidate - margin, only_candidate, only_candidate + margin]
    tables = np.random.default_rng(1).multinomial(n, [*rates, 1 - sum(rates)], draws)
    shown = np.array([p_of(int(b), int(c), n, margin) <= 0.05 for _, b, c, _ in tables])
    # Two standard errors of 4,000 draws above 5 %.
    assert shown.mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / draws)
    if only_candidate == 0:
        limits = [newcombe_interval(PairedCounts(*map(int, t)), 0.9)[0] for t in tables]
        assert np.mean(np.array(limits) > -margin) == pytest.approx(0.089, abs=0.01)


def test_the_test_shows_what_is_there() -> None:
    """Equally good models that differ in 1 % of 1,000 cases pass nearly always."""
    tables = np.random.default_rng(2).multinomial(1000, [0.9, 0.005, 0.005, 0.09], 200)
    shown = [p_of(int(b), int(c), 1000, 0.02) <= 0.05 for _, b, c, _ in tables]
    assert np.mean(shown) > 0.95


def test_more_wrong_answers_never_help() -> None:
    falling = [p_of(b, 5, 200, 0.05) for b in range(12)]
    rising = [p_of(5, c, 200, 0.05) for c in range(12)]
    assert falling == sorted(falling, reverse=True)
    assert rising == sorted(rising)


@pytest.mark.parametrize(("margin", "confidence", "n"), [(0.02, 0.95, 149), (0.05, 0.95, 59)])
def test_the_cases_that_a_margin_needs(margin: float, confidence: float, n: int) -> None:
    """As many as make a rate of one-sided errors of that size improbable: log 0.05 / log 0.98."""
    assert cases_needed(margin, confidence) == n
    assert n == math.ceil(math.log(1 - confidence) / math.log(1 - margin))
    assert p_of(0, 0, n, margin) <= 1 - confidence < p_of(0, 0, n - 1, margin)


def test_the_cases_that_the_observed_rates_need() -> None:
    counts = PairedCounts(180, 4, 6, 10)
    n = cases_expected(counts, 0.02, 0.95)
    assert n is not None
    assert noninferiority_p(counts, 0.02) > 0.05
    scaled = PairedCounts(*(round(k * n / counts.n) for k in (180, 4, 6, 10)))
    assert noninferiority_p(scaled, 0.02) == pytest.approx(0.05, abs=0.01)
    assert cases_expected(PairedCounts(180, 0, 10, 10), 0.02, 0.95) is None


@pytest.mark.parametrize(("flips", "n"), [(0, 150), (1, 150), (7, 20), (20, 20)])
def test_the_bound_of_flips_is_clopper_and_pearsons(flips: int, n: int) -> None:
    bound = flip_bound(flips, n, 0.95)
    ours = stats.binomtest(flips, n, alternative="less").proportion_ci(0.95, "exact").high
    assert bound["upper"] == pytest.approx(ours)
    _, theirs = proportion_confint(flips, n, 0.1, method="beta")
    assert upper_bound(flips, n, 0.95) == pytest.approx(theirs)
    assert bound["rule_of_three"] == (3 / n if flips == 0 else None)
    if flips == 0:
        assert bound["upper"] <= bound["rule_of_three"]


@pytest.mark.parametrize("counts", TABLES)
def test_mcnemars_p_is_that_of_statsmodels_and_scipy(counts: PairedCounts) -> None:
    a, b, c, d = counts.both, counts.only_candidate, counts.only_reference, counts.neither
    ours = np.repeat([True, True, False, False], [a, b, c, d])
    theirs = np.repeat([True, False, True, False], [a, b, c, d])
    p = exact_mcnemar(ours, theirs)
    assert p == pytest.approx(min(1.0, mcnemar([[a, b], [c, d]], exact=True).pvalue))
    if b + c:
        assert p == pytest.approx(stats.binomtest(b, b + c).pvalue)

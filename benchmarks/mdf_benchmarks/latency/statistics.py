"""Times in, percentiles with intervals out; numpy alone."""

from collections.abc import Sequence
from itertools import accumulate
from math import exp, lgamma, log, log1p
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float64]

CONFIDENCE = 0.95
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_RESAMPLES = 2000
_SEED = 20261127


def summarize(samples_ms: Samples) -> dict[str, Any]:
    """Percentiles by nearest rank (each is a time that occurred), each with its interval.

    Args:
        samples_ms: float64 (n,), n > 0.

    Returns:
        `min_ms`, `mean_ms`, `n`, and for 50, 90, 95 and 99 `p50_ms` and `p50_interval_ms`, as
        `percentile_interval` has it.
    """
    ordered = np.sort(samples_ms)
    summary: dict[str, Any] = {"min_ms": float(ordered[0]), "mean_ms": float(ordered.mean())}
    for name, share in PERCENTILES.items():
        summary[f"{name}_ms"] = percentile(ordered, share)
        summary[f"{name}_interval_ms"] = percentile_interval(ordered, share)
    return {**summary, "n": len(ordered)}


def percentile(samples: Samples, share: float) -> float:
    """Return the least sample that a share of all does not exceed."""
    return float(np.percentile(samples, 100 * share, method="inverted_cdf"))


def percentile_interval(samples: Samples, share: float) -> list[float | None]:
    """95 % interval of a percentile, from order statistics: no distribution is assumed.

    The number of samples below the true percentile is binomial, so two ranks enclose it with a
    known probability (David and Nagaraja, Order Statistics, 7.1). It takes the samples to be
    independent of each other; `rounds_interval` does not.

    Returns:
        [low, high]; None where so few samples give no bound.
    """
    n, tail = len(samples), (1 - CONFIDENCE) / 2
    below = [min(p, 1.0) for p in accumulate(_binomial(n, share))]  # below[k]: P(at most k)
    low = max((k for k in range(1, n + 1) if below[k - 1] <= tail), default=0)
    high = min((k for k in range(1, n + 1) if 1 - below[k - 1] <= tail), default=n + 1)
    ordered = np.sort(samples)
    return [
        float(ordered[low - 1]) if low else None,
        float(ordered[high - 1]) if high <= n else None,
    ]


def rounds_interval(rounds: Sequence[Samples]) -> list[float | None]:
    """95 % interval of the median when what disturbs the machine lasts longer than a call.

    Neighboring calls meet the same clock and the same other programs; rounds, between which other
    work lies, less so. This is the interval of `percentile_interval` over the rounds' medians.
    """
    return percentile_interval(np.array([percentile(times, 0.5) for times in rounds]), 0.5)


def ratio_interval(
    slower: Sequence[Samples], faster: Sequence[Samples], *, paired: bool = False
) -> tuple[float, float, float]:
    """How many times as long one takes: ratio of the medians, and its 95 % interval.

    Bootstrap over rounds (Field and Welsh, 2007): a round is drawn whole, with all that its calls
    have in common.

    Args:
        slower, faster: the rounds of each.
        paired: rounds of the same number ran in turn, and are drawn together.

    Returns:
        (ratio, low, high).
    """
    rng = np.random.default_rng(_SEED)
    ratios = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        over = rng.integers(len(slower), size=len(slower))
        under = over if paired else rng.integers(len(faster), size=len(faster))
        ratios[i] = _median([slower[k] for k in over]) / _median([faster[k] for k in under])
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return _median(slower) / _median(faster), float(low), float(high)


def overlap(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    """Whether two intervals have a point in common; an open end reaches everything."""
    (a, b), (c, d) = one, other
    return not (
        (b is not None and c is not None and b < c) or (d is not None and a is not None and d < a)
    )


def _median(rounds: Sequence[Samples]) -> float:
    return percentile(np.concatenate(rounds), 0.5)


def _binomial(n: int, share: float) -> list[float]:
    """Probabilities of 0 to n successes."""
    whole = lgamma(n + 1)
    return [
        exp(whole - lgamma(k + 1) - lgamma(n - k + 1) + k * log(share) + (n - k) * log1p(-share))
        for k in range(n + 1)
    ]

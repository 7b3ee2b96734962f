"""Two models' right and wrong answers on the same cases in; what that proves, out."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from mdf_training.evaluation.statistics import Bool, Interval, Proportion

_NUISANCE = 200  # values of the unknown rate that the exact test tries
_MOST_TERMS = 2_000_000  # that are held in memory at a time
_MOST_CASES = 1_000_000
_TIE = 1e-9  # two statistics closer than this are one, computed in two ways


@dataclass(frozen=True)
class PairedCounts:
    """How often both models, one of them, or neither was right."""

    both: int
    only_candidate: int
    only_reference: int
    neither: int

    @classmethod
    def of(cls, candidate: Bool, reference: Bool) -> "PairedCounts":
        """Count bool (N,): True where a model is right."""
        return cls(
            both=int((candidate & reference).sum()),
            only_candidate=int((candidate & ~reference).sum()),
            only_reference=int((~candidate & reference).sum()),
            neither=int((~candidate & ~reference).sum()),
        )

    @property
    def n(self) -> int:
        return self.both + self.only_candidate + self.only_reference + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus that of the reference."""
        return (self.only_candidate - self.only_reference) / self.n


def newcombe_interval(counts: PairedCounts, confidence: float = 0.95) -> Interval:
    """Two-sided interval of the difference: method 10 of Newcombe (1998), paired.

    Wilson's limits of both accuracies, squared and added, with the correlation of the answers.
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    a, b, c, d = counts.both, counts.only_candidate, counts.only_reference, counts.neither
    ours, theirs = Proportion(a + b, counts.n), Proportion(a + c, counts.n)
    (low_1, high_1), (low_2, high_2) = ours.interval(z), theirs.interval(z)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    product: float = a * d - b * c
    if product > 0:  # his correction for continuity
        product = max(product - counts.n / 2, 0)
    phi = product / math.sqrt(margins) if margins else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    return (
        counts.difference - reach(ours.value - low_1, high_2 - theirs.value),
        counts.difference + reach(high_1 - ours.value, theirs.value - low_2),
    )


def score_statistic(
    only_candidate: npt.ArrayLike, only_reference: npt.ArrayLike, n: int, margin: float
) -> npt.NDArray[np.float64]:
    """Return z of Tango (1998): by how much the difference lies above -margin.

    Standard errors are counted under the hypothesis that it is -margin.
    """
    b, c = np.asarray(only_candidate, np.float64), np.asarray(only_reference, np.float64)
    linear = -b - c - (2 * n - b + c) * margin
    rate = (np.sqrt(linear**2 - 8 * n * c * margin * (1 + margin)) - linear) / (4 * n)
    variance = n * (2 * rate - margin * (1 + margin))
    z: npt.NDArray[np.float64] = (b - c + n * margin) / np.sqrt(variance)
    return z


def noninferiority_p(counts: PairedCounts, margin: float) -> float:
    """p of the hypothesis that the candidate's accuracy is lower by `margin` or more.

    The exact unconditional test on Tango's statistic (Hsueh, Liu and Chen, 2001): the largest
    probability of a statistic as large, over every rate at which the two may disagree. So it errs
    in no more cases than it says, however few disagree. Newcombe's limit does: at 200 cases, an
    accuracy of 0.7 and a margin of 0.02 it would pass 8.9 % of candidates that are 0.02 worse.
    Cases count as independent.
    """
    n = counts.n
    observed = float(score_statistic(counts.only_candidate, counts.only_reference, n, margin))
    only_reference = np.arange(n + 1)
    # For each, the least number of cases right in the candidate alone that says as much: the
    # statistic grows with it.
    low, high = np.zeros(n + 1, np.int64), n - only_reference + 1
    while (low < high).any():
        middle = (low + high) // 2
        enough = score_statistic(middle, only_reference, n, margin) >= observed - _TIE
        low, high = (
            np.where(enough | (low == high), low, middle + 1),
            np.where(enough, middle, high),
        )
    rates = np.linspace(0, 1, _NUISANCE)[:, None] ** 2 * (1 - margin) / 2
    largest = 0.0
    for candidate in np.array_split(rates, math.ceil(rates.size * n / _MOST_TERMS)):
        reference = candidate + margin
        first = stats.binom.pmf(only_reference, n, reference)
        then = stats.binom.sf(low - 1, n - only_reference, (candidate / (1 - reference)).clip(0, 1))
        largest = max(largest, float((first * then).sum(axis=1).max()))
    return min(1.0, largest)


def cases_needed(margin: float, confidence: float) -> int:
    """Return the fewest cases that show the margin where the two models never differ."""

    def suffice(n: int) -> bool:
        return noninferiority_p(PairedCounts(n, 0, 0, 0), margin) <= 1 - confidence

    # Below that, even no flip at all is likely: (1 - margin) ** n.
    n = math.ceil(math.log(1 - confidence) / math.log1p(-margin))
    while not suffice(n):
        n += 1
    return n


def cases_expected(counts: PairedCounts, margin: float, confidence: float) -> int | None:
    """Return about how many cases would show it at the rates that were observed.

    At given rates the statistic grows with the root of the cases. None where the difference is
    beyond the margin, and no number of cases would.
    """
    z = float(score_statistic(counts.only_candidate, counts.only_reference, counts.n, margin))
    needed = float(stats.norm.ppf(confidence))
    if z <= 0 or counts.n * (needed / z) ** 2 > _MOST_CASES:
        return None
    return max(cases_needed(margin, confidence), math.ceil(counts.n * (needed / z) ** 2))


def upper_bound(found: int, n: int, confidence: float) -> float:
    """One-sided upper limit of a rate: Clopper and Pearson (1934), exact."""
    return 1.0 if found == n else float(stats.beta.ppf(confidence, found + 1, n - found))


def flip_bound(flips: int, n: int, confidence: float) -> dict[str, Any]:
    """Say what so many flips in n cases prove of the rate of flips.

    `rule_of_three` is 3 / n, what is known by heart at 95 %; None where there are flips.
    """
    return {
        "flips": flips,
        "n": n,
        "confidence": confidence,
        "upper": upper_bound(flips, n, confidence),
        "rule_of_three": min(1.0, 3 / n) if flips == 0 else None,
    }

"""Cases' decisions in; figures, 95 % intervals and paired tests out. Needs numpy alone.

Cases of one patient hang together: every bootstrap here draws whole groups.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Interval = tuple[float, float]
RESAMPLES = 2000
CALIBRATION_BINS = 15  # as Guo et al. (2017)


@dataclass(frozen=True)
class Proportion:
    """`correct` of `n`, with its 95 % Wilson score interval."""

    correct: int
    n: int

    @classmethod
    def of(cls, correct: Bool) -> "Proportion":
        """Count the true ones of bool (N,)."""
        return cls(int(correct.sum()), len(correct))

    @property
    def value(self) -> float:
        return self.correct / self.n

    def interval(self, z: float = 1.959964) -> Interval:
        """Wilson (1927), eq. as in Brown, Cai and DasGupta (2001)."""
        p, n = self.value, self.n
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, center - half), min(1.0, center + half)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; the interval as [low, high]."""
        return {
            "value": self.value,
            "interval_95": list(self.interval()),
            "correct": self.correct,
            "n": self.n,
        }


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    interval_95: Interval

    def to_dict(self) -> dict[str, Any]:
        """JSON types; the interval as [low, high]."""
        return {"value": self.value, "interval_95": list(self.interval_95)}


@dataclass(frozen=True)
class PairedDifference:
    """Two models on the same cases: accuracy of a minus accuracy of b.

    Attributes:
        value: the difference.
        interval_95: of a bootstrap that draws patients with both models' answers.
        only_a, only_b: cases that one of the two alone has right.
        n: cases.
        mcnemar_p: exact and two-sided; it takes every case for independent, the interval does not.
    """

    value: float
    interval_95: Interval
    only_a: int
    only_b: int
    n: int
    mcnemar_p: float

    def to_dict(self) -> dict[str, Any]:
        """JSON types; the interval as [low, high]."""
        return {**asdict(self), "interval_95": list(self.interval_95)}


def bootstrap_interval(
    values: npt.NDArray[Any],
    statistic: Callable[[npt.NDArray[Any]], float],
    groups: Sequence[Any] | None = None,
    *,
    strata: Sequence[Any] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Two-sided percentile bootstrap (Efron, 1979) of a statistic of cases.

    It cannot show an error that never occurred: where all cases are alike it has no width, and for
    a proportion Wilson's interval is the honest one.

    Args:
        values: (N, ...), a row for each case.
        statistic: of the rows drawn, such as np.mean.
        groups: (N,), whose case it is: whole groups are drawn. Each case its own when left out.
        strata: (N,), such as the true labels: each stratum's groups are drawn apart, so that no
            draw lacks one. A group of several strata is a stratum with others of just these.
    """
    n = len(values)
    _, group = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    _, stratum = np.unique(np.zeros(n) if strata is None else strata, return_inverse=True)
    membership = np.zeros((group.max() + 1, stratum.max() + 1), np.bool_)
    membership[group, stratum] = True
    _, kind = np.unique(membership, axis=0, return_inverse=True)
    draws = np.zeros((resamples, len(membership)), np.int64)  # how often each group is drawn
    rng = np.random.default_rng(seed)
    for k in range(kind.max() + 1):
        members = np.flatnonzero(kind == k)
        share = np.full(len(members), 1 / len(members))
        draws[:, members] = rng.multinomial(len(members), share, resamples)
    found = [statistic(values[np.repeat(np.arange(n), drawn[group])]) for drawn in draws]
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def estimate_mean(values: Float64, groups: Sequence[Any] | None = None) -> Estimate:
    """Average of (N,) over cases, with its bootstrap interval; groups as `bootstrap_interval`'s."""
    return Estimate(float(values.mean()), bootstrap_interval(values, np.mean, groups))


def balanced_accuracy(truth: Int64, predicted: Int64) -> float:
    """Mean over the true classes of the share that was recognized; labels int64 (N,)."""
    return float(np.mean([(predicted[truth == k] == k).mean() for k in np.unique(truth)]))


def estimate_balanced_accuracy(truth: Int64, predicted: Int64, groups: Sequence[Any]) -> Estimate:
    """Balanced accuracy, with an interval that a class without an error does not make narrow.

    The wider on either side of two: the bootstrap, which draws the groups of each class apart, and
    the classes' Wilson intervals joined (MOVER; Zou and Donner, 2008), which take every case for
    independent but know of errors that have not occurred yet.
    """
    value = balanced_accuracy(truth, predicted)
    low, high = bootstrap_interval(
        np.stack([truth, predicted], axis=1),
        lambda rows: balanced_accuracy(rows[:, 0], rows[:, 1]),
        groups,
        strata=truth.tolist(),
    )
    shares = [Proportion.of(predicted[truth == k] == k) for k in np.unique(truth)]
    down, up = (
        math.hypot(*(p.interval()[side] - p.value for p in shares)) / len(shares) for side in (0, 1)
    )
    return Estimate(value, (min(low, value - down), max(high, value + up)))


def balanced_accuracy_difference(
    truth: Int64, a: Int64, b: Int64, groups: Sequence[Any]
) -> Estimate:
    """Balanced accuracy of a minus that of b on the same cases, paired in every draw.

    Args:
        truth, a, b: int64 (N,), the true labels and what each model chose.
        groups: (N,), the patients.
    """

    def difference(rows: Int64) -> float:
        true, ours, theirs = rows.T
        return balanced_accuracy(true, ours) - balanced_accuracy(true, theirs)

    rows = np.stack([truth, a, b], axis=1)
    interval = bootstrap_interval(rows, difference, groups, strata=truth.tolist())
    return Estimate(difference(rows), interval)


def paired_difference(
    correct_a: Bool, correct_b: Bool, groups: Sequence[Any] | None = None
) -> PairedDifference:
    """Compare the accuracies of two models on the same cases.

    Args:
        correct_a, correct_b: bool (N,).
        groups: (N,), the patients; every case a patient of its own when left out.
    """
    difference = correct_a.astype(np.float64) - correct_b
    mean = estimate_mean(difference, groups)
    only_a, only_b = int((difference > 0).sum()), int((difference < 0).sum())
    return PairedDifference(
        value=mean.value,
        interval_95=mean.interval_95,
        only_a=only_a,
        only_b=only_b,
        n=len(difference),
        mcnemar_p=exact_mcnemar(correct_a, correct_b),
    )


def exact_mcnemar(correct_a: Bool, correct_b: Bool) -> float:
    """Two-sided p of McNemar (1947), exact: of the cases that one model alone has right, is it a
    coin's toss which one has?

    Args:
        correct_a, correct_b: bool (N,); every case is taken for independent.
    """
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def log_probabilities(scores: npt.NDArray[np.floating[Any]], temperature: float) -> Float64:
    """Normalize label scores (N, K) after the temperature, as `Prediction` does."""
    scaled = scores.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    result: Float64 = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return result


def kl_divergences(reference: Float64, candidate: Float64) -> Float64:
    """KL(reference || candidate) by case (N,), in nats, from log-probabilities (N, K)."""
    result: Float64 = (np.exp(reference) * (reference - candidate)).sum(axis=1)
    return result


def reliability(
    probabilities: Float64, truth: Int64, bins: int = CALIBRATION_BINS
) -> tuple[Int64, Float64, Float64]:
    """Group cases by their confidence in the chosen label: how sure, and how often right?

    Bins of equal mass (Nguyen and O'Connor, 2015): bins of equal width are nearly all empty where a
    model is sure of itself.

    Args:
        probabilities: (N, K).
        truth: int64 (N,).

    Returns:
        Of each bin that holds a case: cases, mean confidence, accuracy.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == truth
    starts = np.arange(1, bins) * len(truth) // bins
    # Equal confidences share a bin: cut by their order, each bin would have an accuracy of its own.
    part = np.searchsorted(np.sort(confidence)[starts], confidence, side="right")
    counts = np.bincount(part, minlength=bins)
    sums = [np.bincount(part, values, minlength=bins) for values in (confidence, correct)]
    held = counts > 0
    return counts[held], sums[0][held] / counts[held], sums[1][held] / counts[held]


def expected_calibration_error(
    probabilities: Float64, truth: Int64, bins: int = CALIBRATION_BINS
) -> float:
    """Mean gap between confidence in the chosen label and its accuracy.

    Eq. 3 of Guo et al. (2017), over the bins of `reliability`.

    Args:
        probabilities: (N, K).
        truth: int64 (N,).
    """
    counts, confidence, accuracy = reliability(probabilities, truth, bins)
    return float((counts * np.abs(confidence - accuracy)).sum() / len(truth))


def brier_score(probabilities: Float64, truth: Int64) -> float:
    """Brier (1950): squared error summed over the labels, mean over cases; 0 to 2.

    Args:
        probabilities: (N, K).
        truth: int64 (N,).
    """
    hit = np.eye(probabilities.shape[1])[truth]
    return float(((probabilities - hit) ** 2).sum(axis=1).mean())


def negative_log_likelihood(log_probs: Float64, truth: Int64) -> float:
    """Mean of -log p of the true label, in nats, from log-probabilities (N, K)."""
    return float(-log_probs[np.arange(len(truth)), truth].mean())

"""Label scores of a model and of its reference in, how far their decisions are apart out."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mdf_training.evaluation.statistics import Estimate

Scores = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
RESAMPLES = 2000
CALIBRATION_BINS = 10  # each of as many cases, by rising confidence
_SEED = 0


def divergences(reference: Float64, candidate: Float64) -> Float64:
    """KL(reference || candidate) of each case, in nats.

    Args:
        reference, candidate: log-probabilities (N, K).
    """
    result: Float64 = (np.exp(reference) * (reference - candidate)).sum(axis=1)
    return result


def bootstrap_mean(values: Float64, patients: Sequence[str]) -> Estimate:
    """Average over cases; whole patients are drawn, as their cases hang together.

    Percentile bootstrap (Efron, 1979) of RESAMPLES draws from a fixed seed.
    """
    names, group = np.unique(np.asarray(patients), return_inverse=True)
    sums, sizes = np.bincount(group, values), np.bincount(group)
    draws = np.random.default_rng(_SEED).multinomial(
        len(names), np.full(len(names), 1 / len(names)), RESAMPLES
    )
    low, high = np.percentile((draws @ sums) / (draws @ sizes), [2.5, 97.5])
    return Estimate(float(values.mean()), (float(low), float(high)))


def calibration_error(log_probabilities: Float64, truth: npt.NDArray[np.int64]) -> float:
    """Expected calibration error of the chosen label (Guo et al., 2017), bins of equal mass."""
    confidence = np.exp(log_probabilities.max(axis=1))
    correct = log_probabilities.argmax(axis=1) == truth
    bins = np.array_split(np.argsort(confidence, kind="stable"), CALIBRATION_BINS)
    gaps = [abs(float((confidence[b] - correct[b]).sum())) for b in bins]
    return sum(gaps) / len(truth)

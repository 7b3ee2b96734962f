"""evaluation.statistics: against scipy, scikit-learn and tables made by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from mdf_training.evaluation.statistics import (
    Proportion,
    balanced_accuracy,
    balanced_accuracy_difference,
    bootstrap_interval,
    brier_score,
    estimate_balanced_accuracy,
    estimate_mean,
    exact_mcnemar,
    expected_calibration_error,
    kl_divergences,
    log_probabilities,
    negative_log_likelihood,
    paired_difference,
    reliability,
)

RNG = np.random.default_rng(0)
TRUTH = RNG.integers(0, 3, 300)
A = np.where(RNG.random(300) < 0.8, TRUTH, RNG.integers(0, 3, 300))
B = np.where(RNG.random(300) < 0.6, TRUTH, RNG.integers(0, 3, 300))


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # statsmodels 0.15.0, proportion_confint(method="wilson")
    [(50, 100, 0.403832, 0.596168), (0, 10, 0.0, 0.277533), (998, 1000, 0.992737, 0.999451)],
)
def test_the_wilson_interval_is_that_of_an_independent_implementation(
    correct: int, n: int, low: float, high: float
) -> None:
    assert Proportion(correct, n).interval() == pytest.approx((low, high), abs=1e-6)


def test_the_bootstrap_of_a_mean_is_scipys() -> None:
    values = RNG.exponential(size=200)
    ours = bootstrap_interval(values, np.mean, resamples=5000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # Both are random: two runs of scipy with other seeds differ by up to 0.006.
    assert ours == pytest.approx(tuple(theirs), abs=0.015)


def test_a_lower_confidence_narrows_a_bootstrap() -> None:
    values = RNG.normal(size=200)
    half = stats.norm.ppf(0.95) * values.std() / np.sqrt(200)
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_interval(values, np.mean, confidence=0.9) == pytest.approx(expected, abs=0.02)


def test_eyes_that_agree_do_not_count_twice() -> None:
    values = RNG.normal(size=100)
    both_eyes, patients = np.repeat(values, 2), np.repeat(np.arange(100), 2)
    grouped = bootstrap_interval(both_eyes, np.mean, patients.tolist())
    assert grouped == pytest.approx(bootstrap_interval(values, np.mean))
    naive = bootstrap_interval(both_eyes, np.mean)
    assert np.diff(naive)[0] == pytest.approx(np.diff(grouped)[0] / np.sqrt(2), rel=0.1)


def test_a_mean_has_the_interval_of_the_normal_law() -> None:
    values = np.random.default_rng(5).normal(3.0, 1.0, 400)
    mean = estimate_mean(values, range(400))
    half = 1.96 * values.std() / 20
    assert mean.value == pytest.approx(values.mean())
    assert mean.interval_95 == pytest.approx((mean.value - half, mean.value + half), abs=0.02)
    assert mean == estimate_mean(values, range(400))


def test_two_eyes_of_a_patient_do_not_make_a_mean_surer() -> None:
    values = np.random.default_rng(5).normal(3.0, 1.0, 100)
    eyes, patients = values.repeat(2), np.arange(100).repeat(2)
    once, paired, strangers = (
        np.array(estimate_mean(*of).interval_95)
        for of in ((values, range(100)), (eyes, patients.tolist()), (eyes, range(200)))
    )
    assert paired == pytest.approx(once)
    assert np.ptp(paired) > 1.2 * np.ptp(strangers)


def test_no_draw_lacks_a_stratum() -> None:
    values = np.array([0] * 50 + [1])
    seen = []
    bootstrap_interval(values, lambda v: float(seen.append(v.sum()) or 0), strata=values.tolist())
    assert set(seen) == {1}


def test_a_bootstrap_repeats_itself() -> None:
    values = RNG.normal(size=30)
    assert bootstrap_interval(values, np.median) == bootstrap_interval(values, np.median)


def test_balanced_accuracy_is_scikit_learns() -> None:
    assert balanced_accuracy(TRUTH, A) == pytest.approx(metrics.balanced_accuracy_score(TRUTH, A))
    found = estimate_balanced_accuracy(TRUTH, A, range(300))
    assert found.interval_95[0] < found.value < found.interval_95[1]


def test_the_interval_of_balanced_accuracy_is_that_of_its_variance() -> None:
    """Classes are drawn apart: the variance is the mean of the classes' over K."""
    found = estimate_balanced_accuracy(TRUTH, A, range(300))
    shares = [(A[k == TRUTH] == k) for k in range(3)]
    deviation = np.sqrt(sum(s.var() / len(s) for s in shares)) / 3
    width = found.interval_95[1] - found.interval_95[0]
    assert width == pytest.approx(2 * 1.96 * deviation, rel=0.07)


def test_balanced_accuracy_without_an_error_is_not_certain() -> None:
    truth = np.repeat([0, 1], 20)
    found = estimate_balanced_accuracy(truth, truth, range(40))
    assert found.interval_95[1] == 1
    assert found.interval_95[0] == pytest.approx(
        1 - (1 - Proportion(20, 20).interval()[0]) / 2**0.5
    )


def test_balanced_accuracy_of_few_patients_with_many_cases_is_wide() -> None:
    patients = np.repeat(np.arange(20), 15)
    truth, predicted = patients % 2, np.where(patients < 4, 1 - patients % 2, patients % 2)
    low, high = estimate_balanced_accuracy(truth, predicted, patients.tolist()).interval_95
    assert (
        high - low
        > 2 * np.diff(estimate_balanced_accuracy(truth, predicted, range(300)).interval_95)[0]
    )


def test_a_difference_of_balanced_accuracies_is_paired() -> None:
    found = balanced_accuracy_difference(TRUTH, A, B, range(300))
    assert found.value == pytest.approx(balanced_accuracy(TRUTH, A) - balanced_accuracy(TRUTH, B))
    assert found.interval_95[0] > 0
    same = balanced_accuracy_difference(TRUTH, A, A, range(300))
    assert (same.value, same.interval_95) == (0, (0, 0))


def test_a_paired_difference_counts_the_cases_that_one_model_alone_has_right() -> None:
    a, b = np.array([1, 1, 1, 0, 1, 0], np.bool_), np.array([1, 0, 0, 1, 1, 0], np.bool_)
    found = paired_difference(a, b)
    assert (found.only_a, found.only_b, found.n) == (2, 1, 6)
    assert found.value == pytest.approx(1 / 6)
    assert found.to_dict()["interval_95"] == list(found.interval_95)


def test_the_interval_of_a_paired_difference_is_that_of_its_variance() -> None:
    a, b = A == TRUTH, B == TRUTH
    found = paired_difference(a, b)
    difference = a.astype(float) - b
    half = 1.96 * difference.std() / np.sqrt(300)
    assert found.interval_95 == pytest.approx(
        (found.value - half, found.value + half), abs=0.1 * half
    )


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_scipys_binomial_test(only_a: int, only_b: int) -> None:
    a, b = (
        np.repeat([True, False, True], [only_a, only_b, 7]),
        np.repeat([False, True, True], [only_a, only_b, 7]),
    )
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert exact_mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_calibration_error_of_a_table_made_by_hand() -> None:
    # Two bins: confidence 0.6 with half right, confidence 0.9 with all right.
    probabilities = np.array([[0.6, 0.4]] * 2 + [[0.1, 0.9]] * 2)
    truth = np.array([0, 1, 1, 1])
    assert expected_calibration_error(probabilities, truth, bins=2) == pytest.approx(0.1)
    assert expected_calibration_error(probabilities, truth, bins=1) == pytest.approx(0.0)


def test_more_bins_than_cases_do_no_harm() -> None:
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9]])
    assert expected_calibration_error(probabilities, np.array([0, 0])) == pytest.approx(0.65)


def test_equal_confidences_share_a_bin() -> None:
    probabilities = np.tile([0.5, 0.5], (40, 1))
    truth = np.repeat([0, 1], 20)  # in the order of the cases, bins would be all right or all wrong
    assert expected_calibration_error(probabilities, truth) == pytest.approx(0.0)


def test_reliability_counts_every_case_once() -> None:
    probabilities = np.exp(log_probabilities(RNG.normal(size=(300, 3)).astype(np.float32), 0.7))
    counts, confidence, accuracy = reliability(probabilities, TRUTH)
    assert counts.tolist() == [20] * 15
    assert (np.diff(confidence) > 0).all()
    assert (counts * confidence).sum() == pytest.approx(probabilities.max(axis=1).sum())
    right = probabilities.argmax(axis=1) == TRUTH
    assert (counts * accuracy).sum() == pytest.approx(right.sum())


def test_the_bins_of_the_calibration_error_are_of_equal_mass() -> None:
    confidence = np.sort(RNG.uniform(0.5, 1, 90))
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    truth = RNG.integers(0, 2, 90)
    bins = zip(confidence.reshape(15, 6), (truth == 0).reshape(15, 6), strict=True)
    expected = np.mean([abs(c.mean() - hit.mean()) for c, hit in bins])
    assert expected_calibration_error(probabilities, truth) == pytest.approx(expected)


def test_the_brier_score_and_the_likelihood_are_scikit_learns() -> None:
    logs = log_probabilities(RNG.normal(size=(300, 3)).astype(np.float32), 0.7)
    probabilities = np.exp(logs)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(300))
    assert brier_score(probabilities, TRUTH) == pytest.approx(
        metrics.brier_score_loss(TRUTH, probabilities, labels=[0, 1, 2])
    )
    assert negative_log_likelihood(logs, TRUTH) == pytest.approx(
        metrics.log_loss(TRUTH, probabilities)
    )


def test_a_temperature_keeps_the_order_of_the_labels() -> None:
    scores = RNG.normal(size=(50, 4)).astype(np.float32)
    hot = log_probabilities(scores, 5.0)
    assert (hot.argmax(axis=1) == scores.argmax(axis=1)).all()
    assert hot.max() < log_probabilities(scores, 1.0).max()


def test_temperature_flattens_probabilities() -> None:
    scores = np.array([[-1.0, -3.0]], np.float32)
    np.testing.assert_allclose(np.exp(log_probabilities(scores, 2.0))[0, 0], 1 / (1 + math.exp(-1)))


def test_the_divergence_of_two_coins_is_the_formulas() -> None:
    fair, bent = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_divergences(fair, bent)[0] == pytest.approx(expected)
    assert kl_divergences(fair, fair)[0] == 0


@given(st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6), st.floats(0.2, 5))
def test_a_divergence_is_never_negative(values: list[float], temperature: float) -> None:
    scores = np.array(values, np.float32).reshape(2, 3)
    first, second = log_probabilities(scores, temperature)
    assert kl_divergences(first[None], second[None])[0] >= -1e-12


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    sure, truth = np.tile([[0.8, 0.2]], (100, 1)), np.tile([0, 0, 0, 0, 1], 20)
    assert expected_calibration_error(sure, truth) == pytest.approx(0, abs=1e-9)
    assert expected_calibration_error(sure, np.ones(100, np.int64)) == pytest.approx(0.8)

"""mdf_export.proof.decisions: what two models' scores say of each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdf_export.proof.decisions import (
    bootstrap_mean,
    calibration_error,
    divergences,
)
from mdf_training.evaluation.statistics import log_probabilities


def test_the_divergence_of_two_coins_is_the_formulas() -> None:
    fair, bent = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergences(fair, bent)[0] == pytest.approx(expected)
    assert divergences(fair, fair)[0] == 0


@given(st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6), st.floats(0.2, 5))
def test_a_divergence_is_never_negative(values: list[float], temperature: float) -> None:
    scores = np.array(values, np.float32).reshape(2, 3)
    first, second = log_probabilities(scores, temperature)
    assert divergences(first[None], second[None])[0] >= -1e-12


def test_temperature_flattens_probabilities() -> None:
    scores = np.array([[-1.0, -3.0]], np.float32)
    np.testing.assert_allclose(np.exp(log_probabilities(scores, 2.0))[0, 0], 1 / (1 + math.exp(-1)))


def test_a_bootstrap_interval_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(5).normal(3.0, 1.0, 400)
    mean = bootstrap_mean(values, [str(i) for i in range(400)])
    half = 1.96 * values.std() / 20
    assert mean.value == pytest.approx(values.mean())
    assert mean.interval_95 == pytest.approx((mean.value - half, mean.value + half), abs=0.02)
    assert mean == bootstrap_mean(values, [str(i) for i in range(400)])


def test_two_eyes_of_a_patient_do_not_make_an_interval_narrower() -> None:
    values = np.random.default_rng(5).normal(3.0, 1.0, 100)
    eyes, patients = values.repeat(2), np.arange(100).repeat(2).astype(str).tolist()
    once = bootstrap_mean(values, np.arange(100).astype(str).tolist())
    paired, strangers = (
        bootstrap_mean(eyes, patients),
        bootstrap_mean(eyes, [str(i) for i in range(200)]),
    )
    assert paired.interval_95 == pytest.approx(once.interval_95)
    assert np.ptp(paired.interval_95) > 1.2 * np.ptp(strangers.interval_95)


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    sure = np.log(np.tile([[0.8, 0.2]], (100, 1)))
    truth = np.tile([0, 0, 0, 0, 1], 20)
    assert calibration_error(sure, truth) == pytest.approx(0, abs=1e-9)
    assert calibration_error(sure, np.ones(100, np.int64)) == pytest.approx(0.8)

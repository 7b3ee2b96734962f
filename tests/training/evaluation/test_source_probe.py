"""evaluation.source_probe: what features say of the source, within a class, across patients."""

import numpy as np
import pytest

from mdf_training.evaluation.source_probe import MIN_PATIENTS, probe_sources

RNG = np.random.default_rng(0)
N = 120
LABELS = ["AMD"] * 60 + ["Glaucoma"] * 60
SOURCES = ["A", "B"] * 60
PATIENTS = [str(i) for i in range(N)]
NOISE = RNG.normal(size=(N, 5)).astype(np.float32)


def test_a_source_in_the_features_is_told() -> None:
    features = NOISE + 5 * np.array([[s == "A"] for s in SOURCES], np.float32)
    report = probe_sources(features, LABELS, SOURCES, PATIENTS)
    assert list(report) == ["AMD", "Glaucoma"]
    for found in report.values():
        assert found["balanced_accuracy"]["value"] > 0.95
        assert found["sources"] == {"A": 30, "B": 30}
        assert (found["chance"], found["largest_share"]) == (0.5, 0.5)


def test_the_class_is_no_cue() -> None:
    """Features that tell the class, and sources of which each has mostly one class."""
    features = NOISE + 5 * np.array([[label == "AMD"] for label in LABELS], np.float32)
    sources = ["A"] * 45 + ["B"] * 30 + ["A"] * 15 + ["B"] * 30
    for found in probe_sources(features, LABELS, sources, PATIENTS).values():
        low, high = found["balanced_accuracy"]["interval_95"]
        assert low < 0.5 < high


def test_a_patient_is_never_on_both_sides() -> None:
    """Features that name the patient, five eyes each: seen before, each would be told."""
    patients = np.repeat(np.arange(24), 5)
    sources = np.where(RNG.permutation(24) % 2, "A", "B")[patients].tolist()
    features = 5 * np.eye(24, dtype=np.float32)[patients] + 0.01 * NOISE[:, :1]
    report = probe_sources(features, ["AMD"] * N, sources, [str(p) for p in patients])
    assert report["AMD"]["balanced_accuracy"]["value"] < 0.7


def test_a_large_source_does_not_make_a_good_probe() -> None:
    sources = ["B" if i % 5 == 0 else "A" for i in range(N)]
    found = probe_sources(NOISE, ["AMD"] * N, sources, PATIENTS)["AMD"]
    assert found["largest_share"] == 0.8
    assert found["balanced_accuracy"]["interval_95"][0] < 0.5


def test_a_weak_cue_for_a_small_source_is_found() -> None:
    sources = ["B" if i % 10 == 0 else "A" for i in range(N)]
    features = NOISE.copy()
    features[::10, 0] += 1.5
    found = probe_sources(features, ["AMD"] * N, sources, PATIENTS)["AMD"]
    assert found["balanced_accuracy"]["interval_95"][0] > 0.6  # 0.50 if sources are not weighed


def test_a_source_of_few_patients_and_a_class_of_one_source_are_left_out() -> None:
    sources = ["A"] * 30 + ["B"] * (30 - MIN_PATIENTS + 1) + ["C"] * (MIN_PATIENTS - 1) + ["A"] * 60
    report = probe_sources(NOISE, LABELS, sources, PATIENTS)
    assert list(report) == ["AMD"]
    assert list(report["AMD"]["sources"]) == ["A", "B"]


def test_a_probe_repeats_itself() -> None:
    first, second = (probe_sources(NOISE, LABELS, SOURCES, PATIENTS) for _ in range(2))
    assert first == second
    assert first["AMD"]["accuracy"]["n"] == 60
    assert first["AMD"]["accuracy"]["value"] == pytest.approx(
        first["AMD"]["balanced_accuracy"]["value"]  # as many cases of either
    )

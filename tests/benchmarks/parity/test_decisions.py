"""mdf_benchmarks.parity.decisions: what label scores say of an engine, and how surely."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from mdf_benchmarks.parity.controls import CONTROLS
from mdf_benchmarks.parity.decisions import (
    Thresholds,
    check_decisions,
    check_scores,
    check_sensitivity,
    margins,
)
from mdf_benchmarks.parity.reference import Reference
from mdf_sdk.errors import DataError, InputError
from mdf_training.data.cases import Row
from mdf_training.evaluation.evaluate import Scores


def toy(reference: Reference, right: int, wrong: int, *, patients: int | None = None) -> Reference:
    """A reference of two labels that is right in the first cases and sure of everything."""
    n = right + wrong
    labels = reference.checkpoint.config.labels
    truth = np.arange(n) % 2
    chosen = np.where(np.arange(n) < right, truth, 1 - truth)
    scores = np.where(np.eye(2)[chosen] > 0, -0.1, -3.0).astype(np.float32)
    rows = [
        Row(f"{i}.png", labels[truth[i]], "text", str(i % (patients or n)), "x") for i in range(n)
    ]
    return replace(reference, data=Rows(rows), truth=truth, scores=scores)


class Rows:
    """A data set without pictures."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.labels = tuple(sorted({row.label for row in rows}))
        self.mask_kinds = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> None:
        raise AssertionError("no picture is asked for")


def flipped(scores: Scores, *cases: int) -> Scores:
    changed = scores.copy()
    changed[list(cases)] = changed[list(cases), ::-1]
    return changed


def test_the_same_answers_are_non_inferior_with_enough_cases(reference: Reference) -> None:
    model = toy(reference, 140, 10)
    check = check_decisions(model, model.scores, Thresholds())
    assert check.ok
    assert check.results["agreement"]["correct"] == 150
    assert check.results["flip_bound"]["upper"] == pytest.approx(1 - 0.05 ** (1 / 150))
    assert check.results["flip_bound"]["rule_of_three"] == 0.02


def test_a_single_loss_is_listed_and_too_much_for_150_cases(reference: Reference) -> None:
    model = toy(reference, 140, 10)
    check = check_decisions(model, flipped(model.scores, 3), Thresholds())
    assert not check.ok
    assert check.results["flips"] == [
        {
            "file": "3.png",
            "truth": "Inherited",
            "reference_label": "Inherited",
            "engine_label": "Acquired",
        }
    ]
    assert check.results["paired"]["only_reference_right"] == 1
    assert "some 2" in check.faults[0].found  # at that rate about 220 cases would do
    assert check.results["noninferiority"]["shown"] is False


def test_wins_do_not_hide_losses(reference: Reference) -> None:
    model = toy(reference, 400, 100)
    scores = flipped(model.scores, *range(20), *range(400, 420))
    check = check_decisions(model, scores, Thresholds())
    assert check.results["accuracy_difference"]["value"] == 0
    assert check.results["agreement"]["correct"] == 460
    assert not check.ok  # 20 against 20 leaves room for a margin of 0.02


def test_a_patient_of_many_photographs_is_no_crowd(reference: Reference) -> None:
    """12 losses in 1,000 cases pass, unless they are those of one patient in 50."""
    model = toy(reference, 950, 50)
    losses = flipped(model.scores, *range(0, 12 * 50, 50))
    alone = check_decisions(model, losses, Thresholds(0.025))
    crowd = check_decisions(toy(reference, 950, 50, patients=50), losses, Thresholds(0.025))
    assert alone.ok
    assert [fault.where for fault in crowd.faults] == ["non-inferiority over patients"]


def test_too_few_cases_are_an_error_that_counts_them() -> None:
    Thresholds().check_cases(149)
    with pytest.raises(DataError, match="found 148 cases, expected at least 149"):
        Thresholds().check_cases(148)


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.0, float("nan")])
def test_a_margin_that_declares_nothing_is_refused(margin: float) -> None:
    with pytest.raises(InputError, match="margin"):
        Thresholds(margin=margin)


def test_a_margin_is_of_the_label_against_the_best_other() -> None:
    logs = np.log([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    np.testing.assert_allclose(
        margins(logs, np.array([0, 1])), [np.log(0.5 / 0.3), np.log(0.2 / 0.6)]
    )


def test_the_divergence_is_that_of_scipy(reference: Reference) -> None:
    moved = reference.scores + np.array([0.3, -0.2], np.float32)
    results = check_scores(reference, moved, 1.0).results

    def probabilities(scores: Scores) -> np.ndarray:
        return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)

    expected = jensenshannon(probabilities(reference.scores), probabilities(moved), axis=1) ** 2
    assert results["jensen_shannon_nats"]["value"] == pytest.approx(expected.mean(), rel=1e-4)
    assert results["margin_shift_nats"]["mean_abs"] == pytest.approx(0.5, rel=1e-4)
    shifts = [abs(case["shift_nats"]) for case in results["worst_cases"]]
    assert len(shifts) == 10
    assert shifts == sorted(shifts, reverse=True)


def test_a_flip_is_a_shift_beyond_the_margin(reference: Reference) -> None:
    worst = check_scores(reference, flipped(reference.scores, 5), 1.0).results["worst_cases"][0]
    assert worst["index"] == 5
    assert worst["engine_label"] != worst["reference_label"]
    assert worst["shift_nats"] == pytest.approx(-2 * worst["reference_margin_nats"])


def test_a_reference_that_ignores_the_photograph_is_named(reference: Reference) -> None:
    whole = reference.scores[reference.control_indices]
    dead = {**reference.controls, "blank_image": whole}
    check = check_sensitivity(
        replace(reference, controls=dead), reference.scores, reference.controls, 1.0
    )
    assert [fault.where for fault in check.faults] == ["reference, blank image"]
    assert "it is dead to what was changed" in check.faults[0].found


def test_an_engine_that_is_half_as_alive_is_named(reference: Reference) -> None:
    whole = reference.scores[reference.control_indices]
    weak = {name: whole + (scores - whole) * 0.3 for name, scores in reference.controls.items()}
    check = check_sensitivity(reference, reference.scores, weak, 1.0)
    assert [fault.where for fault in check.faults] == [
        f"engine, {name.replace('_', ' ')}" for name in CONTROLS
    ]
    assert "0.30 times as far" in check.faults[0].found

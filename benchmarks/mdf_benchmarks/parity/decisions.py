"""Label scores of an engine and of its reference in; scores, decisions and their proof, out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdf_benchmarks.parity.checks import DEAD_SHIFT, SHIFT_RATIO, Check, Fault
from mdf_benchmarks.parity.controls import CONTROLS
from mdf_benchmarks.parity.noninferiority import (
    PairedCounts,
    cases_expected,
    cases_needed,
    flip_bound,
    newcombe_interval,
    noninferiority_p,
)
from mdf_benchmarks.parity.reference import Reference
from mdf_sdk.errors import DataError, InputError
from mdf_training.evaluation.evaluate import Scores, calibration
from mdf_training.evaluation.statistics import (
    Float64,
    Int64,
    Proportion,
    bootstrap_interval,
    estimate_mean,
    exact_mcnemar,
    kl_divergences,
    log_probabilities,
    reliability,
)

WORST_CASES = 10
LEAST_MARGIN = 0.001  # needs 2,995 cases; a smaller one, more than any clinic has


@dataclass(frozen=True)
class Thresholds:
    """What is declared before anything is measured.

    Attributes:
        margin: by how much the engine's accuracy may be lower.
        confidence: one-sided, of everything that is shown.
    """

    margin: float = 0.02
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Raise InputError for a value that declares nothing."""
        if not LEAST_MARGIN <= self.margin < 1:
            raise InputError(
                f"margin: found {self.margin:g}, expected at least {LEAST_MARGIN:g} and less than 1"
            )
        if not 0.5 < self.confidence < 1:
            raise InputError(
                f"confidence: found {self.confidence:g}, expected more than 0.5 and less than 1"
            )

    def check_cases(self, n: int) -> None:
        """Raise DataError where so few cases cannot show the margin, whatever they say."""
        needed = cases_needed(self.margin, self.confidence)
        if n < needed:
            raise DataError(
                f"data: found {n} cases, expected at least {needed}: fewer cannot show a margin of "
                f"{self.margin:g} at {self.confidence:.4g} confidence, even if no label differs. "
                "Pass more cases, or declare a wider margin: --margin"
            )


def margins(log_probs: Float64, label: Int64) -> Float64:
    """Return log p of a label less that of the best other one, by case, in nats (N,).

    Args:
        log_probs: (N, K).
        label: int64 (N,).
    """
    rows = np.arange(len(label))
    others = log_probs.copy()
    others[rows, label] = -np.inf
    result: Float64 = log_probs[rows, label] - others.max(axis=1)
    return result


def check_sensitivity(
    reference: Reference,
    scores: Scores,
    controls: Mapping[str, Scores],
    temperature: float,
) -> Check:
    """Show that photograph and text move the scores, in the reference and in the engine alike."""
    chosen = reference.control_indices
    label = reference.scores[chosen].argmax(axis=1)

    def shift(whole: Scores, changed: Scores, at: float) -> float:
        before, after = (
            margins(log_probabilities(each, at), label) for each in (whole[chosen], changed)
        )
        return float(np.abs(after - before).mean())

    faults, results = [], {}
    for name in CONTROLS:
        own_temperature = reference.checkpoint.config.temperature
        theirs = shift(reference.scores, reference.controls[name], own_temperature)
        ours = shift(scores, controls[name], temperature)
        words = name.replace("_", " ")
        for who, value in (("reference", theirs), ("engine", ours)):
            if not value > DEAD_SHIFT:
                faults.append(
                    Fault(
                        f"{who}, {words}",
                        f"scores that move by {value:.1e} nats: it is dead to what was changed",
                        f"more than {DEAD_SHIFT:g}",
                    )
                )
        alive = min(ours, theirs) > DEAD_SHIFT
        if alive and not 1 / SHIFT_RATIO <= ours / theirs <= SHIFT_RATIO:
            faults.append(
                Fault(
                    f"engine, {words}",
                    f"scores that move {ours / theirs:.2f} times as far as the reference's",
                    f"{1 / SHIFT_RATIO:g} to {SHIFT_RATIO:g} times",
                )
            )
        results[name] = {"reference_shift_nats": theirs, "engine_shift_nats": ours}
    return Check("sensitivity", tuple(faults), {"cases": len(chosen), "controls": results})


def check_scores(reference: Reference, scores: Scores, temperature: float) -> Check:
    """Say how far the probabilities are apart, and how well either can be believed."""
    own_temperature = reference.checkpoint.config.temperature
    theirs, ours = (
        log_probabilities(reference.scores, own_temperature),
        log_probabilities(scores, temperature),
    )
    faults = []
    if temperature != own_temperature:
        faults.append(Fault("temperature", f"{temperature:.6g}", f"{own_temperature:.6g}"))
    kl = kl_divergences(theirs, ours)
    middle = np.logaddexp(theirs, ours) - np.log(2)
    js = (kl_divergences(theirs, middle) + kl_divergences(ours, middle)) / 2
    shift = _margin_shift(theirs, ours)
    results = {
        "kl_nats": {**estimate_mean(kl, reference.patients).to_dict(), "max": float(kl.max())},
        "jensen_shannon_nats": {
            **estimate_mean(js, reference.patients).to_dict(),
            "max": float(js.max()),
        },
        "margin_shift_nats": {
            "mean": float(shift.mean()),
            "mean_abs": float(np.abs(shift).mean()),
            "max_abs": float(np.abs(shift).max()),
        },
        "calibration": {
            name: {
                **calibration(found, reference.truth, at),
                "reliability": _reliability(logs, reference.truth),
            }
            for name, found, logs, at in (
                ("reference", reference.scores, theirs, own_temperature),
                ("engine", scores, ours, temperature),
            )
        },
        "worst_cases": _worst_cases(reference, theirs, ours),
    }
    return Check("scores", tuple(faults), results)


def check_decisions(reference: Reference, scores: Scores, thresholds: Thresholds) -> Check:
    """Compare the labels case by case, and say whether the declared margin is shown."""
    truth, confidence = reference.truth, thresholds.confidence
    ours, theirs = scores.argmax(axis=1), reference.scores.argmax(axis=1)
    right, due = ours == truth, theirs == truth
    counts = PairedCounts.of(right, due)
    p = noninferiority_p(counts, thresholds.margin)
    faults = []
    if p > 1 - confidence:
        n = cases_expected(counts, thresholds.margin, confidence)
        cure = f"; at these rates some {n} cases would show it" if n else ""
        faults.append(
            Fault(
                "non-inferiority",
                f"p = {p:.3g} that the engine is {thresholds.margin:g} worse or more, with a "
                f"difference of {counts.difference:+.4f} in {counts.n} cases{cure}",
                f"{1 - confidence:.4g} at most",
            )
        )
    difference = right.astype(np.float64) - due
    by_patient = bootstrap_interval(
        difference, np.mean, reference.patients, confidence=2 * confidence - 1
    )
    if len(set(reference.patients)) < counts.n and not by_patient[0] > -thresholds.margin:
        faults.append(
            Fault(
                "non-inferiority over patients",
                f"a difference of {by_patient[0]:+.4f} at least, whole patients drawn",
                f"more than -{thresholds.margin:g}",
            )
        )
    flips = np.flatnonzero(ours != theirs)
    results = {
        "agreement": Proportion.of(ours == theirs).to_dict(),
        "flip_bound": flip_bound(len(flips), counts.n, confidence),
        "flips": [_flip(reference, i, int(ours[i]), int(theirs[i])) for i in flips.tolist()],
        "reference_accuracy": Proportion.of(due).to_dict(),
        "engine_accuracy": Proportion.of(right).to_dict(),
        "paired": {
            "both_right": counts.both,
            "only_engine_right": counts.only_candidate,
            "only_reference_right": counts.only_reference,
            "neither_right": counts.neither,
        },
        "accuracy_difference": {
            "value": counts.difference,
            "newcombe_interval_95": list(newcombe_interval(counts)),
            "patients_interval": {"one_sided_confidence": confidence, "interval": list(by_patient)},
        },
        "mcnemar_p": exact_mcnemar(right, due),
        "noninferiority": {
            "margin": thresholds.margin,
            "confidence": confidence,
            "p": p,
            "shown": not faults,
            "cases_needed_without_flips": cases_needed(thresholds.margin, confidence),
        },
    }
    return Check("decisions", tuple(faults), results)


def _margin_shift(theirs: Float64, ours: Float64) -> Float64:
    """By case: the margin of the reference's label in the engine less that in the reference."""
    label = theirs.argmax(axis=1)
    shift: Float64 = margins(ours, label) - margins(theirs, label)
    return shift


def _worst_cases(reference: Reference, theirs: Float64, ours: Float64) -> list[dict[str, Any]]:
    """The cases whose margin moved most, the most first."""
    shift, label = _margin_shift(theirs, ours), theirs.argmax(axis=1)
    labels, before = reference.checkpoint.config.labels, margins(theirs, label)
    order = np.argsort(-np.abs(shift), kind="stable")[:WORST_CASES]
    return [
        {
            "index": i,
            "file": reference.data.rows[i].file,
            "truth": reference.data.rows[i].label,
            "reference_label": labels[label[i]],
            "engine_label": labels[ours[i].argmax()],
            "reference_margin_nats": float(before[i]),
            "shift_nats": float(shift[i]),
        }
        for i in order.tolist()
    ]


def _flip(reference: Reference, index: int, ours: int, theirs: int) -> dict[str, str]:
    labels, row = reference.checkpoint.config.labels, reference.data.rows[index]
    return {
        "file": row.file,
        "truth": row.label,
        "reference_label": labels[theirs],
        "engine_label": labels[ours],
    }


def _reliability(log_probs: Float64, truth: Int64) -> list[dict[str, float]]:
    columns: Sequence[Any] = reliability(np.exp(log_probs), truth)
    return [
        {"n": int(n), "confidence": float(confidence), "accuracy": float(accuracy)}
        for n, confidence, accuracy in zip(*columns, strict=True)
    ]

"""A scorer (checkpoint or engine) and a data set in, accuracy with intervals and its controls out.

Needs no torch for an engine: a clinic's machine repeats it.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mdf_sdk import MDFClassifier
from mdf_sdk.errors import CheckpointError, DataError, MissingExtraError
from mdf_sdk.extras import import_extra
from mdf_sdk.manifest import MANIFEST_NAME, ImageSpec
from mdf_training.data.cases import DataSet
from mdf_training.data.pixels import CasePixels, PixelSet, batches, blank_pixels, stack_pixels
from mdf_training.data.synthetic import NEUTRAL_TEXT
from mdf_training.evaluation.predictions import save_predictions
from mdf_training.evaluation.source_probe import probe_sources
from mdf_training.evaluation.statistics import (
    Int64,
    Proportion,
    balanced_accuracy_difference,
    brier_score,
    estimate_balanced_accuracy,
    estimate_mean,
    expected_calibration_error,
    log_probabilities,
    negative_log_likelihood,
    paired_difference,
)

Float32 = npt.NDArray[np.float32]
Scores = Float32
BATCH_SIZE = 32
CNN_KIND = "cnn"  # in config.json, where a fused model's has no kind
# What the model reaches when it is denied something; a shortcut shows as a control that does well.
CONTROLS = ("text_only", "image_only", "blank_image", "swapped_image")


class Scorer(Protocol):
    """What `evaluate` asks of a model; label scores are (B, K) in the order of `labels`.

    `temperature` is that of the label scores; `mask_kinds` is empty where nothing is segmented.
    """

    labels: tuple[str, ...]
    image: ImageSpec
    temperature: float
    mask_kinds: tuple[str, ...]

    def score(self, tower_pixels: Float32, unet_pixels: Float32, texts: Sequence[str]) -> Scores:
        """Score pixels as `to_pixels` makes them, stacked, with their texts."""

    def text_only_scores(self, texts: Sequence[str]) -> Scores:
        """Score texts with no photograph at all; without a text branch, any constant."""

    def segment(self, image: npt.NDArray[np.uint8], text: str) -> Float32:
        """Segment a photograph uint8 (H, W, 3), RGB: probabilities (M, U, U) by mask kind."""

    def features(self, tower_pixels: Float32, unet_pixels: Float32) -> Float32:
        """Describe photographs as the model sees them, (B, F): its states, pooled over places."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The report of `evaluate`, and the label scores behind it: float32 (N, K)."""

    report: dict[str, Any]
    scores: Scores


def evaluate(
    scorer: Scorer, data: DataSet, *, predictions: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Score a data set and its controls.

    Args:
        scorer: checkpoint or engine.
        data: its labels must be among the scorer's.
        predictions: CSV file to write with the scores of every case (see `save_predictions`).

    Returns:
        JSON types: accuracy over all, per class and per source, each with its interval; balanced
        accuracy; the four controls; and `swap_margin_shift`, by how much the score margin moves on
        average when the photograph is exchanged for one of another class. Where all cases are of
        one class, swapping means nothing: the control is absent and the shift None.
        `calibration` is that of the probabilities after the model's temperature. `dice` has the
        mask kinds that some case shows (see `_summarize_dice`). `source_probe` is what
        `probe_sources` returns, {} where no class has two sources, None without scikit-learn.

    Raises:
        DataError: a label that the scorer does not know, or a picture that cannot be read.
    """
    evaluation = evaluate_cases(scorer, data)
    if predictions is not None:
        save_predictions(predictions, scorer.labels, data, evaluation.scores)
    return evaluation.report


def evaluate_cases(scorer: Scorer, data: DataSet) -> Evaluation:
    """`evaluate`, with the label scores of every case beside the report."""
    check_labels(data, scorer.labels)
    pixels = PixelSet(data, scorer.image, scorer.mask_kinds)
    blank = blank_pixels(scorer.image)
    truth = _truth(data, scorer.labels)
    sources = np.array([row.source for row in data.rows])
    patients = [row.patient_id for row in data.rows]
    scores: dict[str, list[Scores]] = {name: [] for name in ("whole", *CONTROLS)}
    features: list[Float32] = []
    overlaps: list[_Overlap] = []
    for batch in _progress(data):
        cases = pixels.read(batch)
        swapped = pixels.read([swap_partner(i, truth) for i in batch])
        texts = [case.row.text for case in cases]
        neutral = [NEUTRAL_TEXT] * len(cases)
        blanks = [np.repeat(p[None], len(cases), axis=0) for p in blank]
        whole = stack_pixels(cases)
        scores["whole"].append(scorer.score(*whole, texts))
        scores["text_only"].append(scorer.text_only_scores(texts))
        scores["image_only"].append(scorer.score(*whole, neutral))
        scores["blank_image"].append(scorer.score(blanks[0], blanks[1], texts))
        scores["swapped_image"].append(scorer.score(*stack_pixels(swapped), texts))
        if len(np.unique(sources)) > 1:
            features.append(scorer.features(*whole))
        overlaps += _overlaps(scorer, data, batch, cases)
    joined = {name: np.concatenate(parts) for name, parts in scores.items()}
    predicted = {name: s.argmax(axis=1) for name, s in joined.items()}

    correct = predicted["whole"] == truth
    per_class = {
        label: Proportion.of(correct[truth == k])
        for k, label in enumerate(scorer.labels)
        if (truth == k).any()
    }
    controls = {name: Proportion.of(predicted[name] == truth).to_dict() for name in CONTROLS}
    shift = np.abs(_margins(joined["whole"]) - _margins(joined["swapped_image"])).mean()
    if len(per_class) < 2:  # no other class to take a photograph from
        del controls["swapped_image"]
    balanced = estimate_balanced_accuracy(truth, predicted["whole"], patients)
    report = {
        "n": len(data),
        "accuracy": Proportion.of(correct).to_dict(),
        "balanced_accuracy": balanced.value,
        "balanced_accuracy_interval_95": list(balanced.interval_95),
        "per_class": {label: p.to_dict() for label, p in per_class.items()},
        "per_source": {
            str(s): Proportion.of(correct[sources == s]).to_dict() for s in np.unique(sources)
        },
        "controls": controls,
        "swap_margin_shift": float(shift) if "swapped_image" in controls else None,
        "calibration": calibration(joined["whole"], truth, scorer.temperature),
        "dice": _summarize_dice(overlaps),
        "source_probe": _probe(features, data),
    }
    return Evaluation(report, joined["whole"])


def score_cases(scorer: Scorer, data: DataSet) -> Scores:
    """Return the label scores of every case, float32 (N, K)."""
    pixels = PixelSet(data, scorer.image, ())
    scores = []
    for batch in _progress(data):
        cases = pixels.read(batch)
        scores.append(scorer.score(*stack_pixels(cases), [case.row.text for case in cases]))
    return np.concatenate(scores)


def calibration(scores: Scores, truth: Int64, temperature: float) -> dict[str, float]:
    """How far probabilities can be believed: expected calibration error, Brier score, NLL."""
    logs = log_probabilities(scores, temperature)
    return {
        "temperature": temperature,
        "expected_calibration_error": expected_calibration_error(np.exp(logs), truth),
        "brier_score": brier_score(np.exp(logs), truth),
        "negative_log_likelihood": negative_log_likelihood(logs, truth),
    }


def compare_decisions(candidate: Scorer, reference: Scorer, data: DataSet) -> dict[str, Any]:
    """Compare two models of the same label set on the same cases; each reads its own pixels.

    Returns:
        As `compare_scores`.

    Raises:
        DataError: the two have other labels, or the data.
    """
    check_same_labels(candidate.labels, reference.labels)
    check_labels(data, candidate.labels)
    ours, theirs = (score_cases(scorer, data) for scorer in (candidate, reference))
    return compare_scores(ours, theirs, candidate.labels, data)


def compare_scores(
    candidate: Scores, reference: Scores, labels: Sequence[str], data: DataSet
) -> dict[str, Any]:
    """Compare two models' label scores (N, K) of the same cases.

    Returns:
        JSON types: `agreement`, the share of the cases with the same label, with its interval;
        `flips`, the files of the others; `max_score_difference`, the largest difference of any
        label score; `reference_accuracy`; and `accuracy_difference` and
        `balanced_accuracy_difference`, candidate minus reference, paired, over patients.
    """
    truth, patients = _truth(data, labels), [row.patient_id for row in data.rows]
    ours, theirs = candidate.argmax(axis=1), reference.argmax(axis=1)
    right = paired_difference(ours == truth, theirs == truth, patients)
    balanced = balanced_accuracy_difference(truth, ours, theirs, patients)
    return {
        "agreement": Proportion.of(ours == theirs).to_dict(),
        "flips": [data.rows[i].file for i in np.flatnonzero(ours != theirs).tolist()],
        "max_score_difference": float(np.abs(candidate - reference).max()),
        "reference_accuracy": Proportion.of(theirs == truth).to_dict(),
        "accuracy_difference": right.to_dict(),
        "balanced_accuracy_difference": balanced.to_dict(),
    }


def check_same_labels(labels: Sequence[str], reference: Sequence[str]) -> None:
    """Refuse to compare models of other label sets.

    Raises:
        DataError: names both.
    """
    if tuple(labels) != tuple(reference):
        raise DataError(
            f"reference: found the labels {', '.join(reference)}, expected {', '.join(labels)} in "
            "this order. Pass a model that was trained with the same --labels."
        )


def check_labels(data: DataSet, labels: Sequence[str]) -> None:
    """Refuse a data set with labels that the model does not have.

    Raises:
        DataError: names them.
    """
    unknown = [label for label in data.labels if label not in labels]
    if unknown:
        raise DataError(
            f"data: found the labels {', '.join(unknown)}, expected only {', '.join(labels)}. "
            "Correct the label column, or use a model of these labels."
        )


def swap_partner(index: int, truth: npt.NDArray[np.int64]) -> int:
    """Return the next case of another class, cyclically; the next one where all are alike."""
    n = len(truth)
    following = (np.arange(1, n) + index) % n
    others = following[truth[following] != truth[index]]
    return int(others[0] if len(others) else (index + 1) % n)


def open_scorer(path: str | os.PathLike[str]) -> Scorer:
    """Open an engine (torch-free), a checkpoint or a CNN by what its directory holds.

    Raises:
        CheckpointError: it is none of them.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists():
        return EngineScorer(path)
    if (path / "config.json").exists():
        home, name = (
            ("mdf_training.evaluation.cnn", "CnnScorer")
            if _is_cnn(path / "config.json")
            else ("mdf_training.evaluation.checkpoint_scorer", "CheckpointScorer")
        )
        scorer: Scorer = getattr(import_extra(home, "training"), name).open(path)
        return scorer
    raise CheckpointError(
        f"{path}: found neither {MANIFEST_NAME} nor config.json, expected an engine or checkpoint. "
        "`mdf train` makes a checkpoint, `mdf export` an engine."
    )


def _is_cnn(config: Path) -> bool:
    try:
        return bool(json.loads(config.read_text(encoding="utf-8"))["kind"] == CNN_KIND)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # what is wrong with it, load_checkpoint says


class EngineScorer:
    """Scores through the SDK."""

    def __init__(self, path: Path) -> None:
        self._classifier = MDFClassifier(path)
        manifest = self._classifier.manifest
        self.labels = manifest.labels
        self.image = manifest.image
        self.temperature = manifest.temperature
        self.mask_kinds = manifest.mask_kinds
        self.score = self._classifier.score
        self.text_only_scores = self._classifier.text_only_scores
        self.features = self._classifier.image_features

    def segment(self, image: npt.NDArray[np.uint8], text: str) -> Float32:
        """As Scorer has it."""
        masks = self._classifier.predict(image, text, mask=True).mask or {}
        return np.stack([masks[kind] for kind in self.mask_kinds])


class _Overlap(NamedTuple):
    """One annotated mask against the model's; `dice` is None where no pixel is annotated."""

    kind: str
    patient: str
    dice: float | None
    left_empty: bool


def _overlaps(
    scorer: Scorer, data: DataSet, batch: Sequence[int], cases: Sequence[CasePixels]
) -> Iterator[_Overlap]:
    """Segment the cases that have masks, at the model's resolution."""
    for index, case in zip(batch, cases, strict=True):
        if not case.has_mask.any():
            continue
        planes = scorer.segment(data[index].image, case.row.text) > 0.5  # (M, U, U)
        for kind, annotated, found, truth in zip(
            scorer.mask_kinds, case.has_mask, planes, case.masks > 0.5, strict=True
        ):
            if annotated:
                both, sizes = (found & truth).sum(), found.sum() + truth.sum()
                dice = float(2 * both / sizes) if truth.any() else None
                yield _Overlap(kind, case.row.patient_id, dice, not found.any())


def _summarize_dice(overlaps: Sequence[_Overlap]) -> dict[str, Any]:
    """By kind: mean Dice (1945) of the cases that show it, its interval over patients, and `n`;
    beside it, in how many of the `n_empty` cases annotated as free of it the model marks nothing.
    """
    report = {}
    for kind in dict.fromkeys(o.kind for o in overlaps):
        of_kind = [o for o in overlaps if o.kind == kind]
        shown = [o for o in of_kind if o.dice is not None]
        empty = [o.left_empty for o in of_kind if o.dice is None]
        mean: dict[str, Any] = {"value": None, "interval_95": None}
        if shown:
            values = np.array([o.dice for o in shown], np.float64)
            mean = estimate_mean(values, [o.patient for o in shown]).to_dict()
        report[kind] = {
            **mean,
            "n": len(shown),
            "n_empty": len(empty),
            "left_empty": sum(empty),
        }
    return report


def _probe(features: Sequence[Float32], data: DataSet) -> dict[str, Any] | None:
    """`probe_sources`; {} for a single source, None where scikit-learn is missing."""
    if not features:
        return {}
    columns = [(row.label, row.source, row.patient_id) for row in data.rows]
    labels, sources, patients = zip(*columns, strict=True)
    try:
        return probe_sources(np.concatenate(features), labels, sources, patients)
    except MissingExtraError:  # an engine is evaluated without the extra too
        return None


def _truth(data: DataSet, labels: Sequence[str]) -> Int64:
    return np.array([labels.index(row.label) for row in data.rows], np.int64)


def _progress(data: DataSet) -> Iterable[list[int]]:
    """Cut the data set into batches, with a bar where a person watches."""
    return tqdm(list(batches(range(len(data)), BATCH_SIZE)), leave=False, disable=None)


def _margins(scores: Scores) -> npt.NDArray[np.float32]:
    """First label's score minus the mean of the others: moves when any score moves against it."""
    margins: npt.NDArray[np.float32] = scores[:, 0] - scores[:, 1:].mean(axis=1)
    return margins

"""A scorer (checkpoint or engine) and a data set in, accuracy with intervals and its controls out.

Needs no torch for an engine: a clinic's machine repeats it.
"""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mdf_sdk import MDFClassifier
from mdf_sdk.errors import CheckpointError, DataError
from mdf_sdk.extras import import_extra
from mdf_sdk.manifest import MANIFEST_NAME, ImageSpec
from mdf_training.cases import DataSet
from mdf_training.pixels import PixelSet, batches, blank_pixels, stack_pixels
from mdf_training.synthetic import NEUTRAL_TEXT

Scores = npt.NDArray[np.float32]
BATCH_SIZE = 32
# What the model reaches when it is denied something; a shortcut shows as a control that does well.
CONTROLS = ("text_only", "image_only", "blank_image", "swapped_image")


class Scorer(Protocol):
    """What `evaluate` asks of a model; label scores are (B, K) in the order of `labels`."""

    labels: tuple[str, ...]
    image: ImageSpec

    def score(
        self,
        tower_pixels: npt.NDArray[np.float32],
        unet_pixels: npt.NDArray[np.float32],
        texts: Sequence[str],
    ) -> Scores:
        """Score pixels as `to_pixels` makes them, stacked, with their texts."""

    def text_only_scores(self, texts: Sequence[str]) -> Scores:
        """Score texts with the cross-attention layers fed zeros."""


@dataclass(frozen=True)
class Proportion:
    """`correct` of `n`, with its 95 % Wilson score interval."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        return self.correct / self.n

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
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


def evaluate(scorer: Scorer, data: DataSet) -> dict[str, Any]:
    """Score a data set and its controls.

    Args:
        scorer: checkpoint or engine.
        data: its labels must be among the scorer's.

    Returns:
        JSON types: accuracy over all, per class and per source, each with its interval; balanced
        accuracy; the four controls; and `swap_margin_shift`, by how much the score margin moves on
        average when the photograph is exchanged for one of another class. Where all cases are of
        one class, swapping means nothing: the control is absent and the shift None.

    Raises:
        DataError: a label that the scorer does not know, or a picture that cannot be read.
    """
    check_labels(data, scorer.labels)
    pixels = PixelSet(data, scorer.image, ())
    blank = blank_pixels(scorer.image)
    truth = np.array([scorer.labels.index(row.label) for row in data.rows])
    scores: dict[str, list[Scores]] = {name: [] for name in ("whole", *CONTROLS)}
    for batch in _progress(data):
        cases = [pixels[i] for i in batch]
        swapped = [pixels[swap_partner(i, truth)] for i in batch]
        texts = [case.row.text for case in cases]
        neutral = [NEUTRAL_TEXT] * len(cases)
        blanks = [np.repeat(p[None], len(cases), axis=0) for p in blank]
        scores["whole"].append(scorer.score(*stack_pixels(cases), texts))
        scores["text_only"].append(scorer.text_only_scores(texts))
        scores["image_only"].append(scorer.score(*stack_pixels(cases), neutral))
        scores["blank_image"].append(scorer.score(blanks[0], blanks[1], texts))
        scores["swapped_image"].append(scorer.score(*stack_pixels(swapped), texts))
    joined = {name: np.concatenate(parts) for name, parts in scores.items()}
    correct = {name: s.argmax(axis=1) == truth for name, s in joined.items()}

    whole = correct["whole"]
    per_class = {
        label: _proportion(whole[truth == k])
        for k, label in enumerate(scorer.labels)
        if (truth == k).any()
    }
    sources = np.array([row.source for row in data.rows])
    controls = {name: _proportion(correct[name]).to_dict() for name in CONTROLS}
    shift = np.abs(_margins(joined["whole"]) - _margins(joined["swapped_image"])).mean()
    if len(per_class) < 2:  # no other class to take a photograph from
        del controls["swapped_image"]
    return {
        "n": len(data),
        "accuracy": _proportion(whole).to_dict(),
        "balanced_accuracy": float(np.mean([p.value for p in per_class.values()])),
        "per_class": {label: p.to_dict() for label, p in per_class.items()},
        "per_source": {
            str(s): _proportion(whole[sources == s]).to_dict() for s in np.unique(sources)
        },
        "controls": controls,
        "swap_margin_shift": float(shift) if "swapped_image" in controls else None,
    }


def compare_decisions(candidate: Scorer, reference: Scorer, data: DataSet) -> dict[str, Any]:
    """Count the cases in which two models of the same label set choose the same label.

    Returns:
        JSON types: `agreement`, a proportion with its interval; `flips`, the files of the others;
        `max_score_difference`, the largest difference of any label score.

    Raises:
        DataError: the two have other labels or take other pictures.
    """
    if (candidate.labels, candidate.image) != (reference.labels, reference.image):
        raise DataError(
            "reference: found other labels or another picture size than the candidate's, expected "
            "the checkpoint that the engine was exported from."
        )
    pixels = PixelSet(data, candidate.image, ())
    flips, difference = [], 0.0
    for batch in _progress(data):
        cases = [pixels[i] for i in batch]
        texts = [case.row.text for case in cases]
        ours, theirs = (s.score(*stack_pixels(cases), texts) for s in (candidate, reference))
        difference = max(difference, float(np.abs(ours - theirs).max()))
        flipped = ours.argmax(axis=1) != theirs.argmax(axis=1)
        flips += [case.row.file for case, flip in zip(cases, flipped, strict=True) if flip]
    return {
        "agreement": Proportion(len(data) - len(flips), len(data)).to_dict(),
        "flips": flips,
        "max_score_difference": difference,
    }


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
    """Open an engine (torch-free) or a checkpoint by what its directory holds.

    Raises:
        CheckpointError: it is neither.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists():
        return EngineScorer(path)
    if (path / "config.json").exists():
        scorer: Scorer = import_extra(
            "mdf_training.checkpoint_scorer", "training"
        ).CheckpointScorer.open(path)
        return scorer
    raise CheckpointError(
        f"{path}: found neither {MANIFEST_NAME} nor config.json, expected an engine or checkpoint. "
        "`mdf train` makes a checkpoint, `mdf export` an engine."
    )


class EngineScorer:
    """Scores through the SDK."""

    def __init__(self, path: Path) -> None:
        self._classifier = MDFClassifier(path)
        self.labels = self._classifier.manifest.labels
        self.image = self._classifier.manifest.image
        self.score = self._classifier.score
        self.text_only_scores = self._classifier.text_only_scores


def _progress(data: DataSet) -> Iterable[list[int]]:
    """Cut the data set into batches, with a bar where a person watches."""
    return tqdm(list(batches(range(len(data)), BATCH_SIZE)), leave=False, disable=None)


def _proportion(correct: npt.NDArray[np.bool_]) -> Proportion:
    return Proportion(int(correct.sum()), len(correct))


def _margins(scores: Scores) -> npt.NDArray[np.float32]:
    """First label's score minus the mean of the others: moves when any score moves against it."""
    margins: npt.NDArray[np.float32] = scores[:, 0] - scores[:, 1:].mean(axis=1)
    return margins

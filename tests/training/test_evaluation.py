"""mdf_training.evaluation: proportions with intervals, and controls that deny a model something."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mdf_sdk.errors import CheckpointError, DataError
from mdf_training.commands import format_report
from mdf_training.config import load_preset
from mdf_training.evaluation import (
    Proportion,
    Scorer,
    compare_decisions,
    evaluate,
    open_scorer,
    swap_partner,
)
from mdf_training.synthetic import NEUTRAL_TEXT, SyntheticData

Float32 = npt.NDArray[np.float32]


class TextReader(Scorer):
    """Says Inherited to every text of odd length: reads the text alone."""

    labels = ("Acquired", "Inherited")
    image = load_preset("nano").image

    def score(self, tower_pixels: Float32, unet_pixels: Float32, texts: Sequence[str]) -> Float32:
        assert tower_pixels.shape == (len(texts), 3, 48, 48)
        assert unet_pixels.shape == (len(texts), 3, 128, 128)
        return self.text_only_scores(texts)

    def text_only_scores(self, texts: Sequence[str]) -> Float32:
        said = np.array([len(text) % 2 for text in texts], np.float32)
        return np.stack([-said, said - 1], axis=1)


class ImageReader(TextReader):
    """Reads the picture's brightness alone."""

    def score(self, tower_pixels: Float32, unet_pixels: Float32, texts: Sequence[str]) -> Float32:
        mean = tower_pixels.mean(axis=(1, 2, 3))
        return np.stack([mean, -mean], axis=1)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # statsmodels 0.15.0, proportion_confint(method="wilson")
    [(50, 100, 0.403832, 0.596168), (0, 10, 0.0, 0.277533), (998, 1000, 0.992737, 0.999451)],
)
def test_the_wilson_interval_is_that_of_an_independent_implementation(
    correct: int, n: int, low: float, high: float
) -> None:
    assert Proportion(correct, n).interval() == pytest.approx((low, high), abs=1e-6)


def test_a_text_reader_is_not_moved_by_the_image_and_is_by_the_text() -> None:
    report = evaluate(TextReader(), SyntheticData(40, 3))
    controls = report["controls"]
    assert controls["swapped_image"] == controls["blank_image"] == report["accuracy"]
    assert report["swap_margin_shift"] == 0
    share = sum(
        len(NEUTRAL_TEXT) % 2 == (row.label == "Inherited") for row in SyntheticData(40, 3).rows
    )
    assert controls["image_only"]["correct"] == share


def test_an_image_reader_is_moved_by_the_image() -> None:
    report = evaluate(ImageReader(), SyntheticData(40, 3))
    assert report["swap_margin_shift"] > 0
    assert report["controls"]["image_only"] == report["accuracy"]


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    report = evaluate(TextReader(), SyntheticData(40, 4))
    classes = [p["value"] for p in report["per_class"].values()]
    assert report["balanced_accuracy"] == pytest.approx(np.mean(classes))
    assert sum(p["n"] for p in report["per_class"].values()) == report["n"] == 40


def test_flips_are_named_and_a_model_agrees_with_itself() -> None:
    data = SyntheticData(40, 5)
    same = compare_decisions(TextReader(), TextReader(), data)
    assert (same["flips"], same["max_score_difference"]) == ([], 0.0)
    other = compare_decisions(TextReader(), ImageReader(), data)
    assert 0 < len(other["flips"]) == 40 - other["agreement"]["correct"]
    assert other["flips"][0] in {row.file for row in data.rows}


def test_swapping_gives_the_next_case_of_another_class() -> None:
    assert swap_partner(0, np.array([0, 0, 1])) == 2
    assert swap_partner(2, np.array([0, 0, 1])) == 0
    assert swap_partner(1, np.array([0, 0])) == 0  # no other class


def test_labels_that_the_model_does_not_have_are_named() -> None:
    class Other(TextReader):
        labels = ("Acquired", "Healthy")

    with pytest.raises(DataError, match="found the labels Inherited, expected only Acq"):
        evaluate(Other(), SyntheticData(10, 1))


def test_a_folder_that_is_neither_engine_nor_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither manifest\.json nor config\.json"):
        open_scorer(tmp_path)


def test_an_engine_and_its_checkpoint_agree(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    report = compare_decisions(
        open_scorer(tiny_engine), open_scorer(tiny_checkpoint), SyntheticData(24, 6)
    )
    assert report["flips"] == []
    assert report["max_score_difference"] < 1e-4


def test_one_class_alone_has_no_swapped_image() -> None:
    data = SyntheticData(20, 6)
    data.rows = tuple(replace(row, label="Acquired") for row in data.rows)
    report = evaluate(TextReader(), data)
    assert "swapped_image" not in report["controls"]
    assert report["swap_margin_shift"] is None
    assert "swapped" not in format_report(report)

"""evaluation.evaluate: scores, controls that deny a model something, and pairs of models."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mdf_sdk.cli import main
from mdf_sdk.errors import CheckpointError, DataError
from mdf_training.config import load_preset
from mdf_training.data.folder import save_data
from mdf_training.data.pixels import PixelSet, stack_pixels
from mdf_training.data.synthetic import NEUTRAL_TEXT, SyntheticData
from mdf_training.evaluation.commands import format_report
from mdf_training.evaluation.evaluate import (
    Scorer,
    compare_decisions,
    evaluate,
    evaluate_cases,
    open_scorer,
    score_cases,
    swap_partner,
)

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]


class TextReader(Scorer):
    """Says Inherited to every text of odd length: reads the text alone."""

    labels = ("Acquired", "Inherited")
    image = load_preset("nano").image
    temperature = 1.0
    mask_kinds: tuple[str, ...] = ("vessel", "lesion")

    def score(self, tower_pixels: Float32, unet_pixels: Float32, texts: Sequence[str]) -> Float32:
        assert tower_pixels.shape == (len(texts), 3, 48, 48)
        assert unet_pixels.shape == (len(texts), 3, 128, 128)
        return self.text_only_scores(texts)

    def text_only_scores(self, texts: Sequence[str]) -> Float32:
        said = np.array([len(text) % 2 for text in texts], np.float32)
        return np.stack([-said, said - 1], axis=1)

    def segment(self, image: UInt8, text: str) -> Float32:
        return np.stack([np.ones((128, 128)), np.zeros((128, 128))]).astype(np.float32)

    def features(self, tower_pixels: Float32, unet_pixels: Float32) -> Float32:
        return tower_pixels.mean(axis=(2, 3))


class ImageReader(TextReader):
    """Reads the picture's brightness alone."""

    def score(self, tower_pixels: Float32, unet_pixels: Float32, texts: Sequence[str]) -> Float32:
        mean = tower_pixels.mean(axis=(1, 2, 3))
        return np.stack([mean, -mean], axis=1)


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


class Camera(TextReader):
    """Its features tell the camera, or nothing."""

    def __init__(self, tells: bool) -> None:
        self.tells, self.rng = tells, np.random.default_rng(0)

    def features(self, tower_pixels: Float32, unet_pixels: Float32) -> Float32:
        noise = self.rng.normal(size=(len(tower_pixels), 4)).astype(np.float32)
        if self.tells:
            noise[:, 0] += 4 * (tower_pixels.mean(axis=(1, 2, 3)) > MIDDLE)
        return noise


# The brighter half of the rendered pictures counts as another camera's.
MIDDLE = -0.62


def two_cameras(count: int) -> SyntheticData:
    data = SyntheticData(count, 8)
    pixels = PixelSet(data, TextReader.image, ())
    bright = [pixels[i].tower_pixels.mean() > MIDDLE for i in range(count)]
    assert 0.3 < np.mean(bright) < 0.7
    data.rows = tuple(
        replace(row, source="bright" if is_bright else "dark")
        for row, is_bright in zip(data.rows, bright, strict=True)
    )
    return data


def test_the_source_probe_finds_a_camera_in_the_features_and_no_camera_in_noise() -> None:
    data = two_cameras(120)
    told = evaluate(Camera(tells=True), data)["source_probe"]
    assert set(told) == {"Acquired", "Inherited"}
    for of_class in told.values():
        assert of_class["balanced_accuracy"]["interval_95"][0] > of_class["chance"] == 0.5
    guessed = evaluate(Camera(tells=False), data)["source_probe"]
    for of_class in guessed.values():
        low, high = of_class["balanced_accuracy"]["interval_95"]
        assert low < 0.5 < high


def test_a_single_source_is_not_probed() -> None:
    assert evaluate(TextReader(), SyntheticData(10, 1))["source_probe"] == {}


def test_dice_is_that_of_the_masks_and_empty_masks_count_apart() -> None:
    data = SyntheticData(12, 3)
    report = evaluate(TextReader(), data)["dice"]  # says vessel everywhere, lesion nowhere
    pixels = PixelSet(data, TextReader.image, TextReader.mask_kinds)
    vessels = [pixels[i].masks[0].mean() for i in range(12)]
    assert report["vessel"]["n"] == 12
    assert report["vessel"]["value"] == pytest.approx(np.mean([2 * v / (1 + v) for v in vessels]))
    lesion = report["lesion"]
    assert lesion["value"] == 0
    assert lesion["n"] + lesion["n_empty"] == 12
    assert lesion["left_empty"] == lesion["n_empty"]


def test_calibration_is_measured_after_the_temperature() -> None:
    class Unsure(TextReader):
        temperature = 1e6

    sure, unsure = (evaluate(m, SyntheticData(40, 3)) for m in (TextReader(), Unsure()))
    assert unsure["accuracy"] == sure["accuracy"]
    found = unsure["calibration"]
    assert found["expected_calibration_error"] == pytest.approx(
        abs(unsure["accuracy"]["value"] - 0.5), abs=1e-4
    )
    assert found["brier_score"] == pytest.approx(0.5, abs=1e-4)
    assert found["negative_log_likelihood"] == pytest.approx(np.log(2), abs=1e-4)


def test_scoring_alone_gives_the_scores_of_an_evaluation() -> None:
    data = SyntheticData(40, 3)
    scores = evaluate_cases(ImageReader(), data).scores
    assert np.array_equal(scores, score_cases(ImageReader(), data))
    assert scores.shape == (40, 2)


def test_models_of_other_picture_sizes_are_compared() -> None:
    class Smaller(TextReader):
        image = replace(TextReader.image, tower_px=32)

        def score(
            self, tower_pixels: Float32, unet_pixels: Float32, texts: Sequence[str]
        ) -> Float32:
            assert tower_pixels.shape[-1] == 32
            return self.text_only_scores(texts)

    assert compare_decisions(TextReader(), Smaller(), SyntheticData(20, 3))["flips"] == []


def test_models_of_other_labels_are_not_compared() -> None:
    class Other(TextReader):
        labels = ("Inherited", "Acquired")

    with pytest.raises(DataError, match="found the labels Inherited, Acquired, expected Acquired"):
        compare_decisions(TextReader(), Other(), SyntheticData(10, 1))


def test_a_better_model_is_better_in_pairs() -> None:
    class Knows(TextReader):
        def text_only_scores(self, texts: Sequence[str]) -> Float32:
            truth = [next(r.label for r in data.rows if r.text == text) for text in texts]
            return np.array([[0, -1] if t == "Acquired" else [-1, 0] for t in truth], np.float32)

    data = SyntheticData(60, 5)
    found = compare_decisions(Knows(), TextReader(), data)
    own = evaluate(TextReader(), data)["accuracy"]
    assert found["reference_accuracy"] == own
    difference = found["accuracy_difference"]
    assert difference["value"] == pytest.approx(1 - own["value"])
    assert (difference["only_a"], difference["only_b"]) == (60 - own["correct"], 0)
    assert difference["interval_95"][0] > 0
    assert difference["mcnemar_p"] < 1e-3
    assert found["balanced_accuracy_difference"]["interval_95"][0] > 0


def test_an_engine_shows_and_segments_what_its_checkpoint_does(
    tiny_engine: Path, tiny_checkpoint: Path
) -> None:
    engine, checkpoint = open_scorer(tiny_engine), open_scorer(tiny_checkpoint)
    assert (engine.temperature, engine.mask_kinds) == (
        checkpoint.temperature,
        checkpoint.mask_kinds,
    )
    data = SyntheticData(3, 6)
    pixels = stack_pixels(PixelSet(data, engine.image, ()).read(range(3)))
    theirs = checkpoint.features(*pixels)
    assert theirs.shape[0] == 3
    np.testing.assert_allclose(engine.features(*pixels), theirs, atol=1e-4)
    case = data[0]
    np.testing.assert_allclose(
        engine.segment(case.image, case.text), checkpoint.segment(case.image, case.text), atol=1e-4
    )


def test_the_command_compares_with_saved_predictions_as_with_the_model(
    demo_engine: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "scores.csv"

    def run(*arguments: object) -> dict[str, object]:
        assert main(["evaluate", *map(str, arguments), "--json"]) == 0
        report: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return report

    run(tiny_checkpoint, "synthetic:20:4", "--predictions", saved)
    model = run(demo_engine, "synthetic:20:4", "--reference", tiny_checkpoint)
    table = run(demo_engine, "synthetic:20:4", "--reference", saved)
    assert model == table
    assert model["accuracy_difference"]


def test_the_command_evaluates_a_part_of_a_split(
    demo_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = tmp_path / "split.csv"
    files = [row.file for row in SyntheticData(12, 4).rows]
    parts = ["train"] * 6 + ["test"] * 4 + ["validation"] * 2
    lines = [f"{file},{part}" for file, part in zip(files, parts, strict=True)]
    split.write_text("\n".join(["file,part", *lines]) + "\n", encoding="utf-8")
    for arguments, count in ((["--split"], 4), (["--part", "validation", "--split"], 2)):
        assert main(["evaluate", str(demo_engine), "synthetic:12:4", *arguments, str(split)]) == 0
        assert f"{count} cases" in capsys.readouterr().out
    assert main(["evaluate", str(demo_engine), "synthetic:12:4", "--part", "test"]) == 2
    assert "found no --split" in capsys.readouterr().err


def test_a_broken_picture_is_named_and_left_out_on_request(
    demo_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_data(SyntheticData(6, 1), tmp_path / "data")
    (tmp_path / "data/images/00002.png").write_bytes(b"no picture")
    command = ["evaluate", str(demo_engine), str(tmp_path / "data"), "--json"]
    assert main(command) == 2
    assert "00002.png" in capsys.readouterr().err
    assert main([*command, "--skip-broken"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["n"], report["skipped"]) == (5, ["images/00002.png"])


def test_the_report_for_people_names_every_finding() -> None:
    data = two_cameras(60)
    printed = format_report(evaluate(Camera(tells=True), data))
    for part in (
        "from bright",
        "Dice of vessel",
        "calibration error",
        "within Inherited",
        "chance",
    ):
        assert part in printed
    assert "Dice of lesion" in printed

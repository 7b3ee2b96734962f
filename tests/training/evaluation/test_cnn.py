"""evaluation.cnn: the image-only baseline trains, is saved, opened and compared."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mdf_sdk.cli import main
from mdf_sdk.errors import CheckpointError, DataError, InputError
from mdf_training.config import load_preset
from mdf_training.data.pixels import PixelSet
from mdf_training.data.synthetic import SyntheticData
from mdf_training.evaluation.cnn import Cnn, CnnConfig, CnnScorer, _Run, train_cnn
from mdf_training.evaluation.evaluate import evaluate, open_scorer, score_cases
from mdf_training.recipes import RECIPES
from mdf_training.unet_weights import load_unet_weights

LABELS = ("Acquired", "Inherited")
RECIPE = replace(RECIPES["nano"], epochs=1, batch_size=16)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cnn") / "cnn"
    train_cnn("nano", "synthetic:48:1", out, recipe=RECIPE)
    return out


def test_a_cnn_opens_as_a_scorer_that_evaluate_takes(cnn: Path) -> None:
    report = evaluate(open_scorer(cnn), SyntheticData(20, 3))
    assert report["n"] == 20
    assert report["dice"] == {}
    assert set(report["controls"]) == {"text_only", "image_only", "blank_image", "swapped_image"}


def test_a_cnn_reads_no_text(cnn: Path) -> None:
    scorer = open_scorer(cnn)
    pixels = PixelSet(SyntheticData(2, 3), scorer.image, ())
    tower, unet = (np.stack([getattr(pixels[i], n) for i in range(2)]) for n in ARRAYS)
    one, other = (scorer.score(tower, unet, [text] * 2) for text in ("Blind.", "Sees well."))
    assert np.array_equal(one, other)
    assert np.ptp(scorer.text_only_scores(["Blind.", "Sees well."])) == 0


ARRAYS = ("tower_pixels", "unet_pixels")


def test_scores_are_log_probabilities(cnn: Path) -> None:
    scores = score_cases(open_scorer(cnn), SyntheticData(5, 3))
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, atol=1e-6)


def test_provenance_says_what_it_read_and_how_it_was_made(cnn: Path) -> None:
    provenance = json.loads((cnn / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["reads"] == "the photograph alone"
    assert provenance["recipe"]["seed"] == 0
    assert len(provenance["history"]) == 1
    assert provenance["training_cases"] + provenance["validation_cases"] == 48


def test_the_same_seed_gives_the_same_network_to_the_last_digit(cnn: Path, tmp_path: Path) -> None:
    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "model.safetensors")

    train_cnn("nano", "synthetic:48:1", tmp_path / "again", recipe=RECIPE)
    first, again = weights(cnn), weights(tmp_path / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)
    train_cnn("nano", "synthetic:48:1", tmp_path / "other", recipe=replace(RECIPE, seed=1))
    assert not torch.equal(first["head.weight"], weights(tmp_path / "other")["head.weight"])


def test_a_cnn_learns_what_the_picture_shows() -> None:
    """The label is whether the picture is bright, which one glance tells."""
    image = replace(load_preset("nano").image, unet_px=64)
    data = SyntheticData(48, 2)
    pixels = PixelSet(data, image, ())
    bright = np.array([pixels[i].unet_pixels.mean() for i in range(48)])
    data.rows = tuple(
        replace(row, label=LABELS[int(is_bright)])
        for row, is_bright in zip(data.rows, bright > np.median(bright), strict=True)
    )
    torch.manual_seed(0)
    recipe = replace(RECIPE, epochs=6)
    run = _Run(Cnn(CnnConfig(LABELS, image)), pixels, recipe, pretrained=False)
    losses = [run.train_epoch(epoch, range(48)) for epoch in range(6)]
    assert losses[-1] < 0.5 * losses[0]


def test_only_the_training_part_of_a_split_is_read(tmp_path: Path) -> None:
    split = tmp_path / "split.csv"
    rows = SyntheticData(48, 1).rows
    parts = ["train"] * 24 + ["validation"] * 12 + ["test"] * 12
    lines = [f"{row.file},{part}" for row, part in zip(rows, parts, strict=True)]
    split.write_text("\n".join(["file,part", *lines]), encoding="utf-8")
    found = train_cnn("nano", "synthetic:48:1", tmp_path / "out", recipe=RECIPE, split=split)
    assert (found["training_cases"], found["validation_cases"]) == (24, 12)
    assert found["split"]["name"] == "split.csv"


def test_augmented_training_differs_and_repeats_itself(tmp_path: Path) -> None:
    recipe = replace(RECIPE, augment=0.5)
    runs = [
        train_cnn("nano", "synthetic:32:1", tmp_path / name, recipe=r)["history"]
        for name, r in (("plain", RECIPE), ("first", recipe), ("second", recipe))
    ]
    assert runs[1] == runs[2] != runs[0]


def test_imagenet_weights_reach_every_layer_but_the_last(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = timm.create_model("tf_efficientnet_lite0").state_dict()
    save_file(source, tmp_path / "lite0.safetensors")
    model = Cnn(CnnConfig(LABELS, load_preset("nano").image))
    load_unet_weights(model.body, tmp_path / "lite0.safetensors")
    found = model.body.state_dict()
    assert set(source) - set(found) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(found[name], source[name]) for name in found)
    provenance = train_cnn(
        "nano",
        "synthetic:32:1",
        tmp_path / "out",
        recipe=RECIPE,
        unet_weights=tmp_path / "lite0.safetensors",
    )
    assert provenance["unet_weights"]["file"] == "lite0.safetensors"


def test_a_directory_that_is_taken_is_refused_before_any_training(cnn: Path) -> None:
    with pytest.raises(InputError, match="expected a new or empty directory"):
        train_cnn("nano", "synthetic:48:1", cnn)


def test_a_label_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no patient of Healthy to train on"):
        train_cnn(
            "nano", "synthetic:48:1", tmp_path / "x", labels=(*LABELS, "Healthy"), recipe=RECIPE
        )


def _network(config: dict[str, Any]) -> None:
    config["network"] = "no_such_network"


def _labels(config: dict[str, Any]) -> None:
    config["labels"] = ["one", "two", "three"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_network, "describes no CNN that can be built"),
        (lambda config: config.pop("image"), "describes no CNN that can be built"),
        (_labels, r"head.weight: found shape \[2, 1280\], expected \[3, 1280\]"),
    ],
)
def test_a_spoiled_config_is_refused(
    cnn: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    config = json.loads((cnn / "config.json").read_text(encoding="utf-8"))
    spoil(config)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((cnn / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        CnnScorer.open(tmp_path)


def test_the_command_trains_and_the_cnn_is_the_reference_of_an_engine(
    demo_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "cnn")
    settings = ["--preset", "nano", "--data", "synthetic:32:1", "--epochs", "1"]
    assert main(["train-cnn", *settings, "--out", out, "--json"]) == 0
    printed = capsys.readouterr().out
    assert "Reads the photograph alone, no text." in printed
    assert json.loads(printed.splitlines()[-1])["checkpoint"] == out
    command = ["evaluate", str(demo_engine), "synthetic:20:3", "--reference", out, "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["accuracy_difference"]["n"] == 20
    assert report["reference_accuracy"]["n"] == 20

"""The whole road by its commands, from training to prediction; and the shipped engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mdf_sdk.cli import main
from mdf_training.data.synthetic import SyntheticData

TEXT = "A 46-year-old woman, difficulty reading for 6 months. Family history is not known."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model trained long enough to decide by picture and text."""
    out = tmp_path_factory.mktemp("road") / "checkpoint"
    arguments = ["--preset", "nano", "--data", "synthetic:2000:1", "--epochs", "5"]
    assert main(["train", *arguments, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module", params=["int4", "fp16", "fp32"])
def engine(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("road") / request.param
    assert main(["export", str(checkpoint), str(out), "--precision", request.param]) == 0
    return out


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("road") / "eye.png"
    Image.fromarray(SyntheticData(1, 5)[0].image).save(path)
    return path


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_an_engine_verifies_and_decides_as_its_checkpoint(
    engine: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(engine), "--json"]) == 0
    assert last_line(capsys)["ok"] is True
    arguments = [str(engine), "synthetic:500:7", "--reference", str(checkpoint), "--json"]
    assert main(["evaluate", *arguments]) == 0
    report = last_line(capsys)
    assert report["agreement"]["n"] == 500
    assert report["agreement"]["value"] >= 0.98
    assert report["accuracy"]["interval_95"][0] > 0.6  # 285 steps; it has begun to learn


@pytest.mark.slow
def test_predict_prints_one_json_document_as_its_last_line(
    engine: Path, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    arguments = [str(engine), str(photograph), "--text", TEXT, "--picture", str(picture), "--json"]
    assert main(["predict", *arguments]) == 0
    prediction = last_line(capsys)
    assert prediction["label"] in ("Acquired", "Inherited")
    assert sum(prediction["probabilities"].values()) == pytest.approx(1)
    assert prediction["notice"] == "Not for clinical use."
    with Image.open(picture) as image:
        assert image.width > 2 * image.height


@pytest.mark.slow
def test_the_demo_engine_needs_both_picture_and_text(
    demo_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(demo_engine), "synthetic:1000:999", "--json"]) == 0
    report = last_line(capsys)
    low, _ = report["accuracy"]["interval_95"]
    assert report["accuracy"]["n"] == 1000
    assert report["accuracy"]["value"] >= 0.85
    for name, control in report["controls"].items():
        assert control["interval_95"][1] < low, name  # clearly lower: the intervals are apart
    assert report["swap_margin_shift"] > 1


def test_the_demo_engine_is_small_marked_and_whole(
    demo_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sum(path.stat().st_size for path in demo_engine.iterdir()) <= 15_000_000
    assert main(["verify", str(demo_engine), "--json"]) == 0
    assert last_line(capsys)["ok"] is True
    assert main(["info", str(demo_engine), "--json"]) == 0
    information = last_line(capsys)
    assert information["notice"] == "Not for clinical use."
    assert information["precision"] == "int4"

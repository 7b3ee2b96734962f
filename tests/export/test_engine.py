"""mdf_export.engine: a checkpoint becomes an engine directory, whole or not at all."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mdf_export import build_engine
from mdf_export import engine as engine_module
from mdf_sdk import MDFClassifier, load_manifest
from mdf_sdk.errors import CheckpointError, InputError
from mdf_sdk.verify import verify_engine
from mdf_training.checkpoint import checkpoint_digest, load_checkpoint
from mdf_training.checkpoint_scorer import CheckpointScorer
from mdf_training.pixels import PixelSet
from mdf_training.synthetic import SyntheticData


def test_an_engine_scores_as_its_checkpoint_does(tiny_checkpoint: Path, tiny_engine: Path) -> None:
    scorer = CheckpointScorer.open(tiny_checkpoint)
    data = SyntheticData(4, 11)
    cases = [PixelSet(data, scorer.image, ())[i] for i in range(4)]
    tower, unet = (
        np.stack([c.tower_pixels for c in cases]),
        np.stack([c.unet_pixels for c in cases]),
    )
    texts = [c.row.text for c in cases]
    with MDFClassifier(tiny_engine) as classifier:
        np.testing.assert_allclose(
            classifier.score(tower, unet, texts), scorer.score(tower, unet, texts), atol=1e-4
        )
        np.testing.assert_allclose(
            classifier.text_only_scores(texts), scorer.text_only_scores(texts), atol=1e-4
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_a_fresh_engine_verifies(tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    build_engine(tiny_checkpoint, tmp_path / "engine", precision)
    report = verify_engine(tmp_path / "engine")
    assert report.ok, report


def test_the_manifest_says_where_the_engine_comes_from(
    tiny_checkpoint: Path, tiny_engine: Path
) -> None:
    manifest = load_manifest(tiny_engine)
    config = load_checkpoint(tiny_checkpoint).config
    assert manifest.checkpoint == checkpoint_digest(tiny_checkpoint)
    assert manifest.notice == "Random weights, for tests."
    assert (manifest.labels, manifest.image, manifest.prompt) == (
        config.labels,
        config.image,
        config.prompt,
    )
    assert set(manifest.files) == {p.name for p in tiny_engine.iterdir()} - {"manifest.json"}


def test_an_interrupted_export_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_module, "save_golden", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny_checkpoint, tmp_path / "engine", "fp32")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_taken_is_refused_and_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty directory"):
        build_engine(tiny_checkpoint, tmp_path / "engine", "fp32")
    assert (tmp_path / "engine" / "notes.txt").read_text() == "mine"


def test_an_unknown_precision_is_refused_with_the_known_ones(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="found 'int3', expected one of fp32, fp16, int4"):
        build_engine(tiny_checkpoint, tmp_path / "engine", "int3")  # type: ignore[arg-type]


def test_a_folder_without_a_checkpoint_is_refused_with_the_command_that_makes_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError, match="mdf train"):
        build_engine(tmp_path / "none", tmp_path / "engine", "fp32")
    assert not (tmp_path / "engine").exists()


def test_two_exports_of_one_checkpoint_hold_the_same_graphs(
    tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path
) -> None:
    build_engine(tiny_checkpoint, tmp_path / "engine", "fp32")
    first, second = load_manifest(tiny_engine), load_manifest(tmp_path / "engine")
    graphs = [name for name in first.files if name != "golden.npz"]  # a zip holds its time
    assert [first.files[n] for n in graphs] == [second.files[n] for n in graphs]
    shutil.rmtree(tmp_path / "engine")

"""mdf_export.proof.ladder: each engine's loss, found where it happens."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from mdf_export import build_engine
from mdf_export.proof.differences import compare_cases
from mdf_export.proof.ladder import Ladder, climb
from mdf_export.proof.report import format_ladder
from mdf_export.recipe import ExportRecipe
from mdf_sdk.cli import main
from mdf_sdk.errors import DataError, InputError
from mdf_training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

DATA = "synthetic:40:4242"
# Of cross-attention: a self-attention layer also changes the constants of those behind it.
FAULTY_LAYER = 5


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny checkpoint in fp32 and in int4, rounded in large and in small blocks."""
    folder = tmp_path_factory.mktemp("ladder")
    recipes = {
        "fp32": ExportRecipe("fp32"),
        "int4_128": ExportRecipe("int4", method="rtn", block_size=128),
        "int4_32": ExportRecipe("int4", method="rtn", block_size=32),
    }
    for name, recipe in recipes.items():
        build_engine(tiny_checkpoint, folder / name, recipe)
    return [folder / name for name in recipes]


@pytest.fixture(scope="module")
def ladder(tiny_checkpoint: Path, engines: list[Path]) -> Ladder:
    return climb(tiny_checkpoint, engines, DATA, cases=20)


def test_an_fp32_engine_loses_nothing(ladder: Ladder) -> None:
    rung = ladder.rungs[0]
    assert (rung.flips.correct, rung.flips.n, rung.flipped) == (0, 20, ())
    assert abs(rung.kl.value) < 1e-9
    assert rung.calibration_error == pytest.approx(ladder.calibration_error, abs=1e-4)
    differences = [d for outputs in rung.blocks.values() for d in outputs.values()]
    differences += [d for layer in rung.layers for d in (layer.stream, layer.own)]
    assert len(rung.layers) == 8
    assert max(d.relative_l2 for d in differences) < 1e-4
    assert min(d.cosine for d in differences) > 1 - 1e-6


def test_int4_loses_in_every_layer_and_not_in_the_image_blocks(ladder: Ladder) -> None:
    fp32, int4 = ladder.rungs[0], ladder.rungs[1]
    assert min(layer.own.relative_l2 for layer in int4.layers) > 1e-3
    assert int4.worst_block in ("fusion", "decoder")
    assert int4.blocks["vision"]["vision_states"].relative_l2 < 1e-2
    assert int4.kl.value > fp32.kl.value
    assert int4.weight_bytes < fp32.weight_bytes


def test_two_int4_engines_in_a_row_are_a_paired_step(ladder: Ladder) -> None:
    (step,) = ladder.steps
    before, after = ladder.rungs[1:]
    assert (step.before, step.after) == (before.engine, after.engine)
    assert step.kl_removed.value == pytest.approx(before.kl.value - after.kl.value)
    assert step.kl_removed.interval_95[0] < step.kl_removed.value < step.kl_removed.interval_95[1]


def test_a_planted_fault_is_found_in_its_block_and_layer(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    state = checkpoint.model.state_dict()
    for name, tensor in state.items():
        if f"language_model.layers.{FAULTY_LAYER}.mlp" in name:
            tensor *= 1.05
    checkpoint.model.load_state_dict(state)
    faulty = Checkpoint(checkpoint.model, checkpoint.tokenizer_json, checkpoint.provenance)
    save_checkpoint(tmp_path / "faulty", faulty)
    build_engine(tmp_path / "faulty", tmp_path / "engine", ExportRecipe("fp32"))
    ladder = climb(tiny_checkpoint, [tmp_path / "engine"], DATA, cases=4)
    (rung,) = ladder.rungs
    assert not rung.same_checkpoint
    assert "from another checkpoint" in format_ladder(ladder)
    assert (rung.worst_block, rung.worst_layer) == ("decoder", FAULTY_LAYER)
    own = [layer.own.relative_l2 for layer in rung.layers]
    streams = [layer.stream.relative_l2 for layer in rung.layers]
    assert own[FAULTY_LAYER] > 1e-3
    assert max(own[:FAULTY_LAYER] + own[FAULTY_LAYER + 1 :]) < 1e-4
    assert max(streams[:FAULTY_LAYER]) < 1e-4 < min(streams[FAULTY_LAYER:])


def test_the_worst_case_counts_and_nan_is_never_lost() -> None:
    reference = np.array([[3.0, 4.0], [1.0, 0.0]])
    found = np.array([[3.0, 4.0], [1.0, 1.0]])
    difference = compare_cases(zip(found, reference, strict=True))
    assert (difference.max_abs, difference.relative_l2) == (1.0, 1.0)
    assert difference.cosine == pytest.approx(np.sqrt(0.5))
    found[0, 0] = np.nan
    assert np.isnan(compare_cases(zip(found, reference, strict=True)).relative_l2)
    assert compare_cases(zip(found, reference, strict=True)).to_dict()["max_abs"] is None


def test_the_command_leaves_report_and_plot_and_the_engine_as_it_was(
    tiny_checkpoint: Path,
    engines: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(engines[0].iterdir())
    out = tmp_path / "report"
    words = ["ladder", str(tiny_checkpoint), str(engines[0]), "--data", DATA, "--cases", "3"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((out / "ladder.json").read_text())
    assert document["command"].split()[1:] == [*words, "--out", str(out)]
    assert document["engines"][0]["flips"]["correct"] == 0
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert "## Decoder layers" in (out / "ladder.md").read_text()
    assert sorted(engines[0].iterdir()) == before


def test_a_report_that_is_there_already_is_not_overwritten(
    tiny_checkpoint: Path, engines: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = ["ladder", str(tiny_checkpoint), str(engines[0]), "--data", DATA]
    assert main([*words, "--out", str(tmp_path)]) == 2


def test_an_engine_of_other_labels_is_refused(
    tiny_checkpoint: Path, engines: list[Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["labels"] = ["healthy", "ill"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="expected an engine that was exported from it"):
        climb(copy, engines[:1], DATA, cases=2)


def test_an_engine_of_another_fusion_is_refused(skip_checkpoint: Path, engines: list[Path]) -> None:
    with pytest.raises(DataError, match=r"another\s+fusion than the checkpoint's"):
        climb(skip_checkpoint, engines[:1], DATA, cases=2)


def test_no_case_is_refused(tiny_checkpoint: Path, engines: list[Path]) -> None:
    with pytest.raises(InputError, match="cases: found 0"):
        climb(tiny_checkpoint, engines, DATA, cases=0)


def test_the_decoder_that_is_probed_is_the_engines(engines: list[Path]) -> None:
    """Its layers have names, or there would be nothing to compare."""
    graph = onnx.load(engines[0] / "decoder.onnx", load_external_data=False).graph
    outputs = {name for node in graph.node for name in node.output}
    assert {f"/decoder/layers.{i}/output" for i in range(8)} <= outputs

"""mdf_export.proof.constants: every constant of an engine against the checkpoint's."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdf_benchmarks.parity.checks import CONSTANT_TOLERANCES
from mdf_export import build_engine
from mdf_export.proof.constants import GraphDifference, _judge_codes, compare_graphs
from mdf_export.recipe import ExportRecipe
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.manifest import FUSED_SUFFIX, load_manifest


def compare(engine: Path, checkpoint: Path) -> dict[str, GraphDifference]:
    return compare_graphs(engine, load_manifest(engine), StreamedCheckpoint.open(checkpoint))


def test_an_fp32_engine_holds_the_checkpoints_constants(
    tiny_engine: Path, tiny_checkpoint: Path
) -> None:
    found = compare(tiny_engine, tiny_checkpoint)
    assert list(found) == ["vision", "fusion", "decoder"]
    constants = [constant for block in found.values() for constant in block.constants]
    assert {constant.kind for constant in constants} == {"float", "index"}
    assert max(constant.relative_l2 for constant in constants) < 1e-6
    assert len({constant.name for constant in constants}) == len(constants) > 200
    assert [block.nodes for block in found.values()] == [(), (), ()]


def test_the_graph_beside_for_a_card_is_held_against_the_same_checkpoint(
    tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    changed = []
    for block, kind in (("vision", "SkipLayerNormalization"), ("decoder", "MatMul")):
        path = engine / f"{block}.onnx{FUSED_SUFFIX}"
        model = onnx.load(path, load_external_data=False)
        node = next(node for node in model.graph.node if node.op_type == kind)
        node.input[0], node.input[1] = node.input[1], node.input[0]
        onnx.save(model, path)
        changed.append((node.name,))
    vision, fusion, decoder = (block.nodes for block in compare(engine, tiny_checkpoint).values())
    assert [vision, decoder] == changed
    assert fusion == ()


def test_every_form_of_a_weight_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """fp8, int8, int4 and linears that were left in float16, apart from those they join else."""
    kept = {
        "backbone.model.language_model.layers.0.self_attn.q_proj": "fp16",
        "fusion.1.k_proj": "int8",
    }
    recipe = ExportRecipe("int4", vision_precision="fp8", method="rtn", kept=kept)
    build_engine(tiny_checkpoint, tmp_path / "engine", recipe)
    found = compare(tmp_path / "engine", tiny_checkpoint)
    kinds = {c.name: c.kind for block in found.values() for c in block.constants}
    assert "missing" not in kinds.values()
    assert "fp8" in {c.kind for c in found["vision"].constants}
    assert kinds["/fusion/fusion.1/k_proj/weight"] == "int8"
    assert kinds["/fusion/fusion.1/q_proj/weight"] == "int4"
    assert kinds["/decoder/layers.0/self_attention/q_proj/weight"] == "float"
    assert kinds["/decoder/layers.0/self_attention/k_proj/weight"] == "int4"
    worst = {
        kind: max(c.relative_l2 for b in found.values() for c in b.constants if c.kind == kind)
        for kind in set(kinds.values())
    }
    assert [block.nodes for block in found.values()] == [(), (), ()]
    assert worst["float"] < 1e-6
    assert worst["index"] == 0
    assert worst["int8"] < 0.01 < worst["fp8"] < 0.05 < worst["int4"] < 0.15
    gains = [c.gain for block in found.values() for c in block.constants]
    assert max(abs(gain - 1) for gain in gains) < 5e-3


def test_w8a8_is_held_against_the_checkpoint(w8a8_engine: Path, tiny_checkpoint: Path) -> None:
    found = compare(w8a8_engine, tiny_checkpoint)
    constants = [constant for block in found.values() for constant in block.constants]
    assert [block.nodes for block in found.values()] == [(), (), ()]
    assert {c.kind for c in constants} == {"w8a8", "float", "index"}
    assert max(c.relative_l2 for c in constants if c.kind == "float") < 1e-6
    assert max(c.relative_l2 for c in constants if c.kind == "w8a8") < 0.03
    assert max(abs(c.gain - 1) for c in constants) < 5e-3


@pytest.mark.parametrize("change", ["factor", "order"])
def test_in_w8a8_scales_that_are_not_the_weights_are_told(
    w8a8_engine: Path, tiny_checkpoint: Path, tmp_path: Path, change: str
) -> None:
    name = "/decoder/layers.0/self_attention/o_proj"
    engine = Path(shutil.copytree(w8a8_engine, tmp_path / "engine"))
    model = onnx.load(engine / "decoder.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == f"{name}/scales")
    scales = np.frombuffer(tensor.raw_data, np.float32)
    tensor.raw_data = (1.02 * scales if change == "factor" else np.roll(scales, 1)).tobytes()
    onnx.save(model, engine / "decoder.onnx")
    constants = compare(engine, tiny_checkpoint)["decoder"].constants
    found = next(constant for constant in constants if constant.name == f"{name}/weight")
    tolerance = CONSTANT_TOLERANCES["w8a8"]
    if change == "factor":
        assert abs(found.gain - 1) > 2 * tolerance.gain
    else:
        assert found.spread > 2 * tolerance.spread


def test_another_checkpoint_is_told(tiny_engine: Path, tmp_path: Path) -> None:
    import torch

    from mdf_training.checkpoint import Checkpoint, save_checkpoint
    from mdf_training.config import load_preset
    from mdf_training.model import build_model
    from mdf_training.tokenizer import load_tokenizer

    torch.manual_seed(1)
    other = Checkpoint(build_model("nano").eval(), load_tokenizer(load_preset("nano")), {})
    save_checkpoint(tmp_path / "other", other)
    found = compare(tiny_engine, tmp_path / "other")
    weights = [c for b in found.values() for c in b.constants if c.name.endswith("o_proj/weight")]
    assert min(constant.relative_l2 for constant in weights) > 0.5


@given(
    seed=st.integers(0, 10_000),
    noise=st.floats(0, 0.4),
    factor=st.sampled_from([1.0, 1.02, 0.98, 1.1]),
    bits=st.sampled_from([4, 8]),
)
def test_the_gain_is_the_factor_however_rounding_is_blurred(
    seed: int, noise: float, factor: float, bits: int
) -> None:
    rng, high = np.random.default_rng(seed), 2 ** (bits - 1)
    groups = rng.normal(size=(16, 32, 256))
    scales = 0.9 * np.abs(groups).max(axis=1) / (high - 1)  # clips some
    blurred = groups / scales[:, None] + noise * rng.normal(size=groups.shape)
    codes = blurred.round().clip(-high, high - 1).reshape(-1, 256)
    gain, spread = _judge_codes(codes, groups.reshape(-1, 256), factor * scales, -high, high - 1)
    assert gain == pytest.approx(factor, abs=0.007)
    assert spread < 0.15


def test_scales_of_the_next_group_show_in_the_spread() -> None:
    rng = np.random.default_rng(3)
    groups = rng.normal(size=(4, 32, 128))
    scales = np.abs(groups).max(axis=1) / 7
    codes = (groups / scales[:, None]).round().reshape(-1, 128)
    _, right = _judge_codes(codes, groups.reshape(-1, 128), scales, -8, 7)
    _, late = _judge_codes(codes, groups.reshape(-1, 128), np.roll(scales, 1, axis=0), -8, 7)
    assert right < 1e-9 < 0.05 < late

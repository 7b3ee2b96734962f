"""mdf_export.blocks: every graph, run by ONNX Runtime, is the PyTorch model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.conftest import with_fusion

from mdf_export.blocks import build_block, read_spec
from mdf_export.blocks.source import BlockSource
from mdf_export.calibration import QuantizedStore, calibrate
from mdf_export.golden import reference_tensors
from mdf_export.graph import GraphBuilder
from mdf_export.quantize import to_w8a8
from mdf_export.recipe import ExportRecipe
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.manifest import BLOCKS, BlockSpec
from mdf_training.checkpoint import load_checkpoint, save_checkpoint
from mdf_training.data.synthetic import SyntheticData

# Largest relative L2 error of any block output on the tiny checkpoint, rounded to nearest. Measured
# on two CPU cores: fp32 4e-7; fp16 8e-4; int8 2e-2; fp8 2e-3; w8a8 2e-2; int4 1.4e-1 (fusion), 9e-2
# (decoder).
TOLERANCE = {
    "fp32": 1e-4,
    "tf32": 1e-4,
    "fp16": 3e-3,
    "int8": 3e-2,
    "fp8": 1e-2,
    "w8a8": 3e-2,
    "int4": 2e-1,
}
RECIPES = {
    "fp32": ExportRecipe("fp32"),
    "fp16": ExportRecipe("fp16"),
    "int8": ExportRecipe("int8", "int8", method="rtn"),
    "fp8": ExportRecipe("fp16", "fp8", calibration_cases=8),
    "int4": ExportRecipe("int4", method="rtn"),
    "w8a8": ExportRecipe("w8a8", method="rtn"),
}
# One short and one long text, alone and together: padding, batch and length are all free
# dimensions.
SHORT, LONG = (
    "Blurred vision.",
    "A 70-year-old man, diabetes for 20 years, cannot read any more. " * 4,
)
CASES = {
    "short": ([0], [SHORT]),
    "long": ([1], [LONG]),
    "batch": (
        [2, 3, 4],
        [SHORT, LONG, "Night blindness since childhood; her brother is affected."],
    ),
}
Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Built:
    """The blocks of one recipe, in a folder."""

    recipe: ExportRecipe
    folder: Path
    specs: dict[str, BlockSpec]


def build(checkpoint: StreamedCheckpoint, folder: Path, recipe: ExportRecipe) -> Built:
    input_max = {}
    if recipe.calibrates:
        input_max = calibrate(checkpoint, recipe, QuantizedStore(folder / "quantized"), {})
    source = BlockSource(checkpoint, recipe, input_max=input_max)
    specs, encoder = {}, checkpoint.prompt_encoder()
    for name in BLOCKS:
        build_block(name, source, folder)
        specs[name] = read_spec(folder / f"{name}.onnx", recipe.block_precision(name), encoder)
    return Built(recipe, folder, specs)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> StreamedCheckpoint:
    return StreamedCheckpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def references(checkpoint: StreamedCheckpoint) -> dict[str, Tensors]:
    data = SyntheticData(5, 77)
    return {
        name: reference_tensors(checkpoint, [data[i].image for i in images], texts)
        for name, (images, texts) in CASES.items()
    }


@pytest.fixture(scope="module", params=RECIPES)
def built(
    request: pytest.FixtureRequest,
    checkpoint: StreamedCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    folder = tmp_path_factory.mktemp(f"blocks-{request.param}")
    return build(checkpoint, folder, RECIPES[request.param])


def run_block(folder: Path, spec: BlockSpec, tensors: Tensors) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(folder / spec.file, providers=["CPUExecutionProvider"])
    feed = {i.name: np.ascontiguousarray(tensors[i.name], i.dtype) for i in spec.inputs}
    names = [output.name for output in spec.outputs]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_gives_what_pytorch_gives(
    built: Built,
    references: dict[str, Tensors],
    block: str,
    case: str,
) -> None:
    spec = built.specs[block]
    outputs = run_block(built.folder, spec, references[case])
    assert outputs
    for name, found in outputs.items():
        expected = references[case][name].astype(np.float64)
        assert found.shape == expected.shape
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error <= TOLERANCE[spec.precision], name


def test_in_w8a8_a_row_is_rounded_by_its_own_scale(tmp_path: Path) -> None:
    """Neither a row a million times as large nor a row of zeros beside it changes a row."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    with GraphBuilder(tmp_path, "product", "float32", lambda x: to_w8a8(x.weight)) as g:
        y = g.linear(g.input("x", ("B", "T", 64)), "linear", linear)
        g.output("y", y, ("B", "T", 32))
        g.save()
    session = onnxruntime.InferenceSession(tmp_path / "product.onnx")
    rows = torch.randn(1, 5, 64)
    with torch.no_grad():
        expected = linear(rows).numpy()
    (alone,) = session.run(["y"], {"x": rows.numpy()})
    assert np.linalg.norm(alone - expected) / np.linalg.norm(expected) < 0.02
    rows[0, 1] *= 1e6
    rows[0, 2] = 0
    (beside,) = session.run(["y"], {"x": rows.numpy()})
    assert (beside[0, [0, 3, 4]] == alone[0, [0, 3, 4]]).all()
    assert (beside[0, 2] == linear.bias.detach().numpy()).all()


@pytest.mark.parametrize(
    ("fusion", "rows", "precision"),
    [
        ({"depths": [], "film": False}, [37, 37, 37, 37], "fp32"),
        ({"depths": [], "film": False}, [37, 37, 37, 37], "fp16"),
        ({"query": "skip"}, [64, 64, 64, 64], "int4"),
        ({"query": "skip", "depths": [0, 2]}, [64, 37, 64, 37], "fp32"),
        ({"query": "skip", "depths": [0, 2]}, [64, 37, 64, 37], "int4"),
    ],
    ids=str,
)
def test_an_engine_of_another_fusion_is_the_pytorch_model_of_it(
    fusion: dict[str, object],
    rows: list[int],
    precision: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    references: dict[str, Tensors],
) -> None:
    images, texts = CASES["batch"]
    data = SyntheticData(5, 77)
    variant = with_fusion(tiny_checkpoint, tmp_path / "variant", **fusion)
    checkpoint = StreamedCheckpoint.open(variant)
    tensors = reference_tensors(checkpoint, [data[i].image for i in images], texts)
    assert [tensors[f"cross_key_{layer}"].shape[1] for layer in (1, 3, 5, 7)] == rows
    built = build(checkpoint, tmp_path, RECIPES[precision])
    for name in BLOCKS:
        for output, value in run_block(tmp_path, built.specs[name], tensors).items():
            assert value.shape == tensors[output].shape
            error = np.linalg.norm(value - tensors[output]) / np.linalg.norm(tensors[output])
            assert error < TOLERANCE[built.specs[name].precision], (name, output)
    assert not np.allclose(tensors["scores"], references["batch"]["scores"], atol=1e-3)
    assert not np.allclose(tensors["mask"], references["batch"]["mask"], atol=1e-3)


def test_the_tolerances_can_fail(
    tiny_checkpoint: Path, references: dict[str, Tensors], tmp_path: Path
) -> None:
    """A decoder whose weights are off by 2 % is not within fp32's tolerance."""
    changed = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        changed.model.backbone.model.language_model.layers[0].mlp.down_proj.weight *= 1.02
    save_checkpoint(tmp_path / "checkpoint", changed)
    streamed = StreamedCheckpoint.open(tmp_path / "checkpoint")
    scaled = build(streamed, tmp_path, ExportRecipe("fp32"))
    outputs = run_block(tmp_path, scaled.specs["decoder"], references["short"])
    expected = references["short"]["pooled"]
    error = np.linalg.norm(outputs["pooled"] - expected) / np.linalg.norm(expected)
    assert error > TOLERANCE["fp32"]


def test_every_graph_is_of_the_standard_opset_that_cards_run(built: Built) -> None:
    assert tuple(built.specs) == BLOCKS
    for block, spec in built.specs.items():
        model = onnx.load(built.folder / spec.file)
        opset = 20 if block.startswith("unet") else 23
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
        assert not model.functions
        assert {node.domain for node in model.graph.node} == {""}


def test_no_graph_says_where_it_was_made(built: Built) -> None:
    for spec in built.specs.values():
        content = (built.folder / spec.file).read_bytes()
        for trace in (b"stack_trace", b"site-packages", b".py", str(Path.home()).encode()):
            assert trace not in content, (spec.file, trace)


def test_int4_stores_the_language_models_matrices_in_four_bits(built: Built) -> None:
    model = onnx.load(built.folder / "decoder.onnx", load_external_data=False)
    quantized = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    # 4 self-attention layers of 4 matrices (q, k, v in one; gate, up in one), 4 cross-attention
    # layers of 4 (keys and values are fusion's).
    assert len(quantized) == (4 * 4 + 4 * 4 if built.recipe.precision == "int4" else 0)


def test_the_decoder_keeps_the_label_rows_of_the_head_alone(
    built: Built, checkpoint: StreamedCheckpoint
) -> None:
    vocabulary = checkpoint.config.text["vocab_size"]
    model = onnx.load(built.folder / "decoder.onnx", load_external_data=False)
    assert all(vocabulary not in tensor.dims for tensor in model.graph.initializer)


def test_the_decoder_scores_twelve_labels_as_pytorch_does(
    checkpoint: StreamedCheckpoint,
    twelve_labels: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twelve = dataclasses.replace(checkpoint.config, labels=twelve_labels)
    monkeypatch.setattr(checkpoint.model, "config", twelve)
    data = SyntheticData(3, 78)
    tensors = reference_tensors(
        checkpoint, [data[i].image for i in range(3)], [SHORT, LONG, "Night blindness."]
    )
    build_block("decoder", BlockSource(checkpoint, ExportRecipe("fp32")), tmp_path)
    spec = read_spec(tmp_path / "decoder.onnx", "fp32", checkpoint.prompt_encoder())
    scores = run_block(tmp_path, spec, tensors)["scores"]
    assert scores.shape == (3, 12)
    np.testing.assert_allclose(scores, tensors["scores"], atol=1e-4, rtol=0)


def test_tensors_that_go_from_block_to_block_are_not_cast_on_the_way(built: Built) -> None:
    """On a card no one could cast them."""
    made = {t.name: t.dtype for spec in built.specs.values() for t in spec.outputs}
    read = [t for spec in built.specs.values() for t in spec.inputs if t.name in made]
    assert read
    assert all(tensor.dtype == made[tensor.name] for tensor in read)


def test_a_convolution_stands_in_the_unet_alone(built: Built) -> None:
    for block, spec in built.specs.items():
        kinds = {node.op_type for node in onnx.load(built.folder / spec.file).graph.node}
        assert ("Conv" in kinds) == block.startswith("unet")

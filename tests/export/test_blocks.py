"""mdf_export.blocks: every graph, run by ONNX Runtime, is the PyTorch model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest

from mdf_export.blocks import build_decoder
from mdf_export.engine import build_blocks
from mdf_export.golden import reference_tensors
from mdf_sdk.manifest import BLOCKS, BlockSpec, Precision
from mdf_training.checkpoint import Checkpoint, load_checkpoint
from mdf_training.model import MDFModel
from mdf_training.synthetic import SyntheticData

# Largest relative L2 error of any block output on the tiny checkpoint. Measured on two CPU cores:
# fp32 3e-7;
# fp16 9e-4; int4 1.1e-1 (fusion), 9e-2 (decoder).
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-3, "int4": 2e-1}
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


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def references(checkpoint: Checkpoint) -> dict[str, Tensors]:
    data = SyntheticData(5, 77)
    return {
        name: reference_tensors(checkpoint, [data[i].image for i in images], texts)
        for name, (images, texts) in CASES.items()
    }


@pytest.fixture(scope="module", params=get_args(Precision))
def built(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Precision, Path, Mapping[str, BlockSpec]]:
    folder = tmp_path_factory.mktemp(f"blocks-{request.param}")
    return request.param, folder, build_blocks(checkpoint, folder, request.param)


def run_block(folder: Path, spec: BlockSpec, tensors: Tensors) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(folder / spec.file, providers=["CPUExecutionProvider"])
    feed = {i.name: np.ascontiguousarray(tensors[i.name], i.dtype) for i in spec.inputs}
    names = [output.name for output in spec.outputs]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_gives_what_pytorch_gives(
    built: tuple[Precision, Path, Mapping[str, BlockSpec]],
    references: dict[str, Tensors],
    block: str,
    case: str,
) -> None:
    precision, folder, specs = built
    outputs = run_block(folder, specs[block], references[case])
    assert outputs
    for name, found in outputs.items():
        expected = references[case][name].astype(np.float64)
        assert found.shape == expected.shape
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error <= TOLERANCE[precision], name


def test_the_tolerances_can_fail(
    checkpoint: Checkpoint, references: dict[str, Tensors], tmp_path: Path
) -> None:
    """A decoder whose weights are off by 2 % is not within fp32's tolerance."""
    changed = load_scaled(checkpoint, 1.02)
    specs = build_blocks(changed, tmp_path, "fp32")
    outputs = run_block(tmp_path, specs["decoder"], references["short"])
    expected = references["short"]["pooled"]
    assert (
        np.linalg.norm(outputs["pooled"] - expected) / np.linalg.norm(expected) > TOLERANCE["fp32"]
    )


def load_scaled(checkpoint: Checkpoint, factor: float) -> Checkpoint:
    model = MDFModel(checkpoint.config)
    state = checkpoint.model.state_dict()
    name = "backbone.model.language_model.layers.0.mlp.down_proj.weight"
    model.load_state_dict({**state, name: state[name] * factor})
    return Checkpoint(model.eval(), checkpoint.tokenizer_json, checkpoint.provenance)


def test_every_graph_is_standard_opset_23(
    built: tuple[Precision, Path, Mapping[str, BlockSpec]],
) -> None:
    _, folder, specs = built
    assert tuple(specs) == BLOCKS
    for spec in specs.values():
        model = onnx.load(folder / spec.file)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
        assert not model.functions
        assert {node.domain for node in model.graph.node} == {""}


def test_no_graph_says_where_it_was_made(
    built: tuple[Precision, Path, Mapping[str, BlockSpec]],
) -> None:
    _, folder, specs = built
    for spec in specs.values():
        content = (folder / spec.file).read_bytes()
        for trace in (b"stack_trace", b"site-packages", b".py", str(Path.home()).encode()):
            assert trace not in content, (spec.file, trace)


def test_int4_stores_the_language_models_matrices_in_four_bits(
    built: tuple[Precision, Path, Mapping[str, BlockSpec]],
) -> None:
    precision, folder, specs = built
    model = onnx.load(folder / specs["decoder"].file, load_external_data=False)
    quantized = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    # 4 self-attention layers of 7 matrices, 4 cross-attention layers of 5 (keys and values are
    # fusion's)
    assert len(quantized) == (4 * 7 + 4 * 5 if precision == "int4" else 0)


def test_the_decoder_keeps_the_label_rows_of_the_head_alone(
    built: tuple[Precision, Path, Mapping[str, BlockSpec]], checkpoint: Checkpoint
) -> None:
    _, folder, specs = built
    vocabulary = checkpoint.config.text["vocab_size"]
    model = onnx.load(folder / specs["decoder"].file, load_external_data=False)
    assert all(vocabulary not in tensor.dims for tensor in model.graph.initializer)


def test_the_decoder_scores_twelve_labels_as_pytorch_does(
    checkpoint: Checkpoint,
    twelve_labels: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twelve = dataclasses.replace(checkpoint.config, labels=twelve_labels)
    monkeypatch.setattr(checkpoint.model, "config", twelve)
    encoder = checkpoint.prompt_encoder()
    data = SyntheticData(3, 78)
    tensors = reference_tensors(
        checkpoint, [data[i].image for i in range(3)], [SHORT, LONG, "Night blindness."]
    )
    spec = build_decoder(checkpoint.model, encoder, tmp_path, "fp32", "float32")
    scores = run_block(tmp_path, spec, tensors)["scores"]
    assert scores.shape == (3, 12)
    np.testing.assert_allclose(scores, tensors["scores"], atol=1e-4, rtol=0)

"""mdf_export.residual_norms: fused graphs against the standard ones."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from mdf_export import build_engine
from mdf_export.parts import tensor_specs
from mdf_export.recipe import ExportRecipe
from mdf_export.residual_norms import DOMAIN, fuse_residual_norms
from mdf_sdk.manifest import FUSED_SUFFIX, load_manifest

ROWS, WIDTH = 5, 64
# Largest difference over the largest value. Seen: 2e-7, 6e-4 and 4e-3; in float16 the sum of a
# linear and its bias is rounded once more where it is an operator of its own.
RTOL = {"fp32": 1e-6, "fp16": 2e-3, "int4": 1e-2}
node = helper.make_node


@pytest.fixture(scope="module", params=["fp32", "fp16", "int4"])
def engine(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    precision = request.param
    if precision != "fp16":
        fixture = {"fp32": "tiny_engine", "int4": "int4_engine"}[precision]
        return precision, request.getfixturevalue(fixture)
    folder = tmp_path_factory.mktemp("engines") / "fp16"
    build_engine(tiny_checkpoint, folder, ExportRecipe("fp16"))
    return precision, folder


def run(model: onnx.ModelProto, engine: Path, tensors: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(engine)
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {
        spec.name: tensors[f"case0/{spec.name}"].astype(spec.dtype)
        for spec in tensor_specs(model.graph.input)
    }
    found: list[Any] = session.run(None, feed)
    return found


def read(engine: Path, file: str) -> onnx.ModelProto:
    return onnx.load(engine / file, load_external_data=False)


@pytest.mark.parametrize("block", ["vision", "fusion", "decoder"])
def test_the_fused_graph_gives_what_the_standard_one_gives(
    engine: tuple[str, Path], block: str
) -> None:
    precision, folder = engine
    standard = read(folder, f"{block}.onnx")
    fused = read(folder, f"{block}.onnx{FUSED_SUFFIX}")
    assert {n.domain for n in standard.graph.node} == {""}
    assert {n.domain for n in fused.graph.node} == {"", DOMAIN}
    assert fused.graph.initializer == standard.graph.initializer
    with np.load(folder / "golden.npz") as tensors:
        results = [run(model, folder, tensors) for model in (fused, standard)]
    for a, b in zip(*results, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        assert np.abs(a - b).max() <= RTOL[precision] * np.abs(b).max()


def test_only_graphs_with_something_to_fuse_have_one_beside(engine: tuple[str, Path]) -> None:
    files = load_manifest(engine[1]).files
    fused = {name for name in files if name.endswith(FUSED_SUFFIX)}
    assert fused == {"vision.onnx.fused", "fusion.onnx.fused", "decoder.onnx.fused"}


def test_every_norm_of_a_residual_sum_is_fused(engine: tuple[str, Path]) -> None:
    vision, decoder = (
        Counter(n.op_type for n in read(engine[1], f"{block}.onnx{FUSED_SUFFIX}").graph.node)
        for block in ("vision", "decoder")
    )
    # Left are those of what is no sum of two streams. Of the tower: before the first layer, of it,
    # and of the first global layer; of the decoder: the first, the last layer's second, which reads
    # those rows alone that predict labels, and those of heads, one in each of 4 cross-attentions.
    assert vision["LayerNormalization"] == 3
    assert decoder["RMSNormalization"] == 2 + 4
    assert vision["SkipLayerNormalization"] > 2
    assert decoder["SkipSimplifiedLayerNormalization"] == 2 * 8 - 1


def small(addend: str = "linear", reader: str = "") -> list[onnx.NodeProto]:
    nodes = [
        node("MatMul", ["x", "w"], ["product"], name="product"),
        node("Add", ["product", "linear/bias"], ["linear"], name="linear"),
        node("Add", ["x", addend], ["sum"], name="sum"),
        node(
            "LayerNormalization",
            ["sum", "gamma", "beta"],
            ["normed"],
            name="normed",
            axis=-1,
            epsilon=1e-5,
        ),
        node("Add", ["sum", "normed"], ["y"], name="y"),
    ]
    return nodes + ([node("Identity", [reader], ["z"], name="z")] if reader else [])


def test_the_bias_of_a_linear_is_the_fused_nodes_bias() -> None:
    _, fused, _ = fuse_residual_norms(small())
    assert (fused.op_type, fused.domain) == ("SkipLayerNormalization", DOMAIN)
    assert fused.input == ["product", "x", "gamma", "beta", "linear/bias"]
    assert fused.output == ["normed", "", "", "sum"]


def test_a_bias_whose_sum_is_read_elsewhere_stays() -> None:
    nodes = fuse_residual_norms(small(reader="linear"))
    assert [n.op_type for n in nodes] == [
        "MatMul",
        "Add",
        "SkipLayerNormalization",
        "Add",
        "Identity",
    ]
    assert nodes[2].input == ["linear", "x", "gamma", "beta"]


def test_a_constant_is_no_residual() -> None:
    assert fuse_residual_norms(small(addend="positions")) == small(addend="positions")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scale", [0.003, 1.0, 60.0])
def test_the_processors_kernel_sums_in_float32(dtype: Any, scale: float) -> None:
    """Relative L2 against float64; a sum in float16 would be off by 10 times as much."""
    rng = np.random.default_rng(0)
    shapes = {"w": (WIDTH, WIDTH), "linear/bias": (WIDTH,), "gamma": (WIDTH,), "beta": (WIDTH,)}
    arrays = {name: (rng.normal(size=shape) * 0.1).astype(dtype) for name, shape in shapes.items()}
    x = (rng.normal(size=(1, ROWS, WIDTH)) * scale).astype(dtype)
    of = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names = ("normed", "sum", "product")
    graph = helper.make_graph(
        fuse_residual_norms(small()),
        "small",
        [helper.make_tensor_value_info("x", of, ["B", "T", WIDTH])],
        [helper.make_tensor_value_info(name, of, ["B", "T", WIDTH]) for name in names],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    normed, total, product = (a.astype(np.float64) for a in session.run(None, {"x": x}))
    exact = product + arrays["linear/bias"].astype(np.float64) + x
    centered = exact - exact.mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * arrays["gamma"] + arrays["beta"].astype(np.float64)
    bound = {np.float32: 1e-6, np.float16: 4e-4}[dtype]
    assert np.linalg.norm(normed - expected) < bound * np.linalg.norm(expected)
    assert np.linalg.norm(total - exact) < bound * np.linalg.norm(exact)

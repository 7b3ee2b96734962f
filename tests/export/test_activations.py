"""mdf_export.activations: the peak of live tensors, on graphs small enough to count by hand."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from mdf_export.activations import activation_bytes, longest_dimensions
from mdf_export.blocks import read_spec
from mdf_export.planning import plan_checkpoint, plan_specs
from mdf_export.recipe import ExportRecipe
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk import EngineError, load_manifest
from mdf_sdk.manifest import BLOCKS

ROWS, WIDTH = 10, 4
TENSOR = 4 * ROWS * WIDTH  # bytes of float32 (1, T, WIDTH)
node = helper.make_node


def save(folder: Path, nodes: list[onnx.NodeProto], *constants: onnx.TensorProto) -> Path:
    """A graph x (B, T, WIDTH) -> y of the same shape."""
    bindings = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("B", "T", WIDTH))] for name in "xy"
    ]
    graph = helper.make_graph(nodes, "graph", *bindings, initializer=constants)
    path = folder / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def peak(path: Path) -> int:
    return activation_bytes(path, {"B": 1, "T": ROWS})


def ints(name: str, *values: int) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, (len(values),), values)


def test_a_chain_holds_input_output_and_one_tensor_between(tmp_path: Path) -> None:
    nodes = [node("Exp", ["x"], ["a"]), node("Exp", ["a"], ["b"]), node("Exp", ["b"], ["y"])]
    assert peak(save(tmp_path, nodes)) == 3 * TENSOR  # x, a, b; then x, b, y


def test_a_tensor_lives_until_it_is_last_read(tmp_path: Path) -> None:
    nodes = [node("Exp", ["x"], ["a"]), node("Exp", ["a"], ["b"]), node("Add", ["a", "b"], ["y"])]
    assert peak(save(tmp_path, nodes)) == 4 * TENSOR


def test_an_output_that_nothing_reads_still_takes_its_memory(tmp_path: Path) -> None:
    nodes = [
        node("Split", ["x", "sizes"], ["a", "unread"], axis=1),
        node("Concat", ["a", "a"], ["y"], axis=1),
    ]
    path = save(tmp_path, nodes, ints("sizes", ROWS // 2, ROWS // 2))
    assert peak(path) == TENSOR + TENSOR // 2 + TENSOR


def test_views_share_the_memory_of_what_they_view(tmp_path: Path) -> None:
    nodes = [
        node("Exp", ["x"], ["a"]),
        node("Reshape", ["a", "flat"], ["b"]),
        node("Unsqueeze", ["b", "front"], ["c"]),
        node("Reshape", ["c", "back"], ["d"]),
        node("Add", ["a", "d"], ["y"]),
    ]
    constants = (ints("flat", -1), ints("front", 0), ints("back", 1, ROWS, WIDTH))
    assert peak(save(tmp_path, nodes, *constants)) == 3 * TENSOR


def test_what_a_view_shows_lives_as_long_as_the_view(tmp_path: Path) -> None:
    nodes = [
        node("Exp", ["x"], ["a"]),
        node("Identity", ["a"], ["view"]),
        node("Exp", ["x"], ["b"]),
        node("Add", ["view", "b"], ["y"]),
    ]
    assert peak(save(tmp_path, nodes)) == 4 * TENSOR


def test_weights_count_only_once_they_are_dequantized(tmp_path: Path) -> None:
    codes = helper.make_tensor("codes", TensorProto.INT8, (WIDTH, WIDTH), range(WIDTH**2))
    scale = helper.make_tensor("scale", TensorProto.FLOAT, (), [0.5])
    dense = [node("MatMul", ["x", "w"], ["y"])]
    weight = helper.make_tensor("w", TensorProto.FLOAT, (WIDTH, WIDTH), range(WIDTH**2))
    quantized = [node("DequantizeLinear", ["codes", "scale"], ["w"]), *dense]
    assert peak(save(tmp_path, dense, weight)) == 2 * TENSOR
    assert peak(save(tmp_path, quantized, codes, scale)) == 2 * TENSOR + 4 * WIDTH**2


def test_attention_needs_its_scores_as_well(tmp_path: Path) -> None:
    heads = {"q_num_heads": 2, "kv_num_heads": 2}
    nodes = [node("Attention", ["x", "x", "x"], ["y"], **heads)]
    assert peak(save(tmp_path, nodes)) == 2 * TENSOR + 4 * 2 * ROWS * ROWS


def test_a_dimension_without_a_size_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, [node("Exp", ["x"], ["y"])])
    with pytest.raises(EngineError, match="the free dimension 'T'"):
        activation_bytes(path, {"B": 1})


def test_a_shape_that_depends_on_values_is_an_error(tmp_path: Path) -> None:
    nodes = [
        node("NonZero", ["x"], ["a"]),
        node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        node("ReduceSum", ["b"], ["c"]),
        node("Add", ["x", "c"], ["y"]),
    ]
    with pytest.raises(EngineError, match="tensor 'a': found a shape that is not known"):
        peak(save(tmp_path, nodes))


def test_a_longer_text_and_a_larger_batch_need_more(tiny_engine: Path) -> None:
    decoder = tiny_engine / "decoder.onnx"
    short, long = ({"B": 1, "T": t, "S": 10 + t} for t in (20, 40))
    once = activation_bytes(decoder, short)
    assert once < activation_bytes(decoder, long)
    assert activation_bytes(decoder, short | {"B": 3}) == pytest.approx(3 * once, rel=0.05)


def test_an_engine_says_what_its_graphs_need(
    tiny_checkpoint: Path, tiny_engine: Path, int4_engine: Path
) -> None:
    encoder = StreamedCheckpoint.open(tiny_checkpoint).prompt_encoder()
    for engine in (tiny_engine, int4_engine):
        for name, block in load_manifest(engine).blocks.items():
            path = engine / f"{name}.onnx"
            assert block == read_spec(path, block.precision, encoder)
            assert block.activation_bytes == activation_bytes(path, longest_dimensions(encoder))


def test_a_plan_without_weights_needs_what_the_engine_will(
    tiny_checkpoint: Path, int4_engine: Path
) -> None:
    specs = plan_specs(plan_checkpoint(tiny_checkpoint, ExportRecipe("int4", method="rtn")))
    assert specs == load_manifest(int4_engine).blocks
    assert tuple(specs) == BLOCKS

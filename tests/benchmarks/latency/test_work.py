"""mdf_benchmarks.latency.work: graphs counted by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdf_benchmarks.latency.work import Work, count_work
from mdf_sdk import EngineError

FLOAT = TensorProto.FLOAT


def save(tmp_path: Path, nodes: list[Any], weights: list[Any], shape: list[Any]) -> Path:
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        weights,
    )
    path = tmp_path / "block.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def test_a_product_with_int4_weights_moves_half_a_byte_for_each(tmp_path: Path) -> None:
    weight = helper.make_tensor(
        "w", TensorProto.INT4, [64, 32], np.zeros(1024, np.uint8).tobytes(), raw=True
    )
    scales = numpy_helper.from_array(np.ones((2, 32), np.float32), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    work = count_work(save(tmp_path, nodes, [weight, scales], ["B", "T", 64]), {"B": 2, "T": 5})
    assert work.flop == 2 * 2 * 5 * 64 * 32
    assert work.moved_bytes == 64 * 32 // 2 + 4 * 2 * 32 + 4 * 2 * 5 * (64 + 32)


def test_a_product_of_integers_counts_as_one_of_floats(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 32), np.int8), "w")
    zero = numpy_helper.from_array(np.array(128, np.uint8), "z")
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "z"], ["q"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["y"], to=FLOAT),
    ]
    work = count_work(save(tmp_path, nodes, [weight, zero, one], ["B", "T", 64]), {"B": 2, "T": 5})
    assert work.flop == 2 * 2 * 5 * 64 * 32
    assert work.moved_bytes == 64 * 32 + 1 + 4 + 4 * 2 * 5 * (64 + 32)


def test_a_grouped_convolution(tmp_path: Path) -> None:
    kernel = numpy_helper.from_array(np.ones((8, 2, 3, 3), np.float16).astype(np.float32), "k")
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["y"], group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    ]
    work = count_work(save(tmp_path, nodes, [kernel], ["B", 4, 10, 10]), {"B": 1})
    assert work.flop == 2 * (8 * 5 * 5) * (2 * 3 * 3)
    assert work.moved_bytes == 4 * (8 * 2 * 9 + 4 * 100 + 8 * 25)


def test_attention_is_two_products(tmp_path: Path) -> None:
    keys = numpy_helper.from_array(np.ones((1, 7, 16), np.float32), "k")
    nodes = [helper.make_node("Attention", ["x", "k", "k"], ["y"], q_num_heads=4, kv_num_heads=2)]
    work = count_work(save(tmp_path, nodes, [keys], ["B", "T", 32]), {"B": 1, "T": 3})
    assert work.flop == 2 * (2 * 3 * 7 * 32)


def test_the_demo_engines_decoder_grows_with_its_rows(demo_engine: Path) -> None:
    def count(rows: int) -> Work:
        return count_work(demo_engine / "decoder.onnx", {"B": 1, "T": rows, "S": rows + 19})

    short, long = count(10), count(40)
    assert 3.5 < long.flop / short.flop < 4.5
    weights = (demo_engine / "decoder.onnx.data").stat().st_size
    assert weights < short.moved_bytes < long.moved_bytes < 1.3 * weights


def test_a_layer_that_reads_patches_of_a_skip_costs_as_many_keys_more(
    tiny_engine: Path, skip_engine: Path
) -> None:
    tiny, skip = (
        count_work(engine / "decoder.onnx", {"B": 1, "T": 10, "S": 29})
        for engine in (tiny_engine, skip_engine)
    )
    more = 2 * (64 - 37)  # keys of two layers, as wide as 2 of the 4 heads of 32 features
    assert skip.flop - tiny.flop == 2 * 2 * (10 * 4 * 32) * more
    assert skip.moved_bytes - tiny.moved_bytes == 2 * 4 * (2 * 32) * more


def test_an_operator_that_multiplies_and_is_not_counted_is_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    path = save(tmp_path, [helper.make_node("Gemm", ["x", "w"], ["y"])], [weight], [2, 4])
    with pytest.raises(EngineError, match=r"Gemm.*mdf export"):
        count_work(path, {})


def test_what_is_no_graph_is_told(tmp_path: Path) -> None:
    path = tmp_path / "vision.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"vision\.onnx.*mdf verify"):
        count_work(path, {})

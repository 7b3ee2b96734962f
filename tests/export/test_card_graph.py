"""mdf_export.card_graph: what a card's graph has in place of the standard one's nodes.

tests/export/test_residual_norms.py runs both, and holds their outputs against each other.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from mdf_export.card_graph import to_card_graph
from mdf_sdk.manifest import FUSED_SUFFIX

node = helper.make_node


def attention(*inputs: str, kv_heads: int = 4) -> onnx.NodeProto:
    return node("Attention", inputs, ["y"], name="attention", q_num_heads=4, kv_num_heads=kv_heads)


def test_an_attention_that_sees_all_has_the_operator_with_cudnns_kernel() -> None:
    (found,) = to_card_graph([attention("q", "k", "v")], [], "float16")
    assert (found.op_type, found.domain) == ("MultiHeadAttention", "com.microsoft")
    assert list(found.input) == ["q", "k", "v"]
    assert list(found.output) == ["y"]
    assert {a.name: a.i for a in found.attribute} == {"num_heads": 4}


def test_grouped_heads_that_see_all_stay_as_they_are() -> None:
    grouped = attention("q", "k", "v", kv_heads=2)
    assert to_card_graph([grouped], [], "float16") == [grouped]


@pytest.mark.parametrize("float_type", ["float16", "float32"])
def test_a_mask_is_turned_into_numbers_once_for_all(float_type: str) -> None:
    pair = [attention("q", "k", "v", "mask"), attention("q2", "k2", "v2", "mask", kv_heads=2)]
    *made, first = (nodes := to_card_graph(pair, [], float_type))[:4]
    assert [n.op_type for n in made] == ["Constant", "Constant", "Where"]
    assert list(made[-1].input) == ["mask", made[0].output[0], made[1].output[0]]
    seen, unseen = (numpy_helper.to_array(n.attribute[0].t) for n in made[:2])
    assert (seen, unseen) == (0.0, np.finfo(np.float16).min)
    assert seen.dtype == unseen.dtype == float_type
    added = made[-1].output[0]
    assert first.op_type == nodes[-1].op_type == "MultiHeadAttention"
    assert list(first.input) == ["q", "k", "v", "", "", added]
    assert list(nodes[-1].input) == ["q2", *nodes[-1].input[1:3], "", "", added]
    repeated = [n.input[0] for n in nodes if n.op_type == "Reshape"]  # of the grouped heads
    assert {"k2", "v2"} <= set(repeated)


def test_the_instructions_keys_are_read_as_they_are() -> None:
    expand = node("Expand", ["/layers.0/prefix_1", "shape"], ["tiled"], name="expand")
    joined = node("Concat", ["tiled", "fed"], ["keys"], name="concat", axis=1)
    (found,) = to_card_graph([expand, joined], [], "float16")
    assert list(found.input) == ["/layers.0/prefix_1", "fed"]
    other = node("Expand", ["class_token", "shape"], ["tiled"], name="expand")
    assert to_card_graph([other, joined], [], "float16") == [other, joined]


def test_the_graphs_of_an_engine_have_all_of_it(tiny_engine: Path) -> None:
    def count(file: str) -> Counter[str]:
        graph = onnx.load(tiny_engine / file, load_external_data=False).graph
        return Counter(n.op_type for n in graph.node)

    vision, fusion, decoder = (
        count(f"{block}.onnx{FUSED_SUFFIX}") for block in ("vision", "fusion", "decoder")
    )
    plain = count("vision.onnx")
    assert vision["MultiHeadAttention"] == plain["Attention"] / 2 > 0
    assert vision["Attention"] == 0
    assert fusion["MultiHeadAttention"] == 4
    assert decoder["MultiHeadAttention"] == decoder["Expand"] / 2 > 0
    assert decoder["Where"] == 1


def test_the_towers_batch_stays_free(tiny_engine: Path, tmp_path: Path) -> None:
    """Were it known to be 1, ONNX Runtime would make Gemm of the tower's products, which on a card
    copies the bias before each."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tiny_engine)
    )
    graph = (tiny_engine / f"vision.onnx{FUSED_SUFFIX}").read_bytes()
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    assert "Gemm" not in {n.op_type for n in optimized.node}

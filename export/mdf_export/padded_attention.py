"""The tower's two attentions of each layer in, its patches' and its padding's, one of both out.

Rows of padding must not see each other, and a mask for that would keep a card from its fast
kernels. Instead each head gets features that are zero but for padding, where a query's and a key's
product drives the softmax to zero. Kernels round a head's features up anyway, and what copies and
joins the rows of the two is gone.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, numpy_helper

from mdf_export.new_nodes import NewNodes
from mdf_export.residual_norms import DOMAIN

_APART = 128.0  # of a query, and negative of a key; with its square exact in float16
_HEAD_STEP = 8  # fused kernels take heads of multiples of it


def merge_padded_attention(
    nodes: Sequence[NodeProto], initializers: Iterable[TensorProto], float_type: str
) -> list[NodeProto]:
    """Put each pair of attentions that a layer's q, k and v of one product go through into one.

    Args:
        nodes: as GraphBuilder writes them.
        initializers: of the graph; those that hold shapes and bounds are read.
        float_type: of activations, "float32" or "float16".
    """
    integers = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in initializers
        if tensor.data_type == TensorProto.INT64 and tensor.raw_data
    }
    makers = {name: node for node in nodes for name in node.output}
    merged: dict[str, list[NodeProto]] = {}  # by the output that they give
    gone: set[str] = set()
    added = ""
    for node in nodes:
        pair = [makers[name] for name in node.input if name in makers]
        if node.op_type != "Concat" or [part.op_type for part in pair] != ["Attention"] * 2:
            continue
        patches, padding = pair
        slices = [makers[name] for name in (patches.input[0], *padding.input)]
        split = makers[slices[0].input[0]]
        if list(split.output) != [slices[0].input[0], *patches.input[1:]]:  # of several products
            continue
        heads = next(a.i for a in patches.attribute if a.name == "q_num_heads")
        width = int(integers[split.input[1]][0]) // heads
        first, end = (int(integers[name][0]) for name in slices[1].input[1:3])
        wider = width + _HEAD_STEP - width % _HEAD_STEP
        qkv, output = split.input[0], node.output[0]
        made = NewNodes(patches.name)
        if not added:  # every layer's are alike
            features = np.zeros((1, end, 3 * heads, wider - width), float_type)
            features[:, first:, :heads, 0] = _APART
            features[:, first:, heads : 2 * heads, 0] = -_APART
            added = _tile_batch(made, features, qkv)
        _attend(made, qkv, added, output, heads, width, wider)
        merged[output] = made.nodes
        gone |= {name for part in (*pair, *slices, split) for name in part.output}
    return [
        kept
        for node in nodes
        if not gone & set(node.output)
        for kept in merged.get(node.output[0], [node])
    ]


def _tile_batch(new: NewNodes, value: npt.NDArray[Any], like: str) -> str:
    """Repeat a (1, ...) constant over the batch of `like`, which it leaves free.

    Were it fixed at 1, ONNX Runtime would make other products of the tower's, which are slower.
    """
    batch = new.op("Shape", like, start=0, end=1)
    shape = new.op("Concat", batch, new.ints(*value.shape[1:]), axis=0)
    return new.op("Expand", new.constant(value), shape)


def _attend(
    new: NewNodes, qkv: str, added: str, output: str, heads: int, width: int, wider: int
) -> None:
    """Attention on q, k and v (B, T, 3 * heads * width), whose heads are made wider."""
    x = new.op("Reshape", qkv, new.ints(0, 0, 3 * heads, width))
    x = new.op("Reshape", new.op("Concat", x, added, axis=3), new.ints(0, 0, -1))
    parts = [f"{output}/{part}" for part in "qkv"]
    new.op("Split", x, outputs=parts, axis=2, num_outputs=3)
    scale = width**-0.5
    x = new.op("MultiHeadAttention", *parts, domain=DOMAIN, num_heads=heads, scale=scale)
    x = new.op("Reshape", x, new.ints(0, 0, heads, wider))
    x = new.op("Slice", x, new.ints(0), new.ints(width), new.ints(3))
    new.op("Reshape", x, new.ints(0, 0, -1), outputs=[output])

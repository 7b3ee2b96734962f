"""Nodes as every runtime takes them in, the same with what ONNX Runtime is faster by on a card out.

Its operators for that are its own, and slower on the processor or unknown elsewhere: so this graph
stands beside the standard one, over the same weights. It takes one case at a time.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from onnx import NodeProto, TensorProto

from mdf_export.new_nodes import NewNodes
from mdf_export.padded_attention import merge_padded_attention
from mdf_export.residual_norms import DOMAIN, fuse_residual_norms

_PREFIX = re.compile(r"/prefix(_\d+)?$")
_MASK = 3  # among Attention's inputs
# Added to scores that are not to be seen; float16's lowest, so that a row of them stays finite.
_UNSEEN = -65504.0


def to_card_graph(
    nodes: Iterable[NodeProto], initializers: Iterable[TensorProto], float_type: str
) -> list[NodeProto]:
    """Rewrite a graph's nodes; what has nothing to gain comes back equal.

    Args:
        nodes: as GraphBuilder writes them.
        initializers: of the graph; those that hold shapes and bounds are read.
        float_type: of activations, "float32" or "float16".
    """
    nodes = _with_untiled_prefixes(fuse_residual_norms(nodes))
    nodes = merge_padded_attention(nodes, initializers, float_type)
    nodes = _with_float_masks(nodes, float_type)
    return [made for node in nodes for made in _attention(node)]


def _with_untiled_prefixes(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Let the instruction's keys and values be read as they are: there is one case."""
    tiled = {
        node.output[0]: node.input[0]
        for node in nodes
        if node.op_type == "Expand" and _PREFIX.search(node.input[0])
    }
    kept = [node for node in nodes if not tiled.keys() & set(node.output)]
    return [_with_inputs(node, [tiled.get(name, name) for name in node.input]) for node in kept]


def _with_float_masks(nodes: Sequence[NodeProto], float_type: str) -> list[NodeProto]:
    """Turn each boolean mask into what is added to the scores: each attention would do so anew."""
    added: dict[str, str] = {}
    made: list[NodeProto] = []
    for mask in dict.fromkeys(node.input[_MASK] for node in nodes if _is_masked(node)):
        new = NewNodes(mask)
        seen, unseen = (new.constant(np.array(value, float_type)) for value in (0.0, _UNSEEN))
        added[mask] = new.op("Where", mask, seen, unseen)
        made += new.nodes
    return made + [
        _with_inputs(node, [*node.input[:_MASK], added[node.input[_MASK]]])
        if _is_masked(node)
        else node
        for node in nodes
    ]


def _attention(node: NodeProto) -> list[NodeProto]:
    """Take the operator that has cuDNN's kernel, from compute capability 9.0 on.

    Of the tower's 1601 rows it takes 49 us on an H200, where Attention's takes 71. With a mask,
    Attention clears the rows that see nothing in a kernel of its own, 14 us: here such rows see all
    alike, and nothing reads them.
    """
    if node.op_type != "Attention":
        return [node]
    heads, kv_heads = (_integer(node, name) for name in ("q_num_heads", "kv_num_heads"))
    if heads != kv_heads and not _is_masked(node):  # Attention's kernel reads them as they are
        return [node]
    new, (query, keys, values, *mask) = NewNodes(node.name), node.input
    if heads != kv_heads:
        keys, values = (_repeat_heads(new, x, heads, kv_heads) for x in (keys, values))
    inputs = [query, keys, values, *(["", "", *mask] if mask else [])]
    new.op("MultiHeadAttention", *inputs, outputs=node.output, domain=DOMAIN, num_heads=heads)
    return new.nodes


def _repeat_heads(new: NewNodes, x: str, heads: int, kv_heads: int) -> str:
    """(B, S, kv_heads * d) -> (B, S, heads * d), each head in place of those that share it."""
    x = new.op("Reshape", x, new.ints(0, 0, kv_heads, 1, -1))
    x = new.op("Expand", x, new.ints(1, 1, 1, heads // kv_heads, 1))
    return new.op("Reshape", x, new.ints(0, 0, -1))


def _is_masked(node: NodeProto) -> bool:
    return node.op_type == "Attention" and len(node.input) > _MASK


def _integer(node: NodeProto, name: str) -> int:
    return int(next(attribute.i for attribute in node.attribute if attribute.name == name))


def _with_inputs(node: NodeProto, inputs: Sequence[str]) -> NodeProto:
    if list(node.input) == list(inputs):
        return node
    changed = NodeProto()
    changed.CopyFrom(node)
    del changed.input[:]
    changed.input.extend(inputs)
    return changed

"""Residual sums and the norms that read them: one node of ONNX Runtime's, or ONNX's own operators.

ONNX Runtime has one kernel for both, but does not put them together itself where something else
reads the sum too, as the next residual sum always does. No other runtime knows these nodes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from onnx import ModelProto, NodeProto, helper

DOMAIN = "com.microsoft"
_FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}
_SPLIT = {fused: norm for norm, fused in _FUSED.items()}


def fuse_residual_norms(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """Put each x + h and the norm that reads it into one node, with the bias of the linear of h.

    Args:
        nodes: as GraphBuilder writes them, x before h, biases named so; fused ones stay.
    """
    nodes = list(nodes)
    makers = {name: node for node in nodes for name in node.output}
    readers = Counter(name for node in nodes for name in node.input)
    norms = {node.input[0]: node for node in nodes if node.op_type in _FUSED}
    fused: dict[str, NodeProto] = {}  # by the sum
    gone: set[str] = set()
    for node in nodes:
        total = node.output[0]
        # h is computed; what is added to all cases alike is a constant.
        if node.op_type != "Add" or total not in norms or node.input[1] not in makers:
            continue
        norm, (x, h), bias = norms[total], node.input, []
        if makers[h].op_type == "Add" and readers[h] == 1 and makers[h].input[1].endswith("/bias"):
            gone.add(h)
            h, *bias = makers[h].input
        (normed,) = norm.output
        gone.add(normed)
        fused[total] = helper.make_node(
            _FUSED[norm.op_type],
            [h, x, *norm.input[1:], *bias],
            [normed, "", "", total],  # between them, statistics for training
            name=norm.name,
            domain=DOMAIN,
            epsilon=_epsilon(norm),
        )
    return [fused.get(node.output[0], node) for node in nodes if node.output[0] not in gone]


def to_standard(model: ModelProto) -> ModelProto:
    """Return the same graph without fused nodes, for what knows ONNX's own operators only."""
    standard = ModelProto()
    standard.CopyFrom(model)
    del standard.graph.node[:], standard.opset_import[:]
    for node in model.graph.node:
        standard.graph.node.extend(_split(node) if node.op_type in _SPLIT else [node])
    standard.opset_import.extend(o for o in model.opset_import if o.domain != DOMAIN)
    return standard


def _split(node: NodeProto) -> Iterator[NodeProto]:
    kind, (normed, _, _, total), (h, x, *rest) = _SPLIT[node.op_type], node.output, node.input
    weights = 2 if kind == "LayerNormalization" else 1  # what follows them is a bias of h
    for bias in rest[weights:]:
        biased = f"{total}/biased"
        yield helper.make_node("Add", [h, bias], [biased], name=biased)
        h = biased
    yield helper.make_node("Add", [x, h], [total], name=total)
    inputs = [total, *rest[:weights]]
    yield helper.make_node(kind, inputs, [normed], name=node.name, axis=-1, epsilon=_epsilon(node))


def _epsilon(node: NodeProto) -> float:
    return float(next(a.f for a in node.attribute if a.name == "epsilon"))

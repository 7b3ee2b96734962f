"""Residual sums and the norms that read them in, one node of ONNX Runtime's for each pair out.

On a card it has one kernel for both, but does not put them together itself where something else
reads the sum too, as the next residual sum does. On the processor its kernel is slower than those
of the two operators, and no other runtime knows it: so the fused graph stands beside the standard
one.
"""

from collections import Counter
from collections.abc import Iterable

from onnx import NodeProto, helper

DOMAIN = "com.microsoft"
_FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}


def fuse_residual_norms(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """Put each x + h and the norm that reads it into one node, with the bias of the linear of h.

    Args:
        nodes: as GraphBuilder writes them, x before h, biases named so.
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


def _epsilon(node: NodeProto) -> float:
    return float(next(a.f for a in node.attribute if a.name == "epsilon"))

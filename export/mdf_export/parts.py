"""A decoder's graph in, consecutive parts of it out, each a graph of its own over the same weights.

A compiler holds a graph's weights several times over: a large decoder compiles in bounded memory as
parts. The cuts are behind whole layers, where little more than the residual stream passes.
"""

import re
from collections.abc import Sequence

import onnx
from onnx import helper

from mdf_sdk.errors import EngineError
from mdf_sdk.manifest import TensorSpec

STREAM = "inputs_embeds"  # what the first layer reads; every layer's output has its shape
_LAYER_OUTPUT = re.compile(r"/decoder/layers\.\d+/output")
_CROSS_ATTENTION_OUTPUT = re.compile(r"/decoder/layers\.(\d+)/cross_attention/o_proj/MatMul")
_ANYWHERE = -1  # computed from masks and positions alone: each part that needs it computes it


def layer_outputs(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the residual stream behind each layer, in order."""
    names = (name for node in graph.node for name in node.output)
    return [name for name in names if _LAYER_OUTPUT.fullmatch(name)]


def cross_attention_outputs(graph: onnx.GraphProto) -> dict[int, str]:
    """Return, by layer, the name of what a cross-attention gives before its gate."""
    names = (name for node in graph.node for name in node.output)
    found = (_CROSS_ATTENTION_OUTPUT.fullmatch(name) for name in names)
    return {int(match[1]): match[0] for match in found if match}


def weight_bytes(graph: onnx.GraphProto) -> int:
    """Return the bytes of the constants that a graph keeps in its data file."""
    entries = (entry for tensor in graph.initializer for entry in tensor.external_data)
    return sum(int(entry.value) for entry in entries if entry.key == "length")


def cut_layers(model: onnx.ModelProto, layers_per_part: int) -> list[onnx.ModelProto]:
    """Cut a decoder behind every `layers_per_part`-th layer; the last part also has the head.

    What a later part reads of an earlier one is an output there and an input here, under one name.

    Args:
        model: without its external data, whose location every part keeps.
        layers_per_part: at least 1.

    Raises:
        EngineError: the graph names no layers, or the shape of a value that passes is unknown.
    """
    layers = layer_outputs(model.graph)
    if not layers:
        raise EngineError(
            f"{model.graph.name}: found no value named /decoder/layers.0/output, expected one for "
            "each layer to cut it there. Export it again: mdf export CHECKPOINT ENGINE"
        )
    # The last layer stays with the head that reads it.
    cuts = layers[layers_per_part - 1 : -1 : layers_per_part]
    if not cuts:
        return [model]
    graph = onnx.shape_inference.infer_shapes(model).graph
    part_of = _parts_of_nodes(graph, cuts)
    chosen = [_nodes_of_part(graph, part_of, part) for part in range(len(cuts) + 1)]
    return [_part(model, graph, chosen, part) for part in range(len(chosen))]


def tensor_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Return names, dtypes and shapes of a graph's inputs or outputs."""
    return tuple(
        TensorSpec(
            value.name,
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def _parts_of_nodes(graph: onnx.GraphProto, cuts: Sequence[str]) -> list[int]:
    """Return the part of each node: the first in which all that it reads is there."""
    readable_from = {STREAM: 0}
    parts = []
    for node in graph.node:
        part = max((readable_from.get(name, _ANYWHERE) for name in node.input), default=_ANYWHERE)
        parts.append(part)
        readable_from |= dict.fromkeys(node.output, part)
        for name in node.output:
            if name in cuts:
                readable_from[name] = part + 1
    return parts


def _nodes_of_part(
    graph: onnx.GraphProto, part_of: Sequence[int], part: int
) -> list[onnx.NodeProto]:
    """Return, in order, a part's own nodes and those computed anywhere that they need."""
    needed: set[str] = set()
    nodes = []
    for node, its_part in zip(reversed(graph.node), reversed(part_of), strict=True):
        if its_part == part or (its_part == _ANYWHERE and needed.intersection(node.output)):
            nodes.append(node)
            needed.update(node.input)
    return nodes[::-1]


def _part(
    model: onnx.ModelProto,
    graph: onnx.GraphProto,
    parts: Sequence[Sequence[onnx.NodeProto]],
    i: int,
) -> onnx.ModelProto:
    nodes = parts[i]
    read = {name for node in nodes for name in node.input if name}
    made = {name for node in nodes for name in node.output if name}
    later = {name for part in parts[i + 1 :] for node in part for name in node.input}
    made_later = {name for part in parts[i + 1 :] for node in part for name in node.output}
    public = {value.name for value in graph.output}
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    fed = read - made - {tensor.name for tensor in initializers}
    given = made & (public | (later - made_later))
    values = (*graph.input, *graph.value_info, *graph.output)
    known = {value.name: value for value in values if _has_shape(value)}
    for name in sorted((fed | given) - known.keys()):
        raise EngineError(
            f"{graph.name}: found no shape of the value {name!r}, which passes from one part to "
            "another, expected one. Compile it in one part, or export it again: "
            "mdf export CHECKPOINT ENGINE"
        )
    return helper.make_model(
        helper.make_graph(
            nodes,
            f"{graph.name}.{i}",
            [value for name, value in known.items() if name in fed],
            [value for name, value in known.items() if name in given],
            initializer=initializers,
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
    )


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    shape = value.type.tensor_type.shape
    return all(
        d.dim_value or (d.dim_param and not d.dim_param.startswith("unk__")) for d in shape.dim
    )

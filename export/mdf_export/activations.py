"""A block's graph in, the bytes of its live tensors out: what a run of it needs beside weights."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from mdf_sdk.errors import EngineError
from mdf_sdk.prompt import PromptEncoder

_VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_SCORE_BYTES = 4  # a runtime without a fused kernel holds attention scores, in float32


def longest_dimensions(encoder: PromptEncoder) -> dict[str, int]:
    """Return the free dimensions of one case with the longest text, as every graph names them."""
    rows = encoder.count_rows(encoder.spec.max_text_tokens)
    return {"B": 1, "T": rows, "S": len(encoder.prefix_ids) + rows}


def activation_bytes(path_to_onnx: Path, dimensions: Mapping[str, int]) -> int:
    """Return the peak of live tensors when a graph's nodes run in their order.

    A tensor lives from the node that makes it to the last that reads it, inputs and outputs to the
    end; views share the memory of what they view. Attention's scores count, and so does a
    dequantized weight, live between its DequantizeLinear and its MatMul: a runtime with fused
    kernels needs less.

    Args:
        path_to_onnx: its external data is not read.
        dimensions: a size for every free dimension.

    Raises:
        EngineError: the size of a tensor cannot be told.
    """
    graph = _inferred(onnx.load(path_to_onnx, load_external_data=False), dimensions)
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type for value in values}
    constants = {tensor.name for tensor in graph.initializer}

    owner: dict[str, str] = {}  # of a tensor's memory
    for node in graph.node:
        owner |= {name: name for name in node.output if name}
        if node.op_type in _VIEWS:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
    last_read: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for name in (*node.input, *node.output):
            last_read[owner.get(name, name)] = i
    for value in (*graph.input, *graph.output):
        last_read[owner.get(value.name, value.name)] = len(graph.node)
    dying: list[list[str]] = [[] for _ in range(len(graph.node) + 1)]
    for name, i in last_read.items():
        if name and name not in constants:
            dying[i].append(name)

    live = sum(_bytes(value.name, types) for value in graph.input)
    peak = live
    for i, node in enumerate(graph.node):
        made = [name for name in node.output if owner.get(name) == name]
        live += sum(_bytes(name, types) for name in made)
        peak = max(peak, live + _workspace(node, types))
        live -= sum(_bytes(name, types) for name in dying[i])
    return peak


def _inferred(model: onnx.ModelProto, dimensions: Mapping[str, int]) -> onnx.GraphProto:
    """Fix the free dimensions of the inputs, and infer every other shape anew."""
    graph = model.graph
    for value in graph.input:
        for d in value.type.tensor_type.shape.dim:
            if d.dim_param:
                if d.dim_param not in dimensions:
                    raise _unknown(value.name, f"the free dimension {d.dim_param!r}")
                d.dim_value = dimensions[d.dim_param]
    outputs = [value.name for value in graph.output]
    del graph.value_info[:], graph.output[:]  # theirs are still free
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    inferred.output.extend(value for value in inferred.value_info if value.name in outputs)
    return inferred


def _workspace(node: onnx.NodeProto, types: Mapping[str, Any]) -> int:
    """Return the bytes of a node's own memory: of Attention, its scores (B, heads, T, S)."""
    if node.op_type != "Attention":
        return 0
    heads = next(a.i for a in node.attribute if a.name == "q_num_heads")
    (batch, rows, _), (_, columns, _) = (_shape(name, types) for name in node.input[:2])
    return _SCORE_BYTES * batch * heads * rows * columns


def _bytes(name: str, types: Mapping[str, Any]) -> int:
    shape = _shape(name, types)
    itemsize = helper.tensor_dtype_to_np_dtype(types[name].elem_type).itemsize
    return int(prod(shape) * itemsize)


def _shape(name: str, types: Mapping[str, Any]) -> list[int]:
    if name not in types or not types[name].HasField("shape"):
        raise _unknown(name, "no shape")
    dimensions = types[name].shape.dim
    if not all(d.HasField("dim_value") for d in dimensions):
        raise _unknown(name, "a shape that is not known")
    return [d.dim_value for d in dimensions]


def _unknown(name: str, found: str) -> EngineError:
    return EngineError(
        f"tensor {name!r}: found {found}, expected one that follows from the graph's inputs. "
        "Export it again: mdf export CHECKPOINT ENGINE"
    )

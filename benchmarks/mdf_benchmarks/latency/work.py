"""A block's ONNX graph in, the arithmetic and the bytes that it cannot do without out."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mdf_sdk import EngineError

if TYPE_CHECKING:
    from onnx import NodeProto

Shape = tuple[int, ...]

_PRODUCTS = ("MatMul", "MatMulInteger", "Conv", "Attention")


@dataclass(frozen=True)
class Work:
    """What a block cannot do without.

    Attributes:
        flop: multiplications and additions of its products, convolutions and attentions; all else
            is small beside them.
        moved_bytes: its weights as they are stored, its inputs and its outputs, each once. What
            passes between its operators may stay in a cache, and counts nothing.
    """

    flop: int
    moved_bytes: int


def count_work(graph: Path, dims: Mapping[str, int]) -> Work:
    """Count a graph; needs onnx, and reads no weight.

    Args:
        graph: the block's .onnx file.
        dims: sizes of its symbolic dimensions: "B" cases, "T" rows fed, "S" rows attended to.

    Raises:
        EngineError: it is no graph of ours: a shape cannot be told, or an operator multiplies that
            is not counted here.
    """
    import onnx

    try:
        model = onnx.load(graph, load_external_data=False)
        for value in model.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_value = dims[dim.dim_param]
        for value in model.graph.output:  # they would contradict the sizes
            value.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
        model = onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True)
    except Exception as error:  # protobuf, the checker and the reader of files each have their own
        raise EngineError(
            f"{graph}: {str(error)[:200]}; expected a block's graph. Check the engine: "
            "mdf verify ENGINE"
        ) from error
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    types = {
        value.name: value.type.tensor_type
        for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)
    }
    shapes: dict[str, Shape] = {
        name: tuple(dim.dim_value for dim in kind.shape.dim) for name, kind in types.items()
    }
    shapes |= {name: tuple(tensor.dims) for name, tensor in weights.items()}
    flop = sum(_node_flop(node, shapes) for node in model.graph.node)
    ends = [value.name for value in (*model.graph.input, *model.graph.output)]
    moved = sum(_bytes(types[name].elem_type, shapes[name]) for name in ends)
    moved += sum(_bytes(tensor.data_type, tuple(tensor.dims)) for tensor in weights.values())
    return Work(flop, moved)


def _node_flop(node: "NodeProto", shapes: Mapping[str, Shape]) -> int:
    if node.op_type not in _PRODUCTS:
        if node.op_type in ("Gemm", "Einsum", "ConvTranspose", "MatMulNBits"):
            raise EngineError(
                f"{node.name}: found the operator {node.op_type}, expected one that is counted: "
                f"{', '.join(_PRODUCTS)}. Export the engine again: mdf export CHECKPOINT ENGINE"
            )
        return 0
    output = prod(shapes[node.output[0]])
    if node.op_type in ("MatMul", "MatMulInteger"):
        return 2 * output * shapes[node.input[0]][-1]
    if node.op_type == "Conv":
        return 2 * output * prod(shapes[node.input[1]][1:])
    # Attention: queries by keys, then weights by values; a masked pair is multiplied all the same.
    query, keys = (shapes[name] for name in node.input[:2])
    return 2 * (prod(query) + output) * keys[-2]


def _bytes(data_type: int, shape: Shape) -> int:
    import onnx

    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return -(-prod(shape) // 2)
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize
    return prod(shape) * itemsize

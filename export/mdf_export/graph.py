"""Node by node to one ONNX graph, its weights streamed to a file of external data beside it."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from torch import Tensor

from mdf_export.quantize import pack_int4, quantize_int4
from mdf_sdk.manifest import BlockSpec, Precision, TensorSpec

OPSET = 23
IR_VERSION = 11
# A size that both ONNX Runtime's fused CUDA kernel and TensorRT-RTX take.
BLOCK_SIZE = 32
INLINE_BYTES = 1024  # shapes, indices and scalars stay in the graph
ALIGNMENT = 4096  # of external tensors, so that a runtime can memory-map them

FloatType = Literal["float32", "float16"]
DTYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


class GraphBuilder:
    """Builds one block; a context manager, because it holds the file of external data open.

    Values are the names of tensors, as in ONNX.
    """

    def __init__(
        self, folder: Path, name: str, precision: Precision, float_type: FloatType
    ) -> None:
        """Args:
        folder: receives {name}.onnx and {name}.onnx.data.
        name: of the block.
        precision: "int4" quantizes what `linear` is given.
        float_type: of activations and of weights that are not quantized.
        """
        self.folder, self.name = folder, name
        self.precision, self.float_type = precision, float_type
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._inputs: list[TensorSpec] = []
        self._outputs: list[TensorSpec] = []
        self._count = 0
        self._data: BinaryIO = (folder / f"{name}.onnx.data").open("wb")

    def __enter__(self) -> "GraphBuilder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._data.close()

    def input(self, name: str, shape: tuple[int | str, ...], dtype: str | None = None) -> str:
        """Declare an input; dtype is the block's float type unless told."""
        self._inputs.append(TensorSpec(name, dtype or self.float_type, shape))
        return name

    def output(
        self, name: str, value: str, shape: tuple[int | str, ...], dtype: str | None = None
    ) -> None:
        """Give a value its public name."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(TensorSpec(name, dtype or self.float_type, shape))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node of the default domain and return its first output."""
        self._count += 1
        output = f"{kind}_{self._count}"
        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, value: npt.ArrayLike | Tensor) -> str:
        """Add an initializer; floats become the block's float type, integers and booleans stay."""
        array = _to_numpy(value)
        if array.dtype.kind == "f":
            array = array.astype(self.float_type)
        return self._initializer(DTYPES[array.dtype.name], array.shape, array.tobytes())

    def ints(self, *values: int) -> str:
        """Add a one-dimensional int64 constant: a shape, axes, or bounds."""
        return self.constant(np.array(values, np.int64))

    def linear(self, x: str, weight: Tensor, bias: Tensor | None = None) -> str:
        """x @ weight.T + bias, the weight (N, K) quantized where the block is int4."""
        k_by_n = np.ascontiguousarray(_to_numpy(weight.detach().float()).T)
        if self.precision == "int4" and k_by_n.shape[0] % BLOCK_SIZE == 0:
            matrix = self._int4(k_by_n)
        else:
            matrix = self.constant(k_by_n)
        y = self.op("MatMul", x, matrix)
        return y if bias is None else self.op("Add", y, self.constant(bias))

    def rms_norm(self, x: str, weight: Tensor, epsilon: float) -> str:
        """Root mean square normalization over the last axis, in float32 whatever the float type."""
        return self.op("RMSNormalization", x, self.constant(weight), axis=-1, epsilon=epsilon)

    def head_norm(self, x: str, weight: Tensor, epsilon: float) -> str:
        """RMS normalization of each head of (B, T, heads * d), weight (d,)."""
        split = self.op("Reshape", x, self.ints(0, 0, -1, weight.shape[0]))
        return self.op("Reshape", self.rms_norm(split, weight, epsilon), self.ints(0, 0, -1))

    def layer_norm(self, x: str, weight: Tensor, bias: Tensor, epsilon: float) -> str:
        """Layer normalization over the last axis."""
        return self.op(
            "LayerNormalization",
            x,
            self.constant(weight),
            self.constant(bias),
            axis=-1,
            epsilon=epsilon,
        )

    def attention(
        self, q: str, k: str, v: str, heads: int, kv_heads: int, mask: str | None = None
    ) -> str:
        """Scaled dot-product attention on (B, T, heads * d); the mask is True where it may look.

        Three dimensions on purpose: a four-dimensional export adds transposes around each.
        """
        inputs = (q, k, v) if mask is None else (q, k, v, mask)
        return self.op("Attention", *inputs, q_num_heads=heads, kv_num_heads=kv_heads)

    def tile_batch(self, value: str, like: str, shape: tuple[int, ...]) -> str:
        """Repeat a (1, *shape) constant over the batch of `like`."""
        batch = self.op("Shape", like, start=0, end=1)
        return self.op("Expand", value, self.op("Concat", batch, self.ints(*shape), axis=0))

    def save(self) -> BlockSpec:
        """Check the graph and write it; the builder is done then."""
        self._data.flush()
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [helper.make_tensor_value_info(t.name, DTYPES[t.dtype], t.shape) for t in self._inputs],
            [
                helper.make_tensor_value_info(t.name, DTYPES[t.dtype], t.shape)
                for t in self._outputs
            ],
            initializer=self._initializers,
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(
            graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="mdf-mllm"
        )
        path = self.folder / f"{self.name}.onnx"
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(path)
        return BlockSpec(path.name, self.precision, tuple(self._inputs), tuple(self._outputs))

    def _int4(self, weight: npt.NDArray[np.float32]) -> str:
        codes, scales = quantize_int4(weight, BLOCK_SIZE)
        quantized = self._initializer(TensorProto.INT4, codes.shape, pack_int4(codes))
        return self.op(
            "DequantizeLinear", quantized, self.constant(scales), axis=0, block_size=BLOCK_SIZE
        )

    def _initializer(self, data_type: int, shape: Sequence[int], raw: bytes) -> str:
        self._count += 1
        tensor = TensorProto(name=f"constant_{self._count}", data_type=data_type, dims=shape)
        if len(raw) <= INLINE_BYTES:
            tensor.raw_data = raw
        else:
            self._data.write(bytes(-self._data.tell() % ALIGNMENT))
            tensor.data_location = TensorProto.EXTERNAL
            entries = {
                "location": f"{self.name}.onnx.data",
                "offset": self._data.tell(),
                "length": len(raw),
            }
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
            self._data.write(raw)
        self._initializers.append(tensor)
        return str(tensor.name)


def _to_numpy(value: npt.ArrayLike | Tensor) -> npt.NDArray[np.generic]:
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    return np.asarray(value)

"""Node by node to one ONNX graph, its weights streamed to a file of external data beside it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from mdf_export.card_graph import to_card_graph
from mdf_export.quantize import (
    W8A8_ROW_LEVELS,
    Float8Weight,
    QuantizedWeight,
    W8A8Weight,
    pack_int4,
)
from mdf_sdk.manifest import FUSED_SUFFIX, TensorSpec

OPSET = 23
IR_VERSION = 11
INLINE_BYTES = 1024  # shapes, indices and scalars stay in the graph
ALIGNMENT = 4096  # of external tensors, so that a runtime can memory-map them

FloatType = Literal["float32", "float16"]
Weight = Tensor | QuantizedWeight | Float8Weight | W8A8Weight
DTYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
_INTEGERS = {4: TensorProto.INT4, 8: TensorProto.INT8}
_ZERO = np.array(128, np.uint8)  # of rounded rows, unsigned: processors multiply unsigned by signed
_LEAST_SCALE = 1e-10  # of a row of zeros


class GraphBuilder:
    """Builds one block; a context manager, because it holds the file of external data open.

    Values are the names of tensors, as in ONNX. Nodes and weights are named by the `scope` that
    they are added in: /decoder/layers.3/cross_attention/q_proj/MatMul.

    Attributes:
        weight_bytes: of all initializers so far.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        float_type: FloatType,
        store: Callable[[nn.Linear], Weight],
        *,
        for_card: bool = True,
    ) -> None:
        """Args:
        folder: receives {name}.onnx and {name}.onnx.data, the latter without what is on the meta
            device; None only counts bytes.
        name: of the block.
        float_type: of activations and of weights that are not quantized.
        store: gives a linear's weight in the form in which the graph holds it.
        for_card: also write a card's graph, where a card has something to gain.
        """
        self.folder, self.name = folder, name
        self.float_type = float_type
        self.weight_bytes = 0
        self._store, self._for_card = store, for_card
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._inputs: list[TensorSpec] = []
        self._outputs: list[TensorSpec] = []
        self._scope = f"/{name}"
        self._taken: dict[str, int] = {}
        self._rounded_rows: dict[str, tuple[str, str]] = {}
        self._data: BinaryIO | None = None
        if folder is not None:
            self._data = (folder / f"{name}.onnx.data").open("wb")

    def __enter__(self) -> "GraphBuilder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._data is not None:
            self._data.close()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Add what follows under a name."""
        outer, self._scope = self._scope, f"{self._scope}/{name}"
        yield
        self._scope = outer

    def input(self, name: str, shape: tuple[int | str, ...], dtype: str | None = None) -> str:
        """Declare an input; dtype is the block's float type unless told."""
        self._inputs.append(TensorSpec(name, dtype or self.float_type, shape))
        return name

    def output(
        self, name: str, value: str, shape: tuple[int | str, ...], dtype: str | None = None
    ) -> None:
        """Give a value its public name."""
        self._nodes.append(
            helper.make_node("Identity", [value], [name], name=f"/{self.name}/{name}")
        )
        self._outputs.append(TensorSpec(name, dtype or self.float_type, shape))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node of the default domain and return its first output."""
        return self.split_op(kind, 1, *inputs, **attributes)[0]

    def split_op(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Append a node of several outputs and return them."""
        name = self._unique(kind)
        values = [f"{name}_{i}" if outputs > 1 else name for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, inputs, values, name=name, **attributes))
        return values

    def name_output(self, value: str, name: str) -> str:
        """Rename the last node's output, so that it can be found: {scope}/{name}."""
        assert self._nodes[-1].output[0] == value
        self._nodes[-1].output[0] = self._unique(name)
        return self._nodes[-1].output[0]

    def constant(self, value: npt.ArrayLike | Tensor, name: str = "constant") -> str:
        """Add an initializer; floats become the block's float type, integers and booleans stay."""
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
        if tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, self.float_type))
        return self._initializer(name, DTYPES[str(tensor.dtype).removeprefix("torch.")], tensor)

    def ints(self, *values: int) -> str:
        """Add a one-dimensional int64 constant: a shape, axes, or bounds."""
        return self.constant(np.array(values, np.int64))

    def linear(self, x: str, name: str, linear: nn.Linear) -> str:
        """Apply a linear layer under a name, its weight in the form that `store` gives."""
        return self._affine(x, name, self._store(linear), linear.bias)

    def linears(self, x: str, **linears: nn.Linear) -> list[str]:
        """Apply several linear layers to one input, in one product where their forms allow.

        Faster so in decoder and vision tower on an H100; no difference told on two CPU cores.
        """
        weights = [self._store(linear) for linear in linears.values()]
        biases = [linear.bias for linear in linears.values()]
        joined, all_biased = join_weights(weights), all(bias is not None for bias in biases)
        if joined is None or (not all_biased and any(bias is not None for bias in biases)):
            parts = zip(linears, weights, biases, strict=True)
            return [self._affine(x, *part) for part in parts]
        bias = torch.cat([bias.detach() for bias in biases]) if all_biased else None
        y = self._affine(x, "_".join(linears), joined, bias)
        with self.scope("_".join(linears)):
            sizes = self.ints(*(linear.out_features for linear in linears.values()))
            return self.split_op("Split", len(linears), y, sizes, axis=-1)

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

    def save(self) -> int:
        """Check the graph and write it, whole or not at all; the builder is done then.

        A card's graph over the same weights, where there is one, is written before it.

        Returns:
            Bytes of the weights.
        """
        if self.folder is None or self._data is None:
            return self.weight_bytes
        self._data.close()
        path = self.folder / f"{self.name}.onnx"
        if self._for_card:
            for_card = to_card_graph(self._nodes, self._initializers, self.float_type)
            if for_card != self._nodes:
                self._write(for_card, path.with_name(path.name + FUSED_SUFFIX))
        self._write(self._nodes, path)
        return self.weight_bytes

    def _write(self, nodes: Sequence[onnx.NodeProto], path: Path) -> None:
        inputs, outputs = (
            [helper.make_tensor_value_info(t.name, DTYPES[t.dtype], t.shape) for t in tensors]
            for tensors in (self._inputs, self._outputs)
        )
        graph = helper.make_graph(nodes, self.name, inputs, outputs, initializer=self._initializers)
        domains = sorted({"", *(node.domain for node in nodes)})
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(d, 1 if d else OPSET) for d in domains],
            ir_version=IR_VERSION,
            producer_name="mdf-mllm",
        )
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(unfinished)
        unfinished.replace(path)

    def _affine(self, x: str, name: str, weight: Weight, bias: Tensor | None) -> str:
        """x @ weight.T + bias, under a name."""
        with self.scope(name):
            y = self._matmul(x, weight)
            return y if bias is None else self.op("Add", y, self.constant(bias, "bias"))

    def _matmul(self, x: str, weight: Weight) -> str:
        """x @ weight.T, whatever the weight is stored as."""
        if isinstance(weight, W8A8Weight):
            return self._w8a8_product(x, weight)
        if isinstance(weight, QuantizedWeight):
            x, matrix = self._integer_matrix(x, weight)
        elif isinstance(weight, Float8Weight):
            x, matrix = self._float8_matrix(x, weight)
        else:
            matrix = self.constant(weight.T, "weight")
        return self.op("MatMul", x, matrix)

    def _integer_matrix(self, x: str, weight: QuantizedWeight) -> tuple[str, str]:
        """An INT4 or INT8 initializer and its DequantizeLinear, which runtimes fuse into MatMul."""
        if weight.order is not None:
            x = self.op("Gather", x, self.constant(weight.order, "order"), axis=-1)
        codes = self._initializer("weight", _INTEGERS[weight.bits], weight.codes)
        scales = self.constant(weight.scales, "scales")
        matrix = self.op("DequantizeLinear", codes, scales, axis=0, block_size=weight.block_size)
        return x, matrix

    def _w8a8_product(self, x: str, weight: W8A8Weight) -> str:
        """A product of 8-bit integers, summed in 32 bits, then scaled by column and by row."""
        rows, row_scales = self._round_rows(x)
        codes = self._initializer("weight", TensorProto.INT8, weight.codes)
        sums = self.op("MatMulInteger", rows, codes, self.constant(_ZERO))
        y = self.op("Cast", sums, to=DTYPES[self.float_type])
        y = self.op("Mul", y, self.constant(weight.scales, "scales"))
        return self.name_output(self.op("Mul", y, row_scales), "MatMul")

    def _round_rows(self, x: str) -> tuple[str, str]:
        """x as uint8 around _ZERO, and the scale of each row; once for all products that read x."""
        if x not in self._rounded_rows:
            largest = self.op("ReduceMax", self.op("Abs", x), self.ints(-1))
            scales = self.op("Mul", largest, self.constant(np.float32(1 / W8A8_ROW_LEVELS)))
            scales = self.op("Add", scales, self.constant(np.float32(_LEAST_SCALE)))
            steps = self.op("Div", x, scales)
            rows = self.op(
                "QuantizeLinear", steps, self.constant(np.float32(1)), self.constant(_ZERO)
            )
            self._rounded_rows[x] = rows, scales
        return self._rounded_rows[x]

    def _float8_matrix(self, x: str, weight: Float8Weight) -> tuple[str, str]:
        """Input and weight through FLOAT8E4M3FN, the form that TensorRT compiles to FP8."""
        zero = self._initializer(
            "zero", TensorProto.FLOAT8E4M3FN, torch.zeros((), dtype=torch.float8_e4m3fn)
        )
        scale = self.constant(torch.tensor(weight.input_scale), "input_scale")
        x = self.op("DequantizeLinear", self.op("QuantizeLinear", x, scale, zero), scale)
        codes = self._initializer("weight", TensorProto.FLOAT8E4M3FN, weight.codes)
        scales = self.constant(weight.scales, "scales")
        return x, self.op("DequantizeLinear", codes, scales, axis=1)

    def _initializer(self, name: str, data_type: int, value: Tensor) -> str:
        tensor = TensorProto(name=self._unique(name), data_type=data_type, dims=value.shape)
        size = value.numel() * value.element_size()
        if data_type == TensorProto.INT4:
            size = (value.numel() + 1) // 2
        self.weight_bytes += size
        raw = b""
        # Without its weights a graph can be read, but not run.
        if not value.is_meta and (self._data or size <= INLINE_BYTES):
            raw = _to_bytes(pack_int4(value) if data_type == TensorProto.INT4 else value)
        if 0 < len(raw) <= INLINE_BYTES:
            tensor.raw_data = raw
        elif self._data is None:
            return str(tensor.name)
        else:
            self._data.write(bytes(-self._data.tell() % ALIGNMENT))
            tensor.data_location = TensorProto.EXTERNAL
            entries = {
                "location": f"{self.name}.onnx.data",
                "offset": self._data.tell(),
                "length": size,
            }
            for key, entry in entries.items():
                tensor.external_data.add(key=key, value=str(entry))
            self._data.write(raw)
        self._initializers.append(tensor)
        return str(tensor.name)

    def _unique(self, name: str) -> str:
        path = f"{self._scope}/{name}"
        self._taken[path] = count = self._taken.get(path, -1) + 1
        return f"{path}_{count}" if count else path


def join_weights(weights: Sequence[Weight]) -> Weight | None:
    """Join weights along their output features; None where their forms differ."""
    first = weights[0]
    if isinstance(first, QuantizedWeight):
        quantized = [w for w in weights if isinstance(w, QuantizedWeight) and w.order is None]
        forms = {(w.bits, w.block_size) for w in quantized}
        if len(quantized) < len(weights) or len(forms) > 1:
            return None
        codes, scales = ([getattr(w, part) for w in quantized] for part in ("codes", "scales"))
        return QuantizedWeight(torch.cat(codes, dim=1), torch.cat(scales, dim=1), first.bits)
    if isinstance(first, W8A8Weight):
        w8a8 = [w for w in weights if isinstance(w, W8A8Weight)]
        if len(w8a8) < len(weights):
            return None
        return W8A8Weight(
            torch.cat([w.codes for w in w8a8], dim=1), torch.cat([w.scales for w in w8a8])
        )
    dense = [w for w in weights if isinstance(w, Tensor)]
    return torch.cat(dense) if len(dense) == len(weights) else None


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph that holds its weights, they beside it as external data, the graph last."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would append to it
    unfinished = path.with_suffix(".part")
    onnx.save(
        model,
        unfinished,
        save_as_external_data=True,
        location=data.name,
        size_threshold=INLINE_BYTES,
    )
    onnx.checker.check_model(unfinished)
    unfinished.replace(path)


def _to_bytes(value: Tensor) -> bytes:
    value = value.detach().cpu().contiguous()
    return bytes(value.reshape(-1).view(torch.uint8).numpy().data)

"""An engine and its checkpoint in; how far every constant of its graphs is off, out.

The graphs are built once more; where the builder would write a constant, it reads the engine's. So
nothing of vision, fusion and decoder is overlooked: weights, norms, gates, the instruction's keys
and values, the indices of the label tokens, and the nodes that compute with them. The U-Net's two
graphs come from torch's exporter, which folds and renames; they are float32, and their outputs show
a changed weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_tensor
from torch import Tensor, nn

from mdf_export.blocks import build_block
from mdf_export.blocks.source import BlockSource
from mdf_export.card_graph import to_card_graph
from mdf_export.graph import GraphBuilder, Weight
from mdf_export.quantize import W8A8Weight, w8a8_scales
from mdf_export.recipe import ExportRecipe
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.manifest import FUSED_SUFFIX, Manifest

Float64 = npt.NDArray[np.float64]
WRITTEN_BLOCKS = ("vision", "fusion", "decoder")
_KINDS: dict[int, str] = {
    TensorProto.INT4: "int4",
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
_LEVELS = {"int4": (-8, 7), "int8": (-128, 127), "w8a8": (-64, 64)}
_PARTS = 20  # of the range of steps that gives a gain


@dataclass(frozen=True)
class ConstantDifference:
    """One constant of a graph against what the checkpoint gives.

    Attributes:
        name: in the graph.
        kind: "int4", "int8", "w8a8" or "fp8", a linear's weight, dequantized; "float", rounded to
            the graph's float type as the checkpoint's is; "index", shapes and indices; "missing".
        relative_l2: |found - expected| / |expected|, L2 norms; infinite where shapes differ, and
            for an index that is not the expected one.
        gain: the factor on the weights; of integers, see `_judge_codes`, else |found| / |expected|.
        spread: of integers, root mean square over their groups of slope - 1, the slope that of the
            group's integers on those that its own scale gives for the checkpoint's weights. A scale
            that belongs to another group shows in it. 0 of the others.
    """

    name: str
    kind: str
    relative_l2: float
    gain: float
    spread: float


@dataclass(frozen=True)
class GraphDifference:
    """One graph against the one that the checkpoint gives.

    Attributes:
        constants: each of them, in the order in which the builder writes them.
        nodes: names of those that are missing, surplus, or compute something else; what reads a
            quantized weight, or puts its input into the weight's order, is no difference.
    """

    constants: tuple[ConstantDifference, ...]
    nodes: tuple[str, ...]


@torch.no_grad()
def compare_graphs(
    engine_dir: Path, manifest: Manifest, checkpoint: StreamedCheckpoint
) -> dict[str, GraphDifference]:
    """Hold the graphs that are written node by node against those that the checkpoint gives.

    Returns:
        By block of WRITTEN_BLOCKS.
    """
    recipe = ExportRecipe(manifest.precision, manifest.blocks["vision"].precision, method="rtn")
    found = {}
    for block in WRITTEN_BLOCKS:
        graph = onnx.load(engine_dir / manifest.blocks[block].file, load_external_data=False).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        comparer = _Comparer(block, recipe, _EngineConstants(engine_dir, tensors))
        build_block(block, _ComparingSource(checkpoint, recipe, comparer=comparer), None)
        names = _unlike_nodes(graph.node, comparer.nodes)
        fused = manifest.blocks[block].file + FUSED_SUFFIX
        if fused in manifest.files:
            beside = onnx.load(engine_dir / fused, load_external_data=False).graph
            names += _unlike_nodes(beside.node, comparer.card_nodes)
            if beside.initializer != graph.initializer:
                names.append(fused)
        found[block] = GraphDifference(tuple(comparer.differences), tuple(dict.fromkeys(names)))
    return found


@dataclass(frozen=True)
class _EngineConstants:
    """The constants of one graph, each read when it is asked for."""

    folder: Path
    tensors: dict[str, TensorProto]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def kind(self, name: str) -> str:
        return _KINDS.get(self.tensors[name].data_type, "float")

    def read(self, name: str) -> Float64:
        tensor = TensorProto()
        tensor.CopyFrom(self.tensors[name])
        if tensor.data_location == TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, str(self.folder))
        return onnx.numpy_helper.to_array(tensor).astype(np.float64)


class _Comparer(GraphBuilder):
    """Builds a graph of the checkpoint's own weights; compares constants instead of writing them.

    Attributes:
        differences: from the engine's constants of the same names.
    """

    def __init__(self, name: str, recipe: ExportRecipe, engine: _EngineConstants) -> None:
        def whole(linear: nn.Linear) -> Weight:
            weight = linear.weight.detach()
            if recipe.precision == "w8a8":  # its nodes, around a weight that is not rounded
                return W8A8Weight(weight.T, w8a8_scales(weight))
            return weight

        super().__init__(None, name, recipe.float_type, whole)
        self._engine = engine
        self.differences: list[ConstantDifference] = []

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The graph so far."""
        return self._nodes

    @property
    def card_nodes(self) -> list[onnx.NodeProto]:
        """The graph that stands beside it for a card."""
        return to_card_graph(self._nodes, self._initializers, self.float_type)

    def linears(self, x: str, **linears: nn.Linear) -> list[str]:
        """Apply several linear layers, joined where the engine has joined them."""
        if f"{self._scope}/{'_'.join(linears)}/weight" in self._engine:
            return super().linears(x, **linears)
        return [self.linear(x, name, linear) for name, linear in linears.items()]

    def _initializer(self, name: str, data_type: int, value: Tensor) -> str:
        path = super()._initializer(name, data_type, value)
        if name == "scales":  # of w8a8, which a search may have fitted: judged with its integers
            return path
        self.differences.append(_compare(self._engine, path, value))
        return path


@dataclass(frozen=True)
class _ComparingSource(BlockSource):
    """Hands out one builder, which compares."""

    comparer: GraphBuilder | None = None

    def builder(self, block: str, folder: Path | None) -> GraphBuilder:
        assert self.comparer is not None
        return self.comparer


def _unlike_nodes(found: Iterable[onnx.NodeProto], expected: Iterable[onnx.NodeProto]) -> list[str]:
    """Name the nodes that are not the same in both graphs."""
    ours, theirs = _describe_nodes(found), _describe_nodes(expected)
    return [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]


def _describe_nodes(nodes: Iterable[onnx.NodeProto]) -> dict[str, tuple[Any, ...]]:
    """By name, what each node computes of what, as if no weight were quantized."""
    origin: dict[str, str] = {}
    described = {}
    for node in nodes:
        if node.op_type in _QUANTIZING or any(x.endswith("/order") for x in node.input):
            origin |= {made: origin.get(node.input[0], node.input[0]) for made in node.output}
            continue
        attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
        read = tuple(origin.get(name, name) for name in node.input)
        described[node.name] = (node.op_type, read, tuple(node.output), tuple(attributes))
    return described


def _compare(engine: _EngineConstants, name: str, value: Tensor) -> ConstantDifference:
    expected: Float64 = value.cpu().double().numpy()
    if name not in engine:
        return _unlike(name, "missing")
    kind = engine.kind(name) if value.is_floating_point() else "index"
    found, spread = engine.read(name), 0.0
    if found.shape != expected.shape:
        return _unlike(name, kind)
    if kind == "index":
        same = bool((found == expected).all())
        return ConstantDifference(name, kind, 0.0 if same else np.inf, 1.0, 0.0)
    gain = None
    if kind != "float":
        scope = name.rsplit("/", 1)[0]
        scales = engine.read(f"{scope}/scales")
        if kind == "int8" and scales.ndim == 1:
            kind, scales = "w8a8", scales[None]
        if f"{scope}/order" in engine:
            expected = expected[engine.read(f"{scope}/order").astype(np.int64)]
        if kind in _LEVELS:
            gain, spread = _judge_codes(found, expected, scales, *_LEVELS[kind])
            scales = scales.repeat(len(found) // len(scales), axis=0)
        found *= scales
    size = max(float(np.linalg.norm(expected)), 1e-12)
    if gain is None:
        gain = float(np.linalg.norm(found)) / size if expected.any() or found.any() else 1.0
    relative_l2 = float(np.linalg.norm(found - expected)) / size
    return ConstantDifference(name, kind, relative_l2, gain, spread)


def _judge_codes(
    codes: Float64, expected: Float64, scales: Float64, lowest: int, highest: int
) -> tuple[float, float]:
    """Return gain and spread of integers (K, N) with scales (K / block_size, N).

    The gain is the integers' mean over the mean of weight / scale, both over 0.5 to some 0.7 of the
    range in equal parts that count alike. Over whole steps a staircase and the straight line have
    the same mean, however rounding blurs it; so unlike a regression over all weights it is 1 for
    round to nearest and for GPTQ, whose clipping and error feedback bias the norms by 1 %.
    """
    groups = (len(scales), -1, codes.shape[1])
    found = codes.reshape(groups)  # (groups, block_size, N)
    steps = expected.reshape(groups) / scales[:, None]
    due = steps.round().clip(lowest, highest)
    energy = (due * due).sum(axis=1)
    # Where a scale gives nothing but zeros, there is no slope.
    slopes = (found * due).sum(axis=1)[energy > 0] / energy[energy > 0]
    spread = float(np.sqrt(np.mean((slopes - 1) ** 2))) if slopes.size else 0.0

    top = np.floor(0.7 * highest) + 1.5  # 5.5 of 7, 89.5 of 127
    found, steps = found * np.sign(steps), np.abs(steps)
    inside = (steps >= 0.5) & (steps < top)
    part = ((steps[inside] - 0.5) * (_PARTS / (top - 0.5))).astype(np.int64)
    counts = np.bincount(part, minlength=_PARTS)
    sums = (np.bincount(part, x[inside], minlength=_PARTS) for x in (found, steps))
    means = [total[counts > 0] / counts[counts > 0] for total in sums]
    return (float(means[0].sum() / means[1].sum()) if inside.any() else 1.0), spread


def _unlike(name: str, kind: str) -> ConstantDifference:
    return ConstantDifference(name, kind, np.inf, np.inf, np.inf)

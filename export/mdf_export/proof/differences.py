"""A checkpoint, an engine and a few cases in; how far each block and decoder layer is off, out.

Blocks and decoder layers are fed the reference's own tensors, so that each answers for itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from torch import Tensor, nn

from mdf_export.golden import reference_tensors
from mdf_export.parts import STREAM, cross_attention_outputs, layer_outputs
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.engine import Engine
from mdf_sdk.manifest import BLOCKS, Manifest
from mdf_sdk.sessions import Array
from mdf_training.data.cases import Case

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the reference's: in each measure, the worst case.

    Attributes:
        max_abs: largest absolute difference of an element.
        relative_l2: |difference| / |reference|, L2 norms.
        cosine: of the angle between the two.
    """

    max_abs: float
    relative_l2: float
    cosine: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON types; what is not finite becomes None."""
        return {name: x if np.isfinite(x) else None for name, x in asdict(self).items()}


@dataclass(frozen=True)
class LayerDifference:
    """The residual stream behind one decoder layer.

    Attributes:
        stream: the decoder was fed the reference's inputs: the layers' errors add up.
        own: this layer was fed the reference's stream: its own error, that of the instruction's
            keys and values included.
        cross: of a cross-attention layer fed the reference's stream, what its cross-attention gives
            before the gate; None of the others.
    """

    layer: int
    stream: Difference
    own: Difference
    cross: Difference | None


@dataclass(frozen=True)
class ReferenceProbe:
    """What PyTorch computes for a few cases.

    Attributes:
        tensors: inputs and outputs of every block, as `reference_tensors` names them.
        streams: float32 (B, T, D), the residual stream of the fed tokens behind each layer.
        crossed: by layer, float32 (B, T, D), what a cross-attention gives before its gate.
        fed: bool (B, T), False on padding.
    """

    tensors: dict[str, Array]
    streams: list[Float32]
    crossed: dict[int, Float32]
    fed: npt.NDArray[np.bool_]


def probe_reference(checkpoint: StreamedCheckpoint, cases: Sequence[Case]) -> ReferenceProbe:
    """Run the PyTorch model and keep every tensor that blocks and layers are compared on."""
    streams: list[Tensor] = []
    crossed: dict[int, Tensor] = {}

    def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        streams.append(output)

    text: Any = checkpoint.model.backbone.model.language_model
    with ExitStack() as stack:
        for index, layer in enumerate(text.layers):
            stack.callback(layer.register_forward_hook(keep).remove)
            if index in text.cross_attention_layers:

                def keep_crossed(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
                    crossed[index] = output[0]

                stack.callback(layer.cross_attn.register_forward_hook(keep_crossed).remove)
        tensors = reference_tensors(
            checkpoint, [case.image for case in cases], [case.text for case in cases]
        )
    labels = checkpoint.prompt_encoder().label_rows
    fed: npt.NDArray[np.bool_] = tensors["body_mask"].astype(np.bool_)
    fed[:, fed.shape[1] - labels :] = True
    rows = fed.shape[1]  # the instruction's come before

    def to_rows(stream: Tensor) -> Float32:
        found: Float32 = stream[:, -rows:].float().cpu().numpy()
        return found

    return ReferenceProbe(
        tensors,
        [to_rows(stream) for stream in streams],
        {index: to_rows(stream) for index, stream in crossed.items()},
        fed,
    )


def compare_blocks(
    engine: Engine, tensors: Mapping[str, Array]
) -> dict[str, dict[str, Difference]]:
    """Feed each block the reference's inputs: block -> output -> difference.

    Args:
        tensors: inputs and outputs of every block, a row for each case.
    """
    cases = range(len(tensors["scores"]))
    blocks: dict[str, dict[str, Difference]] = {}
    for block in BLOCKS:
        pairs: dict[str, list[tuple[Array, Array]]] = {}
        for i in cases:  # one at a time, as the runtime computes
            one = {name: tensor[i : i + 1] for name, tensor in tensors.items()}
            for name, found in engine.run(block, one).items():
                pairs.setdefault(name, []).append((engine.backend.to_host(found), one[name]))
        blocks[block] = {name: compare_cases(of_output) for name, of_output in pairs.items()}
    return blocks


def compare_layers(
    engine_dir: Path, manifest: Manifest, probe: ReferenceProbe
) -> tuple[LayerDifference, ...]:
    """Take the stream behind every layer out of the decoder's graph: as it flows, and cut open.

    Runs on the CPU, whatever runs the engine.
    """
    spec = manifest.blocks["decoder"]
    feed = {
        tensor.name: np.ascontiguousarray(probe.tensors[tensor.name], tensor.dtype)
        for tensor in spec.inputs
    }
    proto = onnx.load(engine_dir / spec.file, load_external_data=False)
    names = layer_outputs(proto.graph)
    crossings = cross_attention_outputs(proto.graph)
    flowing = _run_streams(proto, names, engine_dir, feed)
    for name, stream in zip(names[:-1], probe.streams, strict=False):
        feed[_cut(proto.graph, name)] = stream.astype(feed[STREAM].dtype)
    cut = _run_streams(proto, [*names, *crossings.values()], engine_dir, feed)
    crossed = dict(zip(crossings, cut[len(names) :], strict=True))
    return tuple(
        LayerDifference(
            i,
            _compare_rows(flowing[i], probe.streams[i], probe.fed),
            _compare_rows(cut[i], probe.streams[i], probe.fed),
            _compare_rows(crossed[i], probe.crossed[i], probe.fed) if i in crossed else None,
        )
        for i in range(len(names))
    )


def key_rows(manifest: Manifest) -> tuple[int | str, ...]:
    """Return how many keys an engine's decoder reads in each cross-attention layer, in order."""
    inputs = manifest.blocks["decoder"].inputs
    return tuple(x.shape[1] for x in inputs if x.name.startswith("cross_key_") and x.shape[1:])


def compare_cases(pairs: Iterable[tuple[Array, Array]]) -> Difference:
    """Compare a tensor with the reference's, case by case: pairs of found and expected."""
    measures = []
    for found, expected in pairs:
        a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        size, difference = max(float(np.linalg.norm(b)), 1e-12), a - b
        cosine = float(a @ b) / (size * max(float(np.linalg.norm(a)), 1e-12))
        relative_l2 = float(np.linalg.norm(difference)) / size
        measures.append((float(np.abs(difference).max()), relative_l2, -cosine))
    worst = np.max(measures, axis=0)  # keeps a NaN
    return Difference(float(worst[0]), float(worst[1]), -float(worst[2]))


def rank(difference: Difference) -> float:
    """Relative L2, for a search of the worst: NaN is worse than all."""
    return difference.relative_l2 if np.isfinite(difference.relative_l2) else np.inf


def _cut(graph: onnx.GraphProto, name: str) -> str:
    """Let what reads a value read a new input of the graph instead; return the input's name."""
    replacement = f"{name}/reference"
    for node in graph.node:
        for i, read in enumerate(node.input):
            if read == name:
                node.input[i] = replacement
    graph.input.append(_like_stream(graph, replacement))
    return replacement


def _run_streams(
    proto: onnx.ModelProto, names: Sequence[str], engine_dir: Path, feed: Mapping[str, Array]
) -> list[Array]:
    """Run a decoder whose graph is changed; its weights stay where they are."""
    import onnxruntime  # type: ignore[import-untyped]  # the SDK has told it what not to collect

    graph = onnx.ModelProto()
    graph.CopyFrom(proto)
    graph.graph.output.extend(_like_stream(proto.graph, name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    folder = str(engine_dir.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    streams: list[Array] = session.run(list(names), dict(feed))
    return streams


def _like_stream(graph: onnx.GraphProto, name: str) -> onnx.ValueInfoProto:
    stream = next(value for value in graph.input if value.name == STREAM)
    return onnx.helper.make_tensor_value_info(name, stream.type.tensor_type.elem_type, None)


def _compare_rows(found: Array, expected: Float32, fed: npt.NDArray[np.bool_]) -> Difference:
    """Compare the fed rows; behind the last layer there are only those that score labels."""
    rows = found.shape[1]
    expected, fed = expected[:, -rows:], fed[:, -rows:]
    return compare_cases(
        (a[mask], b[mask]) for a, b, mask in zip(found, expected, fed, strict=True)
    )

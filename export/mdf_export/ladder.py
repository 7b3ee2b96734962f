"""A checkpoint and the engines made from it in, one report out: what each step loses, and where.

The reference is the checkpoint in PyTorch, float32. Blocks and decoder layers are fed the
reference's own tensors, so that each answers for itself; decisions are end to end.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from torch import Tensor, nn
from tqdm import tqdm

from mdf_export.decisions import (
    Float64,
    Scores,
    bootstrap_mean,
    calibration_error,
    divergences,
    spread,
)
from mdf_export.golden import reference_tensors
from mdf_export.parts import STREAM, layer_outputs
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk import MDFClassifier
from mdf_sdk.engine import Engine
from mdf_sdk.errors import DataError, InputError
from mdf_sdk.manifest import BLOCKS, Manifest
from mdf_sdk.sessions import Array
from mdf_training.checkpoint import checkpoint_digest
from mdf_training.data.cases import DataSet
from mdf_training.data.folder import open_data
from mdf_training.data.pixels import PixelSet, batches, stack_pixels
from mdf_training.evaluation.checkpoint_scorer import CheckpointScorer
from mdf_training.evaluation.evaluate import BATCH_SIZE, Scorer
from mdf_training.evaluation.statistics import Estimate, Proportion, log_probabilities

# Of these the tensors of every block and layer are compared; all cases are scored.
TENSOR_CASES = 8
_FILE_OF_BLOCK = ".onnx"


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
    """

    layer: int
    stream: Difference
    own: Difference


@dataclass(frozen=True)
class Rung:
    """One engine against the reference.

    Attributes:
        engine: its directory.
        manifest: what it is.
        same_checkpoint: whether it says that it was made from the reference.
        weight_bytes: of its graphs' files.
        blocks: block -> output -> difference, each block fed the reference's inputs.
        layers: of the decoder, in order.
        flips: cases whose label is not the reference's.
        flipped: their files.
        divergences: KL(reference || engine) of the calibrated probabilities, by case, in nats.
        kl: their mean.
        calibration_error: where all labels are known.
    """

    engine: Path
    manifest: Manifest
    same_checkpoint: bool
    weight_bytes: int
    blocks: Mapping[str, Mapping[str, Difference]]
    layers: tuple[LayerDifference, ...]
    flips: Proportion
    flipped: tuple[str, ...]
    divergences: Float64
    kl: Estimate
    calibration_error: float | None

    @property
    def worst_block(self) -> str:
        """Where an output is farthest off."""
        return max(self.blocks, key=lambda block: _rank(self.worst_output(block)[1]))

    @property
    def worst_layer(self) -> int:
        """The decoder layer of the largest own error."""
        return max(self.layers, key=lambda layer: _rank(layer.own)).layer

    def worst_output(self, block: str) -> tuple[str, Difference]:
        """Return a block's output of the largest relative difference, with its name."""
        return max(self.blocks[block].items(), key=lambda item: _rank(item[1]))

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "engine": str(self.engine),
            "precision": self.manifest.precision,
            "quantization": asdict(self.manifest.quantization),
            "same_checkpoint": self.same_checkpoint,
            "weight_bytes": self.weight_bytes,
            "flips": self.flips.to_dict(),
            "flipped": list(self.flipped),
            "kl": self.kl.to_dict(),
            "calibration_error": self.calibration_error,
            "worst_block": self.worst_block,
            "worst_layer": self.worst_layer,
            "blocks": {
                block: {name: difference.to_dict() for name, difference in outputs.items()}
                for block, outputs in self.blocks.items()
            },
            "layers": [
                {"layer": x.layer, "stream": x.stream.to_dict(), "own": x.own.to_dict()}
                for x in self.layers
            ],
        }


@dataclass(frozen=True)
class Step:
    """Two int4 engines, one after the other: KL of the first less that of the second, by case."""

    before: Path
    after: Path
    kl_removed: Estimate

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        removed = self.kl_removed.to_dict()
        return {"from": str(self.before), "to": str(self.after), "kl_removed": removed}


@dataclass(frozen=True)
class Ladder:
    """All engines against one reference.

    Attributes:
        checkpoint: SHA-256 of the reference.
        cases: that decided flips, KL and calibration error.
        calibration_error: of the reference, where all labels are known.
    """

    model: str
    checkpoint: str
    cases: int
    calibration_error: float | None
    rungs: tuple[Rung, ...]
    steps: tuple[Step, ...]

    @property
    def tensor_cases(self) -> int:
        """Of how many cases tensors were compared."""
        return min(TENSOR_CASES, self.cases)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "model": self.model,
            "checkpoint": self.checkpoint,
            "cases": self.cases,
            "tensor_cases": self.tensor_cases,
            "calibration_error": self.calibration_error,
            "engines": [rung.to_dict() for rung in self.rungs],
            "steps": [step.to_dict() for step in self.steps],
        }


@dataclass(frozen=True)
class _Reference:
    """What PyTorch computes, once for all engines.

    Attributes:
        truth: int64 (N,), index of each case's label, -1 where the checkpoint has no such label.
        tensors: inputs and outputs of every block, for the first TENSOR_CASES of the cases.
        streams: float32 (B, T, D), the residual stream of the fed tokens behind each layer.
        fed: bool (B, T), False on padding.
    """

    digest: str
    scores: Scores
    log_probabilities: Float64
    truth: npt.NDArray[np.int64]
    patients: tuple[str, ...]
    files: tuple[str, ...]
    tensors: dict[str, Array]
    streams: list[npt.NDArray[np.float32]]
    fed: npt.NDArray[np.bool_]

    def calibration_error(self, log_probabilities: Float64) -> float | None:
        known = bool((self.truth >= 0).all())
        return calibration_error(log_probabilities, self.truth) if known else None


def climb(
    checkpoint_dir: Path, engines: Sequence[Path], data_spec: str, cases: int | None = None
) -> Ladder:
    """Compare engines with the checkpoint that they come from.

    Args:
        checkpoint_dir: the reference.
        engines: in the order of the steps, such as fp32, fp16, int4 rounded, int4 calibrated.
        data_spec: cases that neither training nor calibration saw.
        cases: as many, spread over the data; all when left out.

    Raises:
        CheckpointError, EngineError: a directory cannot be used.
        DataError: the data breaks the format, or an engine is not of this checkpoint's kind.
    """
    if cases is not None and cases < 1:
        raise InputError(f"cases: found {cases}, expected at least 1")
    checkpoint = StreamedCheckpoint.open(checkpoint_dir)
    data = open_data(data_spec)
    pixels, indices = PixelSet(data, checkpoint.config.image, ()), spread(len(data), cases)
    reference = _refer(checkpoint, checkpoint_digest(checkpoint_dir), pixels, indices)
    rungs = [_compare(engine, checkpoint, reference, pixels, indices) for engine in engines]
    steps = [
        Step(
            before.engine,
            after.engine,
            bootstrap_mean(before.divergences - after.divergences, reference.patients),
        )
        for before, after in pairwise(rungs)
        if before.manifest.precision == after.manifest.precision == "int4"
    ]
    own_error = reference.calibration_error(reference.log_probabilities)
    model = checkpoint.config.preset
    return Ladder(model, reference.digest, len(indices), own_error, tuple(rungs), tuple(steps))


def _refer(
    checkpoint: StreamedCheckpoint, digest: str, pixels: PixelSet, indices: Sequence[int]
) -> _Reference:
    scorer = CheckpointScorer(checkpoint.model, checkpoint.prompt_encoder())
    with checkpoint.flowing(), checkpoint.loaded(checkpoint.model.backbone.lm_head):
        scores = _score(scorer, pixels, indices, "reference")
    rows = [pixels.data.rows[i] for i in indices]
    labels = list(checkpoint.config.labels)
    tensors, streams, fed = _reference_streams(checkpoint, pixels.data, indices[:TENSOR_CASES])
    return _Reference(
        digest,
        scores,
        log_probabilities(scores, checkpoint.config.temperature),
        np.array([labels.index(row.label) if row.label in labels else -1 for row in rows]),
        tuple(row.patient_id for row in rows),
        tuple(row.file for row in rows),
        tensors,
        streams,
        fed,
    )


def _reference_streams(
    checkpoint: StreamedCheckpoint, data: DataSet, indices: Sequence[int]
) -> tuple[dict[str, Array], list[npt.NDArray[np.float32]], npt.NDArray[np.bool_]]:
    """Return reference_tensors, the fed rows of the stream behind each layer, and which are fed."""
    streams: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        streams.append(output)

    cases = [data[i] for i in indices]
    with ExitStack() as stack:
        for layer in checkpoint.model.backbone.model.language_model.layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        tensors = reference_tensors(
            checkpoint, [case.image for case in cases], [case.text for case in cases]
        )
    labels = checkpoint.prompt_encoder().label_rows
    fed: npt.NDArray[np.bool_] = tensors["body_mask"].astype(np.bool_)
    fed[:, fed.shape[1] - labels :] = True
    rows = fed.shape[1]  # the instruction's come before
    return tensors, [stream[:, -rows:].float().cpu().numpy() for stream in streams], fed


def _compare(
    engine_dir: Path,
    checkpoint: StreamedCheckpoint,
    reference: _Reference,
    pixels: PixelSet,
    indices: Sequence[int],
) -> Rung:
    with Engine(engine_dir) as engine:
        manifest = engine.manifest
        _check_kind(engine_dir, manifest, checkpoint)
        blocks = {}
        for block in BLOCKS:
            outputs = engine.run(block, reference.tensors)
            blocks[block] = {
                name: compare_cases(
                    zip(engine.backend.to_host(found), reference.tensors[name], strict=True)
                )
                for name, found in outputs.items()
            }
    layers = _compare_layers(engine_dir, manifest, reference)
    with MDFClassifier(engine_dir) as classifier:
        scores = _score(classifier, pixels, indices, str(engine_dir))
    found = log_probabilities(scores, manifest.temperature)
    flipped = scores.argmax(axis=1) != reference.scores.argmax(axis=1)
    by_case = divergences(reference.log_probabilities, found)
    sizes = {name: entry.bytes for name, entry in manifest.files.items() if _FILE_OF_BLOCK in name}
    return Rung(
        engine_dir,
        manifest,
        manifest.checkpoint == reference.digest,
        sum(sizes.values()),
        blocks,
        layers,
        Proportion(int(flipped.sum()), len(flipped)),
        tuple(file for file, flip in zip(reference.files, flipped, strict=True) if flip),
        by_case,
        bootstrap_mean(by_case, reference.patients),
        reference.calibration_error(found),
    )


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


def _compare_layers(
    engine_dir: Path, manifest: Manifest, reference: _Reference
) -> tuple[LayerDifference, ...]:
    """Take the stream behind every layer out of the decoder's graph: as it flows, and cut open."""
    spec = manifest.blocks["decoder"]
    feed = {
        tensor.name: np.ascontiguousarray(reference.tensors[tensor.name], tensor.dtype)
        for tensor in spec.inputs
    }
    proto = onnx.load(engine_dir / spec.file, load_external_data=False)
    names = layer_outputs(proto.graph)
    found = []
    for cut in (False, True):
        if cut:
            for name, stream in zip(names[:-1], reference.streams, strict=False):
                feed[_cut(proto.graph, name)] = stream.astype(feed[STREAM].dtype)
        found.append(_run_streams(proto, names, engine_dir, feed))
    return tuple(
        LayerDifference(i, *(_compare_stream(run[i], reference, i) for run in found))
        for i in range(len(names))
    )


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


def _compare_stream(found: Array, reference: _Reference, layer: int) -> Difference:
    """Compare the fed rows; behind the last layer there are only those that score labels."""
    rows = found.shape[1]
    expected, fed = reference.streams[layer][:, -rows:], reference.fed[:, -rows:]
    return compare_cases(
        (a[mask], b[mask]) for a, b, mask in zip(found, expected, fed, strict=True)
    )


def _score(
    scorer: Scorer | MDFClassifier, pixels: PixelSet, indices: Sequence[int], name: str
) -> Scores:
    portions = list(batches(indices, BATCH_SIZE))
    scores = []
    for portion in tqdm(portions, desc=name, unit="batch", leave=False, disable=None):
        cases = pixels.read(portion)
        scores.append(scorer.score(*stack_pixels(cases), [case.row.text for case in cases]))
    return np.concatenate(scores)


def _check_kind(engine_dir: Path, manifest: Manifest, checkpoint: StreamedCheckpoint) -> None:
    config = checkpoint.config
    found = (manifest.labels, manifest.image, manifest.prompt)
    if found != (config.labels, config.image, config.prompt):
        raise DataError(
            f"{engine_dir}: found other labels, another picture size or another prompt than the "
            "checkpoint's, expected an engine that was exported from it: mdf export CHECKPOINT "
            "ENGINE"
        )


def _rank(difference: Difference) -> float:
    """Relative L2, for a search of the worst: NaN is worse than all."""
    return difference.relative_l2 if np.isfinite(difference.relative_l2) else np.inf

"""A checkpoint and the engines made from it in, one report out: what each step loses, and where.

The reference is the checkpoint in PyTorch, float32. Blocks and decoder layers are fed the
reference's own tensors, so that each answers for itself; decisions are end to end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mdf_export.proof.differences import (
    Difference,
    LayerDifference,
    ReferenceProbe,
    compare_blocks,
    compare_layers,
    key_rows,
    probe_reference,
    rank,
)
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk import MDFClassifier
from mdf_sdk.engine import Engine
from mdf_sdk.errors import DataError, InputError
from mdf_sdk.manifest import Manifest
from mdf_training.checkpoint import checkpoint_digest
from mdf_training.data.cases import spread
from mdf_training.data.folder import open_data
from mdf_training.data.pixels import PixelSet, batches, stack_pixels
from mdf_training.evaluation.checkpoint_scorer import CheckpointScorer
from mdf_training.evaluation.evaluate import BATCH_SIZE, Scorer, Scores
from mdf_training.evaluation.statistics import (
    Estimate,
    Float64,
    Proportion,
    estimate_mean,
    expected_calibration_error,
    kl_divergences,
    log_probabilities,
)

# Of these the tensors of every block and layer are compared; all cases are scored.
TENSOR_CASES = 8
_FILE_OF_BLOCK = ".onnx"


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
        return max(self.blocks, key=lambda block: rank(self.worst_output(block)[1]))

    @property
    def worst_layer(self) -> int:
        """The decoder layer of the largest own error."""
        return max(self.layers, key=lambda layer: rank(layer.own)).layer

    def worst_output(self, block: str) -> tuple[str, Difference]:
        """Return a block's output of the largest relative difference, with its name."""
        return max(self.blocks[block].items(), key=lambda item: rank(item[1]))

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
        probe: the tensors of the first TENSOR_CASES of the cases.
    """

    digest: str
    scores: Scores
    log_probabilities: Float64
    truth: npt.NDArray[np.int64]
    patients: tuple[str, ...]
    files: tuple[str, ...]
    probe: ReferenceProbe

    def calibration_error(self, log_probabilities: Float64) -> float | None:
        known = bool((self.truth >= 0).all())
        return expected_calibration_error(np.exp(log_probabilities), self.truth) if known else None


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
            estimate_mean(before.divergences - after.divergences, reference.patients),
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
    return _Reference(
        digest,
        scores,
        log_probabilities(scores, checkpoint.config.temperature),
        np.array([labels.index(row.label) if row.label in labels else -1 for row in rows]),
        tuple(row.patient_id for row in rows),
        tuple(row.file for row in rows),
        probe_reference(checkpoint, [pixels.data[i] for i in indices[:TENSOR_CASES]]),
    )


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
        blocks = compare_blocks(engine, reference.probe.tensors)
    layers = compare_layers(engine_dir, manifest, reference.probe)
    with MDFClassifier(engine_dir) as classifier:
        scores = _score(classifier, pixels, indices, str(engine_dir))
    found = log_probabilities(scores, manifest.temperature)
    flipped = scores.argmax(axis=1) != reference.scores.argmax(axis=1)
    by_case = kl_divergences(reference.log_probabilities, found)
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
        estimate_mean(by_case, reference.patients),
        reference.calibration_error(found),
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
    found = (manifest.labels, manifest.image, manifest.prompt, key_rows(manifest))
    rows = tuple(config.state_rows().values())
    if found != (config.labels, config.image, config.prompt, rows):
        raise DataError(
            f"{engine_dir}: found other labels, another picture size, another prompt or another "
            "fusion than the checkpoint's, expected an engine that was exported from it: mdf "
            "export CHECKPOINT ENGINE"
        )

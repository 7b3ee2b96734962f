"""A reference and an engine in; every check from photograph to decision, and one verdict, out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mdf_benchmarks.parity.blocks import check_blocks, check_golden
from mdf_benchmarks.parity.certificate import FORMAT_NAME, FORMAT_VERSION
from mdf_benchmarks.parity.checks import CHECKS, Check, Fault, tolerances
from mdf_benchmarks.parity.controls import Float32, score_controls
from mdf_benchmarks.parity.decisions import (
    Thresholds,
    check_decisions,
    check_scores,
    check_sensitivity,
)
from mdf_benchmarks.parity.inputs import (
    check_preprocessing,
    compare_pixels,
    engine_pixels,
)
from mdf_benchmarks.parity.reference import Reference, open_cases, run_reference
from mdf_export.proof.differences import key_rows
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk import MDFClassifier
from mdf_sdk.engine import Engine
from mdf_sdk.errors import BackendRunError, DataError
from mdf_sdk.machine import machine_card
from mdf_sdk.manifest import Manifest, load_manifest
from mdf_training.config import ModelConfig
from mdf_training.data.pixels import batches
from mdf_training.evaluation.evaluate import BATCH_SIZE

PACKAGES = ("mdf-mllm", "torch", "transformers", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Parity:
    """An engine against its reference.

    Attributes:
        manifest: the engine's; `manifest_sha256` names it and every file of the engine.
        backend, device, card: what ran it.
        data_sha256: of the cases, their photographs included.
        thresholds: declared beforehand.
        checks: in the order of CHECKS.
        machine, date: of the measurement.
    """

    reference: Reference
    manifest: Manifest
    manifest_sha256: str
    backend: str
    device: str
    card: str
    data_sha256: str
    thresholds: Thresholds
    checks: tuple[Check, ...]
    machine: Mapping[str, Any]
    date: str

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def first_fault(self) -> tuple[str, Fault] | None:
        """The check that fails first, and what it found first."""
        return next(((check.name, check.faults[0]) for check in self.checks if check.faults), None)

    def check(self, name: str) -> Check:
        """Return one check by its name."""
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The certificate's content, not sealed yet; docs/parity-certificate.schema.json has it."""
        fault, decisions = self.first_fault, self.check("decisions").results
        manifest = self.manifest
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "verdict": "pass" if self.ok else "fail",
            "first_fault": None if fault is None else {"check": fault[0], **asdict(fault[1])},
            "agreement": decisions.get("agreement"),
            "flips": decisions.get("flips"),
            "engine": {
                "manifest_sha256": self.manifest_sha256,
                "model": manifest.model,
                "precision": manifest.precision,
                "labels": list(manifest.labels),
                "made_from": manifest.checkpoint,
                "notice": manifest.notice,
                "backend": self.backend,
                "device": self.device,
                "card": self.card,
            },
            "reference": {
                "sha256": self.reference.sha256,
                "device": self.reference.device,
                "made_the_engine": manifest.checkpoint == self.reference.sha256,
                "files": self.reference.files,
            },
            "data": {
                "name": self.reference.data_name,
                "cases": len(self.reference.data),
                "patients": len(set(self.reference.patients)),
                "sha256": self.data_sha256,
            },
            "thresholds": {
                "margin": self.thresholds.margin,
                "confidence": self.thresholds.confidence,
                "tolerances": tolerances(),
            },
            "checks": [check.to_dict() for check in self.checks],
            "machine": dict(self.machine),
            "date": self.date,
        }


def prove_parity(
    engine_dir: Path,
    checkpoint_dir: Path,
    data_name: str,
    thresholds: Thresholds,
    *,
    cases: int | None = None,
    split: Path | None = None,
    part: str | None = None,
    device: str = "auto",
) -> Parity:
    """Run the reference, then hold an engine against it; what cannot be is told before either runs.

    Args:
        data_name, cases, split, part: as `open_cases` takes them.
        device: of the engine.

    Raises:
        CheckpointError, EngineError, BackendError: a directory cannot be used, or not here.
        DataError: as `open_cases` and `compare_engine`.
    """
    config = StreamedCheckpoint.open(checkpoint_dir).config
    check_same_model(engine_dir, load_manifest(engine_dir), config)
    data = open_cases(data_name, config.labels, cases=cases, split=split, part=part)
    thresholds.check_cases(len(data))
    reference = run_reference(checkpoint_dir, data, data_name)
    return compare_engine(reference, engine_dir, thresholds, device)


def compare_engine(
    reference: Reference, engine_dir: Path, thresholds: Thresholds, device: str = "auto"
) -> Parity:
    """Hold an engine against the reference, block by block and case by case.

    Raises:
        DataError: engine and reference are of different models, or the cases are too few for the
            margin.
        EngineError, BackendError: the engine cannot be used here.
    """
    thresholds.check_cases(len(reference.data))
    with Engine(engine_dir, device=device) as engine:
        manifest, digest = engine.manifest, engine.manifest_sha256
        check_same_model(engine_dir, manifest, reference.checkpoint.config)
        pixels = compare_pixels(reference, manifest.image)
        checks = [
            check_preprocessing(reference, engine_dir, engine, pixels),
            *check_blocks(engine, engine_dir, reference),
            check_golden(engine_dir, reference),
        ]
        backend = engine.backend
    checks += _check_end_to_end(reference, engine_dir, manifest, thresholds, device)
    return Parity(
        reference,
        manifest,
        digest,
        backend.name,
        backend.device,
        backend.card,
        pixels.data_sha256,
        thresholds,
        tuple(sorted(checks, key=lambda check: CHECKS.index(check.name))),
        machine_card(PACKAGES),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def check_same_model(engine_dir: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Refuse an engine that no fault could have made of this checkpoint.

    Raises:
        DataError: another preset, other labels, masks or sizes; names the first.
    """
    pairs = {
        "model": (manifest.model, config.preset),
        "labels": (manifest.labels, config.labels),
        "mask kinds": (manifest.mask_kinds, config.mask_kinds),
        "picture sizes": (
            (manifest.image.tower_px, manifest.image.unet_px),
            (config.image.tower_px, config.image.unet_px),
        ),
        "rows of cross-attention keys": (key_rows(manifest), tuple(config.state_rows().values())),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise DataError(
                f"{engine_dir}: found the {name} {_words(found)}, expected {_words(expected)} as "
                "the reference has. The two are different models. Export the reference: mdf "
                "export CHECKPOINT ENGINE"
            )


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_end_to_end(
    reference: Reference, engine_dir: Path, manifest: Manifest, thresholds: Thresholds, device: str
) -> list[Check]:
    """Sensitivity, scores and decisions, through the runtime as a clinic uses it."""

    def read(indices: Sequence[int]) -> tuple[Float32, Float32]:
        return engine_pixels(reference, manifest.image, indices)

    rows, temperature = reference.data.rows, manifest.temperature
    try:
        with MDFClassifier(engine_dir, device=device) as classifier:
            scores = [
                classifier.score(*read(batch), [rows[i].text for i in batch])
                for batch in batches(range(len(rows)), BATCH_SIZE)
            ]
            controls = score_controls(
                classifier.score, manifest.image, read, rows, reference.control_indices
            )
    except BackendRunError as error:  # NaN: a block's check has named where it begins
        fault = Fault("engine", f"no scores ({str(error)[:200]})", "one for every label")
        return [Check(name, (fault,)) for name in ("sensitivity", "scores", "decisions")]
    whole = np.concatenate(scores)
    return [
        check_sensitivity(reference, whole, controls, temperature),
        check_scores(reference, whole, temperature),
        check_decisions(reference, whole, thresholds),
    ]

"""A checkpoint and a data set in; all that PyTorch says of them, once for any number of engines."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdf_benchmarks.parity.controls import CONTROL_CASES, Float32, score_controls
from mdf_export.golden import GOLDEN_CASES, reference_tensors
from mdf_export.proof.decoder_run import WEIGHTS_SHARE, weight_memory
from mdf_export.proof.differences import ReferenceProbe, probe_reference
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.errors import CheckpointError, InputError
from mdf_sdk.integrity import digest
from mdf_sdk.sessions import Array
from mdf_training.checkpoint import checkpoint_digest
from mdf_training.data.cases import DataSet, Subset, spread
from mdf_training.data.folder import open_data
from mdf_training.data.pixels import PixelSet, stack_pixels
from mdf_training.evaluation.checkpoint_scorer import CheckpointScorer
from mdf_training.evaluation.evaluate import Scores, check_labels, score_cases
from mdf_training.evaluation.statistics import Int64

TENSOR_CASES = 8  # of these the tensors of every block and layer are compared


@dataclass(frozen=True, eq=False)
class Reference:
    """The checkpoint in PyTorch, float32, on some cases.

    Attributes:
        checkpoint: its weights on disk.
        device: what PyTorch ran on: the card, or "cpu".
        sha256: `checkpoint_digest`, its identity.
        files: SHA-256 of each of its files that make the model.
        data: the cases; `data_name` is what was asked for.
        pixels: as training prepares them.
        truth: int64 (N,), index of each case's label.
        scores: float32 (N, K).
        control_indices: of the cases that were also scored with something withheld.
        controls: their scores, by name.
        probe: the tensors of the first cases.
        golden: for each golden case, the tensors of every block.
    """

    checkpoint: StreamedCheckpoint
    device: str
    sha256: str
    files: dict[str, str]
    data: DataSet
    data_name: str
    pixels: PixelSet
    truth: Int64
    scores: Scores
    control_indices: list[int]
    controls: dict[str, Scores]
    probe: ReferenceProbe
    golden: list[dict[str, Array]]

    @property
    def patients(self) -> list[str]:
        return [row.patient_id for row in self.data.rows]


def run_reference(checkpoint_dir: Path, data: DataSet, data_name: str) -> Reference:
    """Score every case, on a card where there is one, and keep the tensors of a few.

    Args:
        checkpoint_dir: as `mdf train` writes it.
        data: cases that neither training nor calibration saw; see `open_cases`.
        data_name: what they are called in the certificate.

    Raises:
        CheckpointError: the checkpoint cannot be used, or gives no finite scores.
        DataError: labels that are not the model's, or a picture that cannot be read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = StreamedCheckpoint.open(checkpoint_dir, device)
    check_labels(data, checkpoint.config.labels)
    pixels = PixelSet(data, checkpoint.config.image, ())
    probed = [data[i] for i in range(min(TENSOR_CASES, len(data)))]
    probe = probe_reference(checkpoint, probed)
    golden = [
        reference_tensors(checkpoint, [case.image], [case.text])
        for case in (GOLDEN_CASES[i] for i in range(len(GOLDEN_CASES)))
    ]

    def read(indices: Sequence[int]) -> tuple[Float32, Float32]:
        return stack_pixels(pixels.read(indices))

    control_indices = spread(len(data), CONTROL_CASES)
    scorer = CheckpointScorer(checkpoint.model, checkpoint.prompt_encoder())
    with _ready(checkpoint):
        scores = score_cases(scorer, data)
        controls = score_controls(scorer.score, scorer.image, read, data.rows, control_indices)
    if not all(np.isfinite(found).all() for found in (scores, *controls.values())):
        raise CheckpointError(
            f"{checkpoint_dir}: found NaN or infinity in the reference's scores, expected finite "
            "ones. Go back to an earlier checkpoint, or train again: mdf train"
        )
    labels = checkpoint.config.labels
    return Reference(
        checkpoint,
        torch.cuda.get_device_name() if device == "cuda" else device,
        checkpoint_digest(checkpoint_dir),
        {
            path.name: digest(path).sha256
            for path in sorted(checkpoint_dir.iterdir())
            if path.name in ("config.json", "tokenizer.json") or path.match("model*.safetensors")
        },
        data,
        data_name,
        pixels,
        np.array([labels.index(row.label) for row in data.rows], np.int64),
        scores,
        control_indices,
        controls,
        probe,
        golden,
    )


def open_cases(
    name: str,
    labels: Sequence[str],
    *,
    cases: int | None = None,
    split: Path | None = None,
    part: str | None = None,
) -> DataSet:
    """Open a folder with labels.csv, or synthetic:COUNT:SEED.

    Args:
        labels: those that may occur.
        cases: as many, spread over the data; all when left out.
        split, part: read one part of the data alone, as `open_data` takes them.

    Raises:
        DataError: the data breaks the format, is empty, or has other labels.
    """
    if cases is not None and cases < 1:
        raise InputError(f"cases: found {cases}, expected at least 1")
    chosen: dict[str, Any] = {"split": split, "part": part or "test"} if split else {}
    data = open_data(name, labels, **chosen)
    return data if cases is None else Subset(data, spread(len(data), cases))


@contextmanager
def _ready(checkpoint: StreamedCheckpoint) -> Iterator[None]:
    """Hold the weights in memory where they fit, else let them flow; no convolution in TF32."""
    needed, memory = weight_memory(checkpoint)
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    if needed <= WEIGHTS_SHARE * memory:
        with exact, checkpoint.loaded(checkpoint.model):
            yield
    else:
        head = checkpoint.model.backbone.lm_head
        with exact, checkpoint.flowing(), checkpoint.loaded(head):
            yield
    if checkpoint.device.type == "cuda":
        torch.cuda.empty_cache()  # the engine needs the card next

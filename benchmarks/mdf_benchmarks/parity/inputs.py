"""The reference's and the engine's way from photograph and text to tensors, held side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

import numpy as np

from mdf_benchmarks.parity.checks import Check, Fault
from mdf_benchmarks.parity.controls import Float32
from mdf_benchmarks.parity.reference import Reference
from mdf_sdk.engine import Engine
from mdf_sdk.manifest import EMBEDDINGS_NAME, ImageSpec
from mdf_sdk.preprocessing import to_pixels
from mdf_sdk.prompt import PromptEncoder

_ROWS = 8192  # of the embeddings that are compared at a time


@dataclass(frozen=True)
class PixelReport:
    """Every case's pixels by the engine's way less those by training's.

    Attributes:
        data_sha256: over rows and decoded photographs, in their order: the cases' identity.
        tower_max_abs, unet_max_abs: the largest difference; 0.0 is bit for bit the same.
        worst: file of the case with the largest one.
    """

    data_sha256: str
    tower_max_abs: float
    unet_max_abs: float
    worst: str


def engine_pixels(
    reference: Reference, spec: ImageSpec, indices: Sequence[int]
) -> tuple[Float32, Float32]:
    """Prepare cases as the runtime does, by an engine's own manifest."""
    pixels = [to_pixels(reference.data[i].image, spec) for i in indices]
    tower, unet = (np.stack(each) for each in zip(*pixels, strict=True))
    return tower, unet


def compare_pixels(reference: Reference, spec: ImageSpec) -> PixelReport:
    """Compare all cases."""
    total, worst, tower_off, unet_off = sha256(), "", 0.0, 0.0
    for i, row in enumerate(reference.data.rows):
        image = reference.data[i].image
        about = (row.file, row.label, row.text, row.patient_id, row.source, image.shape)
        total.update(repr(about).encode() + np.ascontiguousarray(image).data)
        trained = reference.pixels[i]
        tower, unet = (
            float(np.abs(ours - theirs).max())
            for ours, theirs in zip(
                to_pixels(image, spec), (trained.tower_pixels, trained.unet_pixels), strict=True
            )
        )
        if max(tower, unet) > max(tower_off, unet_off):
            worst = row.file
        tower_off, unet_off = max(tower_off, tower), max(unet_off, unet)
    return PixelReport(total.hexdigest(), tower_off, unet_off, worst)


def check_preprocessing(
    reference: Reference, engine_dir: Path, engine: Engine, pixels: PixelReport
) -> Check:
    """Pixels, tokens and embeddings: bit for bit the reference's, or a fault."""
    image, due = engine.manifest.image, reference.checkpoint.config.image
    unequal = [f.name for f in fields(image) if getattr(image, f.name) != getattr(due, f.name)]
    faults = []
    for name, value in (("tower", pixels.tower_max_abs), ("unet", pixels.unet_max_abs)):
        if value != 0:
            why = [field for field in unequal if field.startswith(name)]
            by = f" ({' and '.join(why)} differ)" if why else ""
            found = f"{value:.3g} at most off, as of {pixels.worst}{by}"
            faults.append(Fault(f"{name} pixels", found, "0"))
    faults += _token_faults(reference, engine.prompt)
    off = _embedding_difference(reference, engine_dir)
    if off != 0:
        faults.append(Fault(EMBEDDINGS_NAME, f"{off:.3g} at most off", "the checkpoint's rows"))
    results = {
        "tower_max_abs": pixels.tower_max_abs,
        "unet_max_abs": pixels.unet_max_abs,
        "worst_case": pixels.worst,
        "texts": len(reference.data),
        "embeddings_max_abs": off if np.isfinite(off) else None,
    }
    return Check("preprocessing", tuple(faults), results)


def _token_faults(reference: Reference, prompt: PromptEncoder) -> Iterator[Fault]:
    ours, theirs = prompt, reference.checkpoint.prompt_encoder()
    pairs: list[tuple[str, Sequence[int], Sequence[int]]] = [
        ("instruction", ours.prefix_ids, theirs.prefix_ids),
        ("question", ours.suffix_ids, theirs.suffix_ids),
        ("image token", [ours.image_id], [theirs.image_id]),
    ]
    pairs += [
        (f"label {label}", a, b)
        for label, a, b in zip(theirs.labels, ours.label_ids, theirs.label_ids, strict=True)
    ]
    for row in reference.data.rows:
        pairs.append(
            (f"text of {row.file}", ours.encode(row.text).ids, theirs.encode(row.text).ids)
        )
    for name, found, expected in pairs:
        if tuple(found) != tuple(expected):
            yield Fault(f"tokens, {name}", _short(found), _short(expected))


def _embedding_difference(reference: Reference, engine_dir: Path) -> float:
    """Return the largest difference of a row from the checkpoint's, rounded as the engine's are."""
    embeddings = np.load(engine_dir / EMBEDDINGS_NAME, mmap_mode="r", allow_pickle=False)
    checkpoint = reference.checkpoint
    table = checkpoint.model.backbone.model.language_model.embed_tokens
    expected = checkpoint.read(table, "weight").cpu().numpy()
    if embeddings.shape != expected.shape:
        return float("inf")
    largest = 0.0
    for start in range(0, len(expected), _ROWS):
        rows = slice(start, start + _ROWS)
        due = expected[rows].astype(embeddings.dtype).astype(np.float32)
        off = float(np.abs(embeddings[rows].astype(np.float32) - due).max())
        largest = float(np.maximum(largest, off))  # keeps a NaN
    return largest


def _short(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:8]))
    return f"[{shown}{', ...' if len(ids) > 8 else ''}]"

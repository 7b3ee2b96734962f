"""A data set in, what is wrong and what is worth knowing of it out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdf_sdk.errors import DataError
from mdf_training.data.cases import Case, DataSet, Row
from mdf_training.data.duplicates import Hash, find_duplicates, hash_picture
from mdf_training.data.folder import read_cases
from mdf_training.data.leaks import find_leaks
from mdf_training.data.splits import UNUSED


@dataclass(frozen=True)
class Facts:
    """What is kept of a case that was read.

    Attributes:
        size: width and height of the picture, in pixels.
        mask_areas: kind -> share of the picture that is inside.
    """

    size: tuple[int, int]
    mask_areas: dict[str, float]
    hash: Hash


def inspect_data(
    data: DataSet, labels: Sequence[str], parts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Read every picture and mask, and look for what a study would trip over.

    Args:
        labels: the label set, for the leak check.
        parts: the part of every case, to look for near duplicates that a split tears apart.

    Returns:
        JSON types. `errors` says what must be mended before a study: broken pictures and masks,
        near duplicates in two parts or with two labels, texts that give the label away.
        `warnings` says what may be right. The rest: `n`, `patients`, `labels` by source, `parts` by
        label, `sizes`, `masks` by kind, `broken`, `duplicates` and `leaks`.
    """
    results = list(read_cases(data, _examine))
    readable = {i: r for i, r in enumerate(results) if isinstance(r, Facts)}
    broken = [
        {"file": data.rows[i].file, "reason": str(r)}
        for i, r in enumerate(results)
        if isinstance(r, DataError)
    ]
    places = list(readable)
    hashes = [facts.hash for facts in readable.values()]
    pairs = [(places[a], places[b]) for a, b in find_duplicates(hashes)]
    duplicates = [_describe_pair(data.rows, pair, parts) for pair in pairs]
    leaks = find_leaks(data.rows, labels)
    return {
        "n": len(data),
        "patients": len({row.patient_id for row in data.rows}),
        "labels": _count((row.label, row.source) for row in data.rows),
        "parts": _count(zip(parts, (row.label for row in data.rows), strict=True)) if parts else {},
        "sizes": _sizes([facts.size for facts in readable.values()]),
        "masks": _masks([facts.mask_areas for facts in readable.values()]),
        "broken": broken,
        "duplicates": duplicates,
        "leaks": leaks.to_dict(),
        "errors": [
            *(entry["reason"] for entry in broken),
            *(
                f"{problem}: {' and '.join(d['files'])}"
                for d in duplicates
                for problem in d["errors"]
            ),
            *leaks.errors,
        ],
        "warnings": [
            *(
                f"the same photograph of two patients: {' and '.join(d['files'])}"
                for d in duplicates
                if not d["same_patient"]
            ),
            *leaks.warnings,
        ],
    }


def duplicate_pairs(data: DataSet) -> list[tuple[int, int]]:
    """Return the index pairs of near duplicates; a case that cannot be read has none."""
    hashes = list(read_cases(data, lambda case: hash_picture(case.image)))
    places = [i for i, result in enumerate(hashes) if not isinstance(result, DataError)]
    found = find_duplicates([h for h in hashes if not isinstance(h, DataError)])
    return [(places[a], places[b]) for a, b in found]


def _examine(case: Case) -> Facts:
    height, width = case.image.shape[:2]
    areas = {kind: float(mask.mean()) for kind, mask in case.masks.items()}
    return Facts((width, height), areas, hash_picture(case.image))


def _describe_pair(
    rows: Sequence[Row], pair: tuple[int, int], parts: Sequence[str] | None
) -> dict[str, Any]:
    one, other = (rows[i] for i in pair)
    errors = []
    if one.label != other.label:
        errors.append(f"the same photograph with the labels {one.label} and {other.label}")
    if parts and len(torn := {parts[i] for i in pair} - {UNUSED}) > 1:
        errors.append(f"the same photograph in the parts {' and '.join(sorted(torn))}")
    return {
        "files": [one.file, other.file],
        "same_patient": one.patient_id == other.patient_id,
        "errors": errors,
    }


def _count(pairs: Any) -> dict[str, dict[str, int]]:
    """Count pairs: first -> second -> count."""
    table: dict[str, dict[str, int]] = {}
    for (first, second), count in sorted(Counter(pairs).items()):
        table.setdefault(first, {})[second] = count
    return table


def _sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, int]:
    counts = Counter(f"{width} x {height}" for width, height in sizes)
    return dict(counts.most_common())


def _masks(areas: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Kind -> number of cases annotated, of those how many are empty, and the mean area."""
    by_kind: dict[str, list[float]] = {}
    for case in areas:
        for kind, area in case.items():
            by_kind.setdefault(kind, []).append(area)
    return {
        kind: {
            "annotated": len(found),
            "empty": found.count(0.0),
            "mean_area": float(np.mean(found)),
        }
        for kind, found in sorted(by_kind.items())
    }

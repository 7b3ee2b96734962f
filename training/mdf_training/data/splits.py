"""A data set in, the part of every case out: by patient, stratified, saved as a CSV file."""

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdf_sdk.errors import DataError, InputError
from mdf_training.data.cases import DataSet, Row
from mdf_training.data.tables import read_table

COLUMNS = ("file", "part")
# What `mdf train` learns from, watches, and never reads.
TRAIN, VALIDATION, TEST = "train", "validation", "test"
UNUSED = "unused"  # of a patient whose other pictures are tested; any part may hold the patient
MAX_SHOWN = 10


def make_split(
    rows: Sequence[Row], shares: Mapping[str, float], seed: int, pairs: Iterable[tuple[int, int]]
) -> list[str]:
    """Draw a part for every row.

    What belongs together stays together: a patient's pictures, and those that `pairs` joins. Each
    label keeps its share in every part, and as far as that leaves a choice each source too. A
    label with as many patients as there are parts, or more, is in every part.

    Args:
        shares: part -> share of the cases; they add up to 1.
        pairs: indices of rows that must not part, such as near duplicates.
    """
    check_shares(shares)
    if seed < 0:
        raise InputError(f"seed: found {seed}, expected 0 or more. Example: --seed 1")
    units = join_rows(rows, pairs)
    sizes = np.bincount(units)
    frequency = Counter(row.label for row in rows)
    # A unit counts for its rarest label, which can least spare it.
    strata: dict[int, tuple[str, str]] = {}
    for unit, row in zip(units.tolist(), rows, strict=True):
        best = strata.get(unit)
        if best is None or (frequency[row.label], row.label) < (frequency[best[0]], best[0]):
            strata[unit] = (row.label, row.source)
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for unit in sorted(rng.permutation(len(sizes)).tolist(), key=strata.__getitem__):
        by_label.setdefault(strata[unit][0], []).append(unit)

    names = sorted(shares, key=lambda name: -shares[name])
    part_of: dict[int, str] = {}
    for members in by_label.values():
        seen, got = 0, dict.fromkeys(names, 0)
        for rank, unit in enumerate(members):
            seen += int(sizes[unit])
            empty = [name for name in names if not got[name]]
            # The last ones go where the label is still missing.
            last = len(members) >= len(names) and len(members) - rank <= len(empty)
            owed = {name: shares[name] * seen - got[name] for name in names}
            part = max(empty if last else names, key=owed.__getitem__)
            part_of[unit] = part
            got[part] += int(sizes[unit])
    return [part_of[unit] for unit in units.tolist()]


def leave_sources_out(
    rows: Sequence[Row],
    sources: Collection[str],
    shares: Mapping[str, float],
    seed: int,
    pairs: Iterable[tuple[int, int]],
) -> list[str]:
    """Test on whole sources, and draw the other parts from the rest.

    Pictures of the rest that belong to a patient of those sources, or that `pairs` joins with
    one of their pictures, are UNUSED.

    Args:
        shares: part -> share of the rest; TEST is not among them.

    Raises:
        InputError: a source that no row has, or all of them.
    """
    known = {row.source for row in rows}
    if TEST in shares:
        raise InputError(
            f"parts: found {TEST}, expected the parts of the rest: {TEST} is the source"
        )
    if not sources or not set(sources) < known:
        cure = (
            f"Example: --leave-source-out '{min(known)}'"
            if len(known) > 1
            else "Where there is one source, split by patient: leave --leave-source-out away"
        )
        raise InputError(
            f"sources: found {', '.join(sources) or 'none'}, expected some but not all of"
            f" {', '.join(sorted(known))}. {cure}"
        )
    pairs = list(pairs)
    units = join_rows(rows, pairs)
    tested = np.array([row.source in sources for row in rows])
    touched = np.isin(units, units[tested])
    parts = np.where(tested, TEST, UNUSED).tolist()
    rest = np.flatnonzero(~touched).tolist()
    if not rest:
        raise InputError(
            f"sources: every patient also has pictures of {', '.join(sources)}, expected others"
        )
    place = {index: new for new, index in enumerate(rest)}
    inside = [(place[a], place[b]) for a, b in pairs if a in place and b in place]
    drawn = make_split([rows[i] for i in rest], shares, seed, inside)
    for index, part in zip(rest, drawn, strict=True):
        parts[index] = part
    return parts


def split_by_patient(data: DataSet, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split so that no patient is on both sides and every label keeps about its share.

    Args:
        fraction: share of the patients of every label that is held out, between 0 and 1. A label
            with two patients or more always has one on either side.

    Returns:
        The sorted indices to train on, and those held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"found fraction {fraction}, expected a number between 0 and 1")
    labels_of: dict[str, set[str]] = {}
    for row in data.rows:
        labels_of.setdefault(row.patient_id, set()).add(row.label)
    strata: dict[tuple[str, ...], list[str]] = {}
    for patient, labels in sorted(labels_of.items()):
        strata.setdefault(tuple(sorted(labels)), []).append(patient)

    rng = np.random.default_rng(seed)
    held_out: set[str] = set()
    for _, patients in sorted(strata.items()):
        order = rng.permutation(len(patients))
        count = max(round(fraction * len(patients)), 1)
        held_out |= {patients[i] for i in order[: min(count, len(patients) - 1)]}
    held = [i for i, row in enumerate(data.rows) if row.patient_id in held_out]
    train = [i for i, row in enumerate(data.rows) if row.patient_id not in held_out]
    return train, held


def join_rows(rows: Sequence[Row], pairs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """Number what belongs together: rows of one patient, and rows that `pairs` joins.

    Returns:
        int64 (N,), the number of each row's unit, from 0 in the order of the rows.
    """
    parent = list(range(len(rows)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[str, int] = {}
    same_patient = ((i, first.setdefault(row.patient_id, i)) for i, row in enumerate(rows))
    for a, b in (*same_patient, *pairs):
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    roots = [find(i) for i in range(len(rows))]
    return np.unique(roots, return_inverse=True)[1]


def save_split(path: str | os.PathLike[str], rows: Sequence[Row], parts: Sequence[str]) -> None:
    """Write `file,part` for every row.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    path = Path(path)
    try:
        with path.open("x", encoding="utf-8", newline="") as stream:
            table = [(row.file, part) for row, part in zip(rows, parts, strict=True)]
            csv.writer(stream).writerows([COLUMNS, *table])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected the name of a new file") from error


def read_split(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read file -> part.

    Raises:
        DataError: the file breaks the format.
    """
    path = Path(path)
    parts: dict[str, str] = {}
    for number, cells in read_table(path, COLUMNS, exact=True):
        where = f"{path}, row {number}"
        if not all(cells.values()):
            raise DataError(f"{where}: found an empty cell, expected a file and its part")
        if parts.setdefault(cells["file"], cells["part"]) != cells["part"]:
            raise DataError(f"{where}: {cells['file']!r} is already in part {parts[cells['file']]}")
    return parts


def describe_split(path: str | os.PathLike[str]) -> dict[str, str]:
    """Name a split for the provenance: its file's name and digest."""
    path = Path(path)
    return {"name": path.name, "sha256": sha256(path.read_bytes()).hexdigest()}


def load_split(path: str | os.PathLike[str], rows: Sequence[Row]) -> list[str]:
    """Read a split file and check it against the data set.

    Returns:
        The part of every row.

    Raises:
        DataError: a file of the data is not in the split or the other way round, or a patient is
            in two parts.
    """
    parts = read_split(path)
    files = {row.file for row in rows}
    for problem, found in (
        ("are in no part", [row.file for row in rows if row.file not in parts]),
        ("are not in the data", [file for file in parts if file not in files]),
    ):
        if found:
            raise DataError(
                f"{path}: {len(found)} files {problem}: {_shown(found)}; expected every picture of"
                " the data once. Make the split of this data: mdf split DATA --out split.csv"
            )
    of_patient: dict[str, set[str]] = {}
    for row in rows:
        if parts[row.file] != UNUSED:
            of_patient.setdefault(row.patient_id, set()).add(parts[row.file])
    torn = [
        f"{patient} ({', '.join(sorted(found))})"
        for patient, found in of_patient.items()
        if len(found) > 1
    ]
    if torn:
        raise DataError(
            f"{path}: {len(torn)} patients are in two parts: {_shown(torn)}; expected each in one."
            " mdf split keeps a patient together"
        )
    return [parts[row.file] for row in rows]


def check_shares(shares: Mapping[str, float]) -> None:
    """Raise InputError unless the shares are positive and add up to 1; NaN is neither."""
    positive = shares and all(share > 0 for share in shares.values())
    if not positive or not abs(sum(shares.values()) - 1) <= 1e-9:
        found = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        raise InputError(
            f"parts: found {found}, expected positive shares that add up to 1. "
            "Example: --parts train=0.6,validation=0.1,test=0.3"
        )


def _shown(found: Sequence[str]) -> str:
    more = f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
    return ", ".join(found[:MAX_SHOWN]) + more

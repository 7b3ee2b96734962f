"""Label scores of a data set's cases <-> a CSV file, so that a pairing needs no second run."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mdf_sdk.errors import DataError
from mdf_training.data.cases import DataSet

Scores = npt.NDArray[np.float32]
ABOUT = ("file", "source", "patient_id", "truth")
SCORE = "score_"


def save_predictions(
    path: str | os.PathLike[str], labels: Sequence[str], data: DataSet, scores: Scores
) -> None:
    """Write a row for each case: file, source, patient_id, truth, and `score_LABEL` for each label.

    Args:
        scores: float32 (N, K), in the order of the cases and of `labels`.
    """
    with Path(path).open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow([*ABOUT, *(SCORE + label for label in labels)])
        for row, case in zip(data.rows, scores, strict=True):
            # Nine digits tell any two float32 apart.
            figures = [f"{score:.9g}" for score in case]
            table.writerow([row.file, row.source, row.patient_id, row.label, *figures])


def read_predictions(path: str | os.PathLike[str], labels: Sequence[str], data: DataSet) -> Scores:
    """Read what `save_predictions` wrote: float32 (N, K), in the order of `labels` and `data`.

    Raises:
        DataError: no such table, or it is of other labels or other cases.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            table = {row["file"]: row for row in csv.DictReader(stream)}
            columns = next(iter(table.values()), {})
            found = [name.removeprefix(SCORE) for name in columns if name.startswith(SCORE)]
            if sorted(found) != sorted(labels):
                raise ValueError(f"scores of {', '.join(found) or 'no label'}")
            other = [r.file for r in data.rows if table.get(r.file, {}).get("truth") != r.label]
            if other or len(table) != len(data):
                named = f", such as {other[0]}" if other else ""
                raise ValueError(f"{len(table)} cases, {len(other)} of the data not there{named}")
            return np.array(
                [[float(table[r.file][SCORE + label]) for label in labels] for r in data.rows],
                np.float32,
            )
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{path}: found {error}, expected scores of {', '.join(labels)} for these "
            f"{len(data)} cases. Make them: mdf evaluate MODEL DATA --predictions {path}"
        ) from None

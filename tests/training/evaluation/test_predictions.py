"""evaluation.predictions: label scores to a table and back."""

from pathlib import Path

import numpy as np
import pytest

from mdf_sdk.errors import DataError
from mdf_training.data.synthetic import SyntheticData
from mdf_training.evaluation.predictions import read_predictions, save_predictions

LABELS = ("Acquired", "Inherited")
DATA = SyntheticData(20, 1)
SCORES = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)


def test_scores_come_back_to_the_last_digit(tmp_path: Path) -> None:
    save_predictions(tmp_path / "scores.csv", LABELS, DATA, SCORES)
    assert np.array_equal(read_predictions(tmp_path / "scores.csv", LABELS, DATA), SCORES)


def test_scores_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    save_predictions(tmp_path / "scores.csv", LABELS, DATA, SCORES)
    data = SyntheticData(20, 1)
    data.rows = tuple(reversed(data.rows))
    back = read_predictions(tmp_path / "scores.csv", LABELS[::-1], data)
    assert np.array_equal(back, SCORES[::-1, ::-1])


def test_the_table_names_case_and_truth(tmp_path: Path) -> None:
    save_predictions(tmp_path / "scores.csv", LABELS, DATA, SCORES)
    header, first, *_ = (tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()
    assert header == "file,source,patient_id,truth,score_Acquired,score_Inherited"
    row = DATA.rows[0]
    assert first.startswith(f"{row.file},{row.source},{row.patient_id},{row.label},")


@pytest.mark.parametrize(
    ("data", "labels", "found"),
    [
        (SyntheticData(20, 1), ("Acquired", "Healthy"), "scores of Acquired, Inherited"),
        (SyntheticData(10, 1), LABELS, "20 cases, 0 of the data not there"),
        (SyntheticData(21, 1), LABELS, "20 cases, 1 of the data not there, such as"),
    ],
)
def test_scores_of_other_cases_or_labels_are_refused(
    tmp_path: Path, data: SyntheticData, labels: tuple[str, ...], found: str
) -> None:
    save_predictions(tmp_path / "scores.csv", LABELS, DATA, SCORES)
    with pytest.raises(DataError, match=f"found {found}"):
        read_predictions(tmp_path / "scores.csv", labels, data)


@pytest.mark.parametrize(
    "content", ["", "file\n", "file,truth,score_Acquired,score_Inherited\nx\n"]
)
def test_what_is_no_such_table_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "scores.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="mdf evaluate MODEL DATA --predictions"):
        read_predictions(tmp_path / "scores.csv", LABELS, DATA)

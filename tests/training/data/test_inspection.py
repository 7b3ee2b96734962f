"""data.inspection: what a study would trip over is named before it starts."""

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mdf_training.data.folder import COLUMNS, open_data, save_data
from mdf_training.data.inspection import duplicate_pairs, inspect_data
from mdf_training.data.synthetic import LABELS, SyntheticData


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six cases; case 5's picture is case 0's, stored again."""
    save_data(SyntheticData(6, seed=8), tmp_path / "data")
    images = tmp_path / "data" / "images"
    Image.open(images / "00000.png").resize((400, 400)).save(images / "00005.png")
    edit(tmp_path / "data", 5, mask="")
    return tmp_path / "data"


def edit(folder: Path, row: int, **cells: str) -> None:
    """Change cells of labels.csv."""
    with (folder / "labels.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    table[row].update(cells)
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(table)


def inspect(folder: Path, parts: list[str] | None = None) -> dict[str, Any]:
    return inspect_data(open_data(folder), LABELS, parts)


def test_a_report_counts_labels_by_source_sizes_and_masks(folder: Path) -> None:
    report = inspect(folder)
    rows = open_data(folder).rows
    assert (report["n"], report["patients"]) == (6, 6)
    for label, counts in report["labels"].items():
        assert counts == {"synthetic": sum(row.label == label for row in rows)}
    width, height = SyntheticData(6, seed=8)[0].image.shape[:2]
    assert report["sizes"] == {f"{width} x {height}": 5, "400 x 400": 1}
    assert report["masks"]["vessel"]["annotated"] == 5
    assert 0 < report["masks"]["vessel"]["mean_area"] < 0.5


def test_broken_pictures_and_masks_of_another_size_are_errors_by_row(folder: Path) -> None:
    (folder / "images" / "00001.png").write_bytes(b"no picture")
    Image.new("1", (10, 10)).save(folder / "masks" / "00002-disc.png")
    report = inspect(folder)
    assert [entry["file"] for entry in report["broken"]] == ["images/00001.png", "images/00002.png"]
    assert "row 3, column file" in report["errors"][0]
    assert "row 4, column mask" in report["errors"][1]
    assert "10 x 10 px" in report["errors"][1]


def test_the_same_photograph_of_two_patients_is_a_warning(folder: Path) -> None:
    edit(folder, 5, label=open_data(folder).rows[0].label)
    report = inspect(folder)
    files = ["images/00000.png", "images/00005.png"]
    assert [(d["files"], d["same_patient"]) for d in report["duplicates"]] == [(files, False)]
    assert report["errors"] == []
    assert f"the same photograph of two patients: {' and '.join(files)}" in report["warnings"]


def test_the_same_photograph_with_two_labels_is_an_error(folder: Path) -> None:
    other = next(label for label in LABELS if label != open_data(folder).rows[0].label)
    edit(folder, 5, label=other)
    assert "the same photograph with the labels" in inspect(folder)["errors"][0]


@pytest.mark.parametrize(("part", "count"), [("test", 1), ("train", 0), ("unused", 0)])
def test_the_same_photograph_in_two_parts_is_an_error(folder: Path, part: str, count: int) -> None:
    edit(folder, 5, label=open_data(folder).rows[0].label)
    errors = inspect(folder, ["train"] * 5 + [part])["errors"]
    assert len(errors) == count
    assert all("the same photograph in the parts test and train" in error for error in errors)


def test_a_text_that_names_its_label_is_an_error(folder: Path) -> None:
    edit(folder, 3, text=f"An {open_data(folder).rows[3].label} disease.")
    assert any("in images/00003.png" in error for error in inspect(folder)["errors"])


def test_pairs_are_numbered_as_the_cases_beside_broken_ones(folder: Path) -> None:
    (folder / "images" / "00002.png").write_bytes(b"no picture")
    assert duplicate_pairs(open_data(folder)) == [(0, 5)]

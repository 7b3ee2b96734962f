"""mdf import-data, check-data and split, and mdf train on what they made."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mdf_sdk.cli import main
from mdf_training.data.folder import open_data, save_data
from mdf_training.data.synthetic import SyntheticData
from mdf_training.recipes import Recipe
from mdf_training.trainer import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_data(SyntheticData(40, seed=8), tmp_path / "data")
    return tmp_path / "data"


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_a_data_set_is_imported_checked_and_split(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, split = tmp_path / "imported", tmp_path / "split.csv"
    table = str(folder / "labels.csv")
    columns = "image=file,diagnosis=label,text=text,patient_id=patient_id,source=source,mask=mask"
    own = tmp_path / "map.csv"
    own.write_text("disease,label\nAcquired,Acquired\nInherited,Inherited\n")
    words = ["import-data", "table", table, str(out), "--columns", columns]
    assert main([*words, "--diseases", str(own), "--json"]) == 0
    assert document(capsys)["cases"] == 40
    assert main(["split", str(out), "--out", str(split), "--seed", "3", "--json"]) == 0
    parts = {part: sum(counts.values()) for part, counts in document(capsys)["parts"].items()}
    assert parts == {"train": 24, "validation": 4, "test": 12}
    assert main(["check-data", str(out), "--split", str(split), "--json"]) == 0
    report = document(capsys)
    assert (report["n"], report["errors"]) == (40, [])
    assert {part: sum(counts.values()) for part, counts in report["parts"].items()} == parts


def test_check_data_says_no_where_something_must_be_mended(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("1", (10, 10)).save(folder / "masks" / "00002-disc.png")
    assert main(["check-data", str(folder)]) == 1
    assert "error: " in capsys.readouterr().out


def test_check_data_names_labels_outside_the_set(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-data", str(folder), "--labels", "Acquired"]) == 2
    assert "column label: found 'Inherited', expected one of Acquired" in capsys.readouterr().err


def test_a_source_can_be_left_out(tmp_path: Path, folder: Path) -> None:
    table = folder / "labels.csv"
    lines = table.read_text().splitlines()
    lines[1:11] = [line.removesuffix("synthetic") + "clinic" for line in lines[1:11]]
    table.write_text("\n".join(lines))
    split = tmp_path / "split.csv"
    assert main(["split", str(folder), "--out", str(split), "--leave-source-out", "clinic"]) == 0
    tested = open_data(folder, split=split, part="test")
    assert {row.source for row in tested.rows} == {"clinic"}
    assert len(tested) == 10


@pytest.mark.parametrize(
    "words",
    [
        ["split", "synthetic:4:1", "--out", "x.csv", "--parts", "train=a"],
        ["split", "synthetic:4:1", "--out", "x.csv", "--parts", "train"],
        ["import-data", "table", "a.csv", "b", "--columns", "image"],
    ],
)
def test_a_malformed_option_is_a_usage_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"usage: mdf {words[0]}")


def test_training_on_a_split_reads_no_other_case_and_counts_what_it_skips(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = tmp_path / "split.csv"
    assert main(["split", str(folder), "--out", str(split)]) == 0
    lines = split.read_text().splitlines()
    by_part: dict[str, list[str]] = {}
    for line in lines[1:]:
        file, part = line.split(",")
        by_part.setdefault(part, []).append(file)
    for file in (*by_part["test"], by_part["train"][0]):
        (folder / file).write_bytes(b"no picture")
    recipe = Recipe(epochs=1, batch_size=16)
    words = ["train", "--preset", "nano", "--data", str(folder), "--split", str(split)]
    assert main([*words, "--out", str(tmp_path / "refused"), "--epochs", "1"]) == 2
    assert "1 of 28 cases cannot be read" in capsys.readouterr().err
    provenance = train(
        "nano", folder, tmp_path / "out", recipe=recipe, split=split, skip_broken=True
    )
    assert list(provenance["skipped"]) == by_part["train"][:1]
    assert provenance["training_cases"] == len(by_part["train"]) - 1
    assert provenance["validation_cases"] == len(by_part["validation"])
    assert provenance["split"]["name"] == "split.csv"
    assert provenance["leaks"]["words"] == []


def test_training_on_texts_that_name_the_label_is_refused_unless_allowed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = folder / "labels.csv"
    with table.open(newline="") as stream:
        rows = list(csv.reader(stream))
    next(row for row in rows if row[1] == "Inherited")[2] = "An inherited disease."
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    words = ["train", "--preset", "nano", "--data", str(folder), "--epochs", "1"]
    assert main([*words, "--out", str(tmp_path / "refused")]) == 2
    assert "'inherited' of label Inherited is in 1 texts" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert main([*words, "--out", str(tmp_path / "out"), "--allow-label-words", "--json"]) == 0
    assert Counter(word["word"] for word in document(capsys)["leaks"]["words"]) == {"inherited": 1}

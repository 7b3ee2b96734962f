"""The numbered scripts run as they stand, from anywhere, without arguments."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("[0-9]*.py"))
SAYS = {
    "01_predict.py": "vision tower 0.0 ms",
    "02_train_and_export.py": "verified: True",
    "03_score_a_folder.py": "24 cases",
}
LEAVES = {
    "01_predict.py": "prediction.png",
    "02_train_and_export.py": "engine/manifest.json",
    "03_score_a_folder.py": "predictions.csv",
}


def test_every_example_is_known_and_short() -> None:
    assert [path.name for path in EXAMPLES] == list(SAYS)
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 40


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_written(path: Path, tmp_path: Path) -> None:
    # What it writes goes with the test; two torch threads on a shared core wait for each other.
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[path.name] in done.stdout
    assert "Not for clinical use." in done.stdout or path.name.startswith("03")
    assert len(list(tmp_path.glob(f"*/{LEAVES[path.name]}"))) == 1


def test_a_scored_folder_has_a_row_for_every_case(tmp_path: Path) -> None:
    from mdf_training.data.folder import save_data
    from mdf_training.data.synthetic import SyntheticData

    save_data(SyntheticData(10, 8), tmp_path / "data")
    out = tmp_path / "out.csv"
    subprocess.run([sys.executable, EXAMPLES[2], tmp_path / "data", out], check=True)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"images/{i:05d}.png" for i in range(10)]
    assert sum(row["label"] == row["predicted"] for row in rows) >= 8
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)

"""evaluation.model_card: what config, provenance and reports know, as Markdown."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdf_sdk.cli import main
from mdf_sdk.errors import CheckpointError, DataError
from mdf_training.checkpoint import checkpoint_digest
from mdf_training.data.folder import open_data
from mdf_training.evaluation.evaluate import compare_decisions, evaluate, open_scorer
from mdf_training.evaluation.model_card import build_card, read_report
from mdf_training.recipes import Recipe
from mdf_training.trainer import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was trained, for an epoch."""
    out = tmp_path_factory.mktemp("cards") / "clinic-nano"
    train("nano", "synthetic:40:1", out, recipe=Recipe(epochs=1, batch_size=20))
    return out


@pytest.fixture(scope="module")
def report(checkpoint: Path) -> dict[str, Any]:
    """What `mdf evaluate CHECKPOINT DATA --reference CHECKPOINT --json` prints last."""
    scorer = open_scorer(checkpoint)
    data = open_data("synthetic:24:2", scorer.labels)
    found = evaluate(scorer, data) | compare_decisions(scorer, scorer, data)
    result: dict[str, Any] = json.loads(
        json.dumps({"model": "/data/clinic-nano", "data": "synthetic:24:2", **found})
    )
    return result


@pytest.fixture
def report_file(report: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(f"24 cases   a table for people\n{json.dumps(report)}\n", encoding="utf-8")
    return path


def edited(checkpoint: Path, folder: Path, **provenance: Any) -> Path:
    """A copy with other provenance; None takes a field out."""
    copy = Path(shutil.copytree(checkpoint, folder / "copy"))
    path = copy / "provenance.json"
    values = json.loads(path.read_text()) | provenance
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return copy


def test_the_card_says_what_the_model_is_and_that_it_is_not_for_clinical_use(
    checkpoint: Path, report_file: Path
) -> None:
    card = build_card(checkpoint, [report_file])
    assert card.startswith("# Model card: clinic-nano\n\n> **Not for clinical use.**\n")
    assert "Acquired, Inherited" in card
    assert checkpoint_digest(checkpoint) in card
    assert "synthetic:40:1" in card
    assert "| batch_size | `20` |" in card
    assert "random weights" in card
    assert "Llama 3.2" not in card
    assert "$" not in card


def test_every_figure_of_the_report_stands_in_the_card_with_its_interval(
    checkpoint: Path, report: dict[str, Any], report_file: Path
) -> None:
    card = build_card(checkpoint, [report_file])
    groups = [report["per_class"], report["per_source"], report["controls"]]
    for figure in [report["accuracy"], *(p for group in groups for p in group.values())]:
        low, high = figure["interval_95"]
        shown = f"| {figure['value']:.3f} | {low:.3f} to {high:.3f} | {figure['correct']} of "
        assert shown in card
    for dice in report["dice"].values():
        assert f"| {dice['value']:.3f} |" in card
    assert f"{report['balanced_accuracy']:.3f}" in card
    assert f"{report['calibration']['brier_score']:.3f}" in card
    assert f"{report['swap_margin_shift']:.2f}" in card
    assert "accuracy beyond the reference" in card


def test_two_reports_stand_below_each_other(checkpoint: Path, report_file: Path) -> None:
    card = build_card(checkpoint, [report_file, report_file])
    assert card.count("### `clinic-nano` on `synthetic:24:2`, 24 cases") == 2


def test_a_card_without_reports_says_that_nothing_is_known(checkpoint: Path) -> None:
    assert "nothing is known of how well it does" in build_card(checkpoint)


def test_no_folder_of_the_machine_reaches_the_card(
    checkpoint: Path, report_file: Path, tmp_path: Path
) -> None:
    copy = edited(checkpoint, tmp_path, data="/srv/hospital/photographs")
    card = build_card(copy, [report_file])
    assert "photographs" in card
    assert "/srv" not in card
    assert "/data" not in card


def test_a_model_made_from_llama_says_so(checkpoint: Path, tmp_path: Path) -> None:
    backbone = {"directory": "Llama-x", "config_sha256": "ab" * 32, "index_sha256": "cd" * 32}
    card = build_card(edited(checkpoint, tmp_path, backbone=backbone))
    assert "**Built with Llama.**" in card
    assert "Llama 3.2 is licensed under the Llama 3.2 Community License" in card
    assert "`Llama-x`" in card


def test_the_publisher_fills_in_the_licenses(checkpoint: Path, tmp_path: Path) -> None:
    assert "Licenses: **to be filled" in build_card(checkpoint)
    copy = edited(checkpoint, tmp_path, data_licenses="FIVES, CC BY 4.0.")
    assert "Licenses: FIVES, CC BY 4.0." in build_card(copy)


def test_what_a_provenance_lacks_is_not_made_up(tiny_checkpoint: Path) -> None:
    """The tiny checkpoint's has a notice and an empty history alone."""
    card = build_card(tiny_checkpoint)
    assert card.count("not recorded") >= 5
    assert "names no epoch" in card


def test_a_sources_name_does_not_break_the_table(
    checkpoint: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    sources = {"Camera | A\nB": next(iter(report["per_source"].values()))}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report | {"per_source": sources}))
    assert "| from Camera \\| A B |" in build_card(checkpoint, [path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("controls"), r"missing controls; expected what this release prints"),
        (lambda r: r.update(auc=0.9), r"unknown auc; expected what this release prints"),
        (lambda r: r.clear(), r"missing accuracy, missing balanced_accuracy"),
    ],
)
def test_a_report_of_other_fields_is_refused(
    report: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    changed = dict(report)
    change(changed)
    (tmp_path / "report.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=message):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_class": {"glaucoma": {}}}, "found glaucoma, expected .*the report is another model"),
        ({"dice": {"cup": {"n": 0}}}, "found cup, expected .*the report is another model"),
        ({"accuracy": "high"}, "a field that is damaged"),
        ({"accuracy": {"value": "high", "interval_95": [0, 1]}}, "a field that is damaged"),
        ({"controls": None}, "a field that is damaged"),
        ({"model": 3}, "a field that is damaged"),
        ({"dice": []}, "a field that is damaged"),
    ],
)
def test_a_report_of_another_model_or_a_damaged_one_is_refused(
    checkpoint: Path, report: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report | change))
    with pytest.raises(DataError, match=rf"report\.json.*{message}.*mdf evaluate CHECKPOINT DATA"):
        build_card(checkpoint, [tmp_path / "report.json"])


@pytest.mark.parametrize("content", [b"", b"a table alone", b"[1]", b"\xff", b"[" * 100_000])
def test_what_is_no_report_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(DataError, match=r"mdf evaluate CHECKPOINT DATA --json > report\.json"):
        read_report(tmp_path / "report.json")


def test_a_missing_report_and_a_missing_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        read_report(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        build_card(tmp_path)


def test_the_command_writes_a_new_file_and_never_one_that_was_filled_in(
    checkpoint: Path, report_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["card", str(checkpoint), "--report", str(report_file), "--out"]
    assert main([*words, str(tmp_path / "CARD.md"), "--json"]) == 0
    card = (tmp_path / "CARD.md").read_text(encoding="utf-8")
    assert card == build_card(checkpoint, [report_file])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["card"] == card
    assert main([*words, str(tmp_path / "CARD.md")]) == 2
    assert "expected a new file" in capsys.readouterr().err


def test_the_command_says_when_the_file_cannot_be_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(checkpoint), "--out", str(tmp_path / "none" / "CARD.md")]) == 2
    assert "No such file" in capsys.readouterr().err

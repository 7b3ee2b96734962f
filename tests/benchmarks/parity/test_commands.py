"""`mdf parity`: the whole road by its command, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mdf_benchmarks.parity.text import format_parity
from mdf_sdk.cli import main
from mdf_sdk.manifest import BLOCKS
from mdf_training.data.synthetic import SyntheticData

from ..pages import Page  # noqa: TID252 - tests are no installed package
from .conftest import DATA, Planter, make_keys


@pytest.fixture
def words(tiny_engine: Path, tiny_checkpoint: Path) -> list[str]:
    given = ["--reference", str(tiny_checkpoint), "--data", DATA, "--margin", "0.4"]
    return ["parity", str(tiny_engine), *given]


def test_the_command_measures_certifies_and_signs(
    words: list[str], tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = make_keys(tmp_path)
    out, page = tmp_path / "cert.json", tmp_path / "report.html"
    files = ["--out", str(out), "--html", str(page), "--key", str(private)]
    assert main([*words, *files, "--json"]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document == json.loads(out.read_text(encoding="utf-8"))
    assert document["verdict"] == "pass"
    assert document["agreement"]["value"] == 1.0
    assert document["flips"] == []
    assert printed.startswith(f"{format_parity(document)}\n")
    assert "0 in 16 cases, which bounds their rate at 0.1707 (rule of three: 3 / 16" in printed
    check = ["parity", "--check", str(out), str(tiny_engine), "--public-key", str(public)]
    assert main(check) == 0

    html = page.read_text(encoding="utf-8")
    parsed = Page(html)
    parsed.check_whole()
    assert parsed.tags["img"] == 10
    assert parsed.tags["svg"] == 2
    assert "PASS" in html
    for word in (*BLOCKS, document["sha256"], document["engine"]["manifest_sha256"]):
        assert word in html


def test_a_fault_is_in_the_exit_code_the_text_and_the_page(
    words: list[str],
    int4_engine: Path,
    planter: Planter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One fusion block's weights times 1.02: its outputs stay within int4's tolerance."""
    faulty = planter.change_constants(
        int4_engine,
        "fusion",
        lambda name: name.startswith("/fusion/fusion.2/") and name.endswith("scales"),
        lambda scales: scales * scales.dtype.type(1.02),
    )
    words[1] = str(faulty)
    assert main([*words, "--html", str(tmp_path / "report.html"), "--json"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("FAIL  nano int4")
    assert "first at fault: fusion, /fusion/fusion.2/q_proj/weight" in printed
    fault = json.loads(printed.splitlines()[-1])["first_fault"]
    assert fault["check"] == "fusion"
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "/fusion/fusion.2/q_proj/weight" in page.words


def test_too_few_cases_say_how_many_are_needed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words[:-2], "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["type"] == "DataError"
    assert "found 16 cases, expected at least 149" in error["message"]


@pytest.mark.parametrize(
    ("changed", "type_", "message"),
    [
        (["--margin", "0"], "InputError", "margin: found 0"),
        (["--margin", "nan"], "InputError", "margin: found nan"),
        (["--confidence", "0.5"], "InputError", "confidence: found 0.5"),
        (["--cases", "0"], "InputError", "cases: found 0"),
        (["--part", "test"], "InputError", "found no --split"),
        (["--public-key", "x.pem"], "InputError", "found it without --check"),
        (["--check", "cert.json"], "InputError", "--reference: found it beside --check"),
        (["--data", "synthetic:0:1"], "DataError", "found 0 cases, expected at least 1"),
        (["--reference", "nowhere"], "CheckpointError", "expected a checkpoint directory"),
        (["--key", "nowhere.pem"], "InputError", "could not be read"),
        (["--out", "nowhere/cert.json"], "StorageError", "found no folder nowhere"),
        (["--html", "nowhere/report.html"], "StorageError", "found no folder nowhere"),
    ],
)
def test_unusable_words_are_typed_errors_before_anything_is_measured(
    changed: list[str],
    type_: str,
    message: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, *changed, "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["type"] == type_
    assert message in error["message"]


def test_reference_and_data_must_be_named(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", str(tiny_engine)]) == 2
    assert "--reference: found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row"),
        (["a.png,,A 50-year-old man.,,1,x"], "column label: empty"),
        (["a.png,Glaucoma,A 50-year-old man.,,1,x"], "found 'Glaucoma'"),
    ],
)
def test_empty_and_unlabelled_data_are_refused(
    rows: list[str],
    message: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(SyntheticData(1, 9)[0].image).save(tmp_path / "a.png")
    table = ["file,label,text,mask,patient_id,source", *rows]
    (tmp_path / "labels.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    assert main([*words, "--data", str(tmp_path), "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["type"] == "DataError"
    assert message in error["message"]


def test_an_engine_of_other_labels_is_refused_as_another_model(
    words: list[str], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["labels"] = ["Inherited", "Acquired"]
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main([*words, "--reference", str(other), "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["type"] == "DataError"
    assert "The two are different models" in error["message"]

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mdf_sdk import load_manifest
from mdf_sdk.cli import main

from .toy_engine import seal

pytestmark = pytest.mark.usefixtures("entry_points_file")


@pytest.fixture
def image(photograph: npt.NDArray[np.uint8], tmp_path: Path) -> str:
    path = tmp_path / "eye.png"
    Image.fromarray(photograph).save(path)
    return str(path)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(document, dict)
    return document


def test_predict_prints_the_answer_then_json(
    toy_engine: Path, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(toy_engine), image, "--text", "a", "--json"]) == 0
    readable, *_, document = capsys.readouterr().out.splitlines()
    assert readable.startswith(str(json.loads(document)["label"]))


def test_predict_without_json_prints_none(
    toy_engine: Path, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(toy_engine), image, "--text", "a"]) == 0
    assert "{" not in capsys.readouterr().out


def test_a_picture_implies_mask_and_evidence(
    toy_engine: Path, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    words = ["predict", str(toy_engine), image, "--text", "a", "--picture", str(out), "--json"]
    assert main(words) == 0
    document = last_line(capsys)
    assert document["mask_shares"] is not None
    assert document["evidence"] is not None
    assert out.stat().st_size > 10_000


def test_a_bad_picture_path_is_refused_before_anything_runs(
    image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "no engine", image, "--text", "a", "--picture", "out.exe"]) == 2
    assert ".exe" in capsys.readouterr().err


def test_a_cut_text_is_said_so(
    toy_engine: Path, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(toy_engine), image, "--text", "a" * 70, "--json"]) == 0
    out = capsys.readouterr().out
    assert "the last 6 CUT OFF" in out
    assert json.loads(out.splitlines()[-1])["dropped_tokens"] == 6


def test_an_error_goes_to_stderr_and_as_json_to_the_last_line(
    toy_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(toy_engine), "absent.png", "--text", "a", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mdf predict: image 'absent.png': found no such file")
    error = json.loads(captured.out.splitlines()[-1])["error"]
    assert error["type"] == "ImageError"
    assert "absent.png" in error["message"]


def test_info_says_what_the_engine_is(toy_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(toy_engine), "--json"]) == 0
    out = capsys.readouterr().out
    assert "toy fp32" in out
    assert "not for clinical use" in out
    document = json.loads(out.splitlines()[-1])
    assert document["labels"] == ["Acquired", "Inherited"]


def test_verify_succeeds_on_a_whole_engine(
    toy_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(toy_engine), "--json"]) == 0
    assert last_line(capsys)["ok"] is True


def test_verify_exits_with_1_when_a_block_is_too_far(
    toy_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(toy_copy / "golden.npz") as arrays:
        golden = {
            name: values * (1.5 if name == "case0/mask" else 1) for name, values in arrays.items()
        }
    np.savez(toy_copy / "golden.npz", **golden)
    seal(toy_copy, load_manifest(toy_copy))
    assert main(["verify", str(toy_copy), "--json"]) == 1
    assert last_line(capsys)["ok"] is False

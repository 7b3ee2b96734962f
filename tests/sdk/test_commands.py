import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mdf_sdk import load_manifest
from mdf_sdk.cli import main
from mdf_sdk.memory import required_bytes

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


def test_a_frame_is_chosen_by_its_number(
    toy_engine: Path,
    photograph: npt.NDArray[np.uint8],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    film, alone, out = tmp_path / "film.tif", tmp_path / "alone.png", tmp_path / "out.png"
    pages = [Image.fromarray(photograph), Image.fromarray(photograph[:, ::-1])]
    pages[0].save(film, save_all=True, append_images=pages[1:])
    pages[1].save(alone)
    rest = ["--text", "a", "--json"]
    assert main(["predict", str(toy_engine), str(film), *rest]) == 2
    assert "found 2 pictures" in capsys.readouterr().err
    assert main(["predict", str(toy_engine), str(alone), *rest]) == 0
    expected = last_line(capsys)["scores"]
    words = ["predict", str(toy_engine), str(film), "--frame", "1", "--picture", str(out), *rest]
    assert main(words) == 0
    assert last_line(capsys)["scores"] == expected


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
    needed = required_bytes(load_manifest(toy_engine), "cuda")
    assert document["memory"].keys() == {"cpu", "cuda"}
    assert document["memory"]["cuda"]["total_bytes"] == needed.total_bytes
    assert document["memory"]["cuda"]["weights_bytes"] == needed.weights_bytes


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


def test_sign_then_verify_names_the_key(
    toy_copy: Path, key_pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = key_pair
    assert main(["sign", str(toy_copy), "--key", private, "--json"]) == 0
    signed_by = last_line(capsys)["signed_by"]
    assert main(["verify", str(toy_copy), "--key", public, "--json"]) == 0
    out = capsys.readouterr().out
    assert f"signed by the key with SHA-256 {signed_by}" in out
    assert json.loads(out.splitlines()[-1])["signed_by"] == signed_by


def test_verify_with_a_key_refuses_the_unsigned(
    toy_engine: Path, key_pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(toy_engine), "--key", key_pair[1], "--json"]) == 2
    error = last_line(capsys)["error"]
    assert isinstance(error, dict)
    assert error["type"] == "SignatureError"
    assert "mdf sign ENGINE --key" in error["message"]


def test_predict_with_a_key_refuses_the_unsigned(
    toy_engine: Path, key_pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(toy_engine), "eye.png", "--text", "58 years old", "--key", key_pair[1]]
    assert main(["predict", *arguments, "--json"]) == 2
    error = last_line(capsys)["error"]
    assert isinstance(error, dict)
    assert error["type"] == "SignatureError"


@pytest.fixture
def key_pair(tmp_path: Path) -> tuple[str, str]:
    """Paths of a private and its public key."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "private.pem").write_bytes(private)
    (tmp_path / "public.pem").write_bytes(public)
    return str(tmp_path / "private.pem"), str(tmp_path / "public.pem")

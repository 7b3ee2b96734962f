from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mdf_sdk import ImageError, InputError, MDFClassifier, save_picture

Picture = npt.NDArray[np.uint8]


@pytest.mark.parametrize(
    ("mask", "evidence", "panels"), [(False, False, 1), (True, False, 2), (True, True, 3)]
)
def test_a_picture_has_a_panel_for_each_part(
    classifier: MDFClassifier,
    photograph: Picture,
    tmp_path: Path,
    mask: bool,
    evidence: bool,
    panels: int,
) -> None:
    prediction = classifier.predict(photograph, "a", mask=mask, evidence=evidence)
    save_picture(tmp_path / "out.png", photograph, prediction)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == panels * 536 + 24
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_jpeg_replaces_the_file_that_was_there(
    classifier: MDFClassifier, photograph: Picture, tmp_path: Path
) -> None:
    (tmp_path / "out.jpg").write_text("old")
    save_picture(tmp_path / "out.jpg", photograph, classifier.predict(photograph, "a"))
    with Image.open(tmp_path / "out.jpg") as picture:
        assert picture.format == "JPEG"


@pytest.mark.parametrize("name", ["out.exe", "out", "absent/out.png"])
def test_a_path_that_cannot_be_written_is_refused(
    classifier: MDFClassifier, photograph: Picture, tmp_path: Path, name: str
) -> None:
    prediction = classifier.predict(photograph, "a")
    with pytest.raises(InputError, match="picture"):
        save_picture(tmp_path / name, photograph, prediction)
    assert list(tmp_path.iterdir()) == []


def test_the_photograph_itself_is_never_overwritten(
    classifier: MDFClassifier, photograph: Picture, tmp_path: Path
) -> None:
    eye = tmp_path / "eye.png"
    Image.fromarray(photograph).save(eye)
    before = eye.read_bytes()
    with pytest.raises(InputError, match="found the photograph itself"):
        save_picture(tmp_path / "." / "eye.png", eye, classifier.predict(eye, "a"))
    assert eye.read_bytes() == before


def test_another_photograph_than_the_predictions_is_refused(
    classifier: MDFClassifier, photograph: Picture, tmp_path: Path
) -> None:
    prediction = classifier.predict(photograph, "a")
    with pytest.raises(ImageError, match="Pass the photograph that was predicted"):
        save_picture(tmp_path / "out.png", photograph[:, 40:], prediction)
    assert list(tmp_path.iterdir()) == []


def test_a_large_jpeg_that_was_decoded_smaller_is_drawn_whole(
    classifier: MDFClassifier, photograph: Picture, tmp_path: Path
) -> None:
    eye = tmp_path / "eye.jpg"
    Image.fromarray(photograph).resize((1603, 1201)).save(eye, quality=95)
    prediction = classifier.predict(eye, "a")
    assert abs(prediction.square.left - 401) < 10  # in the photograph's own pixels
    assert abs(prediction.square.side - 1002) < 15
    save_picture(tmp_path / "out.png", eye, prediction)
    assert (tmp_path / "out.png").exists()

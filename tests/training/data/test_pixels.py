"""data.pixels: training sees the very pixels that the SDK makes of the same file."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdf_sdk.manifest import ImageSpec
from mdf_sdk.photograph import decode, prepare, read_source
from mdf_training.data.folder import COLUMNS, FolderData
from mdf_training.data.pixels import PixelSet

SPEC = ImageSpec(280, 256, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def data(tmp_path: Path) -> FolderData:
    """A JPEG of 900 x 700 px, its field of 640 px off the center, and the mask of a bright square
    in it."""
    rng = np.random.default_rng(0)
    grain = Image.fromarray(rng.integers(90, 120, (70, 90, 3), np.uint8))
    picture = np.array(grain.resize((900, 700), Image.Resampling.BICUBIC))
    mask = np.zeros((700, 900), np.bool_)
    mask[300:400, 500:650] = True
    picture[mask] = 255
    rows, columns = np.mgrid[:700, :900]
    picture[(rows - 350) ** 2 + (columns - 500) ** 2 > 320**2] = 0
    Image.fromarray(picture).save(tmp_path / "eye.jpg", quality=95)
    Image.fromarray(mask).save(tmp_path / "lesion.png")
    with (tmp_path / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        row = ["eye.jpg", "Acquired", "Blurred vision.", "lesion:lesion.png", "p1", "s"]
        csv.writer(file).writerows([COLUMNS, row])
    return FolderData(tmp_path)


def test_a_large_jpeg_gives_training_the_pixels_of_a_prediction(data: FolderData) -> None:
    photograph = decode(read_source(data.folder / "eye.jpg"), 280)
    tower, unet = prepare(photograph, SPEC)
    assert photograph.scale == 2
    case = PixelSet(data, SPEC, ("lesion",))[0]
    np.testing.assert_array_equal(case.tower_pixels, tower)
    np.testing.assert_array_equal(case.unet_pixels, unet)


def test_a_mask_lies_where_it_does_on_a_smaller_picture(data: FolderData) -> None:
    case = PixelSet(data, SPEC, ("lesion",))[0]
    bright = case.unet_pixels.min(axis=0) > 0.8
    assert case.masks[0].any()
    assert (bright != (case.masks[0] > 0)).mean() < 0.01


def test_a_case_read_whole_has_the_size_of_its_masks(data: FolderData) -> None:
    whole, smaller = data[0], data.read(0, 280)
    assert whole.image.shape[:2] == whole.masks["lesion"].shape == (700, 900)
    assert (whole.scale, smaller.scale) == (1, 2)
    assert smaller.image.shape[:2] == (350, 450)
    assert smaller.masks["lesion"].shape == (700, 900)

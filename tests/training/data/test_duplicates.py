"""data.duplicates: a stored-again photograph is found, another one is not taken for it."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from mdf_sdk.photograph import load_image
from mdf_training.data.duplicates import MAX_DISTANCE, find_duplicates, hash_picture
from mdf_training.data.synthetic import SyntheticData

PHOTOGRAPHS = Path(__file__).parents[4] / "shared" / "data" / "fundus" / "images"
PICTURES = [SyntheticData(40, seed=5)[i].image for i in range(40)]


def stored_as_jpeg(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=30)
    return Image.open(stream)


def padded(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    canvas = Image.new("RGB", (width * 3 // 2, height + 20))
    canvas.paste(picture, (width // 4, 10))
    return canvas


COPIES = (
    stored_as_jpeg,
    padded,
    lambda picture: picture.resize((200, 200)),
    lambda picture: ImageEnhance.Brightness(picture).enhance(0.7),
    lambda picture: ImageEnhance.Color(picture).enhance(0.5),
)
# More than the rendered pictures, with their strong colors and thin vessels, bear.
HARDER_COPIES = (
    lambda picture: ImageEnhance.Contrast(picture).enhance(1.3),
    lambda picture: picture.filter(ImageFilter.GaussianBlur(2)),
)


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_found_and_nothing_else(copy) -> None:
    copied = np.asarray(copy(Image.fromarray(PICTURES[7])).convert("RGB"))
    hashes = [hash_picture(picture) for picture in (*PICTURES, copied)]
    assert find_duplicates(hashes) == [(7, 40)]


def test_pairs_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdf_training.data.duplicates._BLOCK", 3)
    rng = np.random.default_rng(0)
    hashes = list(rng.random((10, 512)) < 0.5)
    hashes[8] = hashes[1].copy()
    hashes[4] = hashes[1].copy()
    hashes[4][:MAX_DISTANCE] ^= True
    hashes[9] = hashes[8].copy()
    hashes[9][: MAX_DISTANCE + 1] ^= True
    assert find_duplicates(hashes) == [(1, 4), (1, 8), (4, 8), (4, 9)]


def test_no_pictures_have_no_duplicates() -> None:
    assert find_duplicates([]) == []


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"no photographs in {PHOTOGRAPHS}")
def test_of_the_real_photographs_copies_alone_are_alike() -> None:
    """Where the figures beside MAX_DISTANCE come from."""
    files = sorted(PHOTOGRAPHS.iterdir())
    hashes = np.stack([hash_picture(load_image(file)) for file in files])
    signs = np.where(hashes, np.float32(1), np.float32(-1))
    distances = (512 - signs @ signs.T) / 2
    others = distances[np.triu_indices(len(files), 1)].min()
    copied = []
    for index in range(0, len(files), 12):
        picture = Image.fromarray(load_image(files[index]))
        for copy in (*COPIES, *HARDER_COPIES):
            twin = hash_picture(np.asarray(copy(picture).convert("RGB")))
            copied.append(int((twin != hashes[index]).sum()))
    print(
        f"{len(files)} photographs: others {others:.0f}; {len(copied)} copies: "
        f"95 % {np.percentile(copied, 95):.0f}, largest {max(copied)}"
    )
    assert others > MAX_DISTANCE
    assert np.mean(np.array(copied) <= MAX_DISTANCE) > 0.99

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mdf_sdk import ImageError, load_image
from mdf_sdk.manifest import ImageSpec
from mdf_sdk.preprocessing import Square, crop_square, find_square, to_pixels

SPEC = ImageSpec(56, 48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (0.0,) * 3, (1.0,) * 3)
Picture = npt.NDArray[np.uint8]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_path_bytes_image_and_array_give_the_same_pixels(
    photograph: Picture, tmp_path: Path
) -> None:
    image = Image.fromarray(photograph)
    image.save(tmp_path / "eye.png")
    sources = (tmp_path / "eye.png", str(tmp_path / "eye.png"), encoded(image), image, photograph)
    for source in sources:
        np.testing.assert_array_equal(load_image(source), photograph)


def test_exif_orientation_is_applied(photograph: Picture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    data = encoded(Image.fromarray(photograph), exif=exif)
    np.testing.assert_array_equal(load_image(data), np.rot90(photograph, -1))


def test_16_bit_gray_is_scaled_and_not_clipped() -> None:
    gray = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    picture = load_image(encoded(Image.fromarray(gray)))
    assert picture.shape == (64, 64, 3)
    np.testing.assert_array_equal(picture[:, :, 0], gray >> 8)


def test_transparency_becomes_black() -> None:
    image = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    assert load_image(encoded(image)).max() == 0


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("1", "PNG")]
)
def test_other_modes_become_rgb(mode: str, kind: str) -> None:
    image = Image.new("RGB", (40, 50), (255, 255, 255)).convert(mode)
    picture = load_image(encoded(image, kind))
    assert picture.shape == (50, 40, 3)
    assert picture.dtype == np.uint8
    assert picture.min() >= 250


def test_a_gray_array_becomes_rgb() -> None:
    assert load_image(np.full((40, 50), 7, np.uint8)).tolist() == np.full((40, 50, 3), 7).tolist()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((40, 40, 3), np.float32), "dtype float32.*astype"),
        (np.full((40, 40, 3), np.nan), "NaN"),
        (np.zeros((40, 40, 3), np.int64), "dtype int64"),
        (np.zeros((40, 40, 4), np.uint8), r"shape \(40, 40, 4\)"),
        (np.zeros((3, 40, 40), np.uint8), r"shape \(3, 40, 40\)"),
        (np.zeros((2, 40, 40, 3), np.uint8), "shape"),
        (np.zeros((0, 40, 3), np.uint8), "40 x 0 px"),
        (np.zeros((1, 1, 3), np.uint8), "1 x 1 px.*32"),
        (np.zeros(0, np.uint8), "shape"),
        (Image.new("RGB", (1, 1)), "1 x 1 px"),
        (Image.new("F", (40, 40)), "floating-point"),
        (Image.new("RGB", (9001, 32)), "9001 x 32 px"),
        (Image.new("I", (40, 40), -1), "32-bit"),
        (b"", "no bytes"),
        (b"hello", "no picture or a broken one"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "no picture"),
        (encoded(Image.new("RGB", (64, 64)))[:-40], "broken"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-500], "broken"),
        (None, "found NoneType"),
        ([[1, 2], [3, 4]], "found list"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_unusable_image_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)


@pytest.mark.parametrize("name", ["absent.jpg", "", "folder", "a\0b"])
def test_an_unusable_path_is_refused_and_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageError, match="found"):
        load_image(str(tmp_path / name))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "eye.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ImageError, match=r"eye\.jpg"):
        load_image(tmp_path / "eye.jpg")


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    png = bytearray(encoded(Image.new("L", (32, 32))))
    png[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's width and height
    from zlib import crc32

    png[29:33] = crc32(png[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageError, match="too large to decode"):
        load_image(bytes(png))


@given(
    prefix=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"BM", b"GIF89a"]
    ),
    data=st.binary(max_size=300),
)
@settings(deadline=None)
def test_arbitrary_bytes_raise_only_image_errors(prefix: bytes, data: bytes) -> None:
    with pytest.raises(ImageError):
        load_image(prefix + data)


@given(
    at=st.integers(0, 2**16),
    value=st.integers(0, 255),
    kind=st.sampled_from(["JPEG", "PNG", "TIFF"]),
)
@settings(deadline=None)
def test_a_damaged_file_gives_a_picture_or_an_image_error(at: int, value: int, kind: str) -> None:
    data = bytearray(encoded(Image.linear_gradient("L").resize((48, 48)), kind))
    data[at % len(data)] = value
    try:
        picture = load_image(bytes(data))
    except ImageError:
        return
    assert picture.dtype == np.uint8
    assert picture.ndim == 3


def test_the_square_bounds_the_field_of_view(photograph: Picture) -> None:
    square = find_square(photograph)
    assert abs(square.left - 80) <= 2
    assert abs(square.top - 20) <= 2
    assert abs(square.side - 200) <= 3


def test_a_picture_without_dark_surround_is_bounded_whole() -> None:
    assert find_square(np.full((100, 140, 3), 90, np.uint8)) == Square(0, -20, 140)


def test_a_black_picture_is_bounded_whole() -> None:
    assert find_square(np.zeros((100, 140, 3), np.uint8)) == Square(0, -20, 140)


def test_a_caption_and_noise_in_the_surround_do_not_widen_the_square(photograph: Picture) -> None:
    noisy = np.maximum(
        photograph, np.random.default_rng(0).integers(0, 8, photograph.shape, np.uint8)
    )
    noisy[232:236, 4:9] = 255
    assert abs(find_square(noisy).side - 200) <= 3


@given(height=st.integers(32, 300), width=st.integers(32, 300), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_every_picture_has_a_square_that_can_be_cropped(height: int, width: int, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    picture[: height // (seed + 1)] = 0
    square = find_square(picture)
    assert square.side >= 1
    assert crop_square(picture, square, 20).shape == (20, 20, 3)


def test_what_lies_outside_the_picture_is_black() -> None:
    white = np.full((40, 80, 3), 255, np.uint8)
    crop = crop_square(white, Square(0, -20, 80), 80)
    assert crop[:18].max() == 0
    assert crop[22:58].min() == 255
    assert crop[62:].max() == 0


def test_a_mask_keeps_its_dtype_and_values() -> None:
    mask = np.zeros((60, 60), np.bool_)
    mask[10:30, 10:30] = True
    crop = crop_square(mask, Square(0, 0, 60), 30, nearest=True)
    assert crop.dtype == np.bool_
    np.testing.assert_array_equal(crop, mask[::2, ::2])
    kinds = mask.astype(np.uint8) * 3
    assert set(np.unique(crop_square(kinds, Square(-5, 0, 60), 17, nearest=True))) == {0, 3}


def test_pixels_are_normalized_planes() -> None:
    picture = np.full((64, 64, 3), (255, 102, 0), np.uint8)
    tower, unet = to_pixels(picture, SPEC)
    assert (tower.shape, tower.dtype) == ((3, 56, 56), np.float32)
    assert (unet.shape, unet.dtype) == ((3, 48, 48), np.float32)
    np.testing.assert_allclose(tower[:, 5, 5], [2.5, 0.0, -0.75], atol=1e-6)
    np.testing.assert_allclose(unet[:, 5, 5], [1.0, 0.4, 0.0], atol=1e-6)


def test_pixels_are_the_same_every_time(photograph: Picture) -> None:
    for first, second in zip(to_pixels(photograph, SPEC), to_pixels(photograph, SPEC), strict=True):
        np.testing.assert_array_equal(first, second)


def test_squaring_a_camera_photograph_takes_milliseconds(photograph: Picture) -> None:
    large = np.asarray(Image.fromarray(photograph).resize((1411, 1411)))
    spec = ImageSpec(560, 512, (0.5,) * 3, (0.5,) * 3, (0.5,) * 3, (0.5,) * 3)
    times_s = []
    for _ in range(5):
        start = time.perf_counter()
        to_pixels(large, spec)
        times_s.append(time.perf_counter() - start)
    assert min(times_s) < 0.1  # 14 ms on an idle core; the bound only tells ms from s

"""mdf_sdk.photograph: photographs as clinics have them, and files that are none."""

import io
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any
from zlib import compress, crc32

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mdf_sdk import ImageError, MissingExtraError, load_image
from mdf_sdk.manifest import ImageSpec
from mdf_sdk.photograph import decode, no_warnings, prepare, read_source
from mdf_sdk.preprocessing import to_pixels

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "fundus" / "images"
SPEC = ImageSpec(56, 48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (0.0,) * 3, (1.0,) * 3)
Picture = npt.NDArray[np.uint8]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def swapped_profile() -> bytes:
    """An ICC profile for which red is blue, and blue red."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")


def test_path_bytes_image_and_array_give_the_same_pixels(
    photograph: Picture, tmp_path: Path
) -> None:
    image = Image.fromarray(photograph)
    image.save(tmp_path / "eye.png")
    sources = (tmp_path / "eye.png", str(tmp_path / "eye.png"), encoded(image), image, photograph)
    for source in sources:
        np.testing.assert_array_equal(load_image(source), photograph)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_exif_orientation_is_applied(
    photograph: Picture, kind: str, orientation: int, turned: Callable[[Picture], Picture]
) -> None:
    image, exif = Image.fromarray(photograph), Image.Exif()
    exif[0x0112] = orientation
    expected = turned(load_image(encoded(image, kind)))
    np.testing.assert_array_equal(load_image(encoded(image, kind, exif=exif)), expected)


def test_16_bit_gray_is_scaled_and_not_clipped() -> None:
    gray = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for kind in ("PNG", "TIFF"):
        picture = load_image(encoded(Image.fromarray(gray), kind))
        assert picture.shape == (64, 64, 3)
        np.testing.assert_array_equal(picture[:, :, 0], gray >> 8)


def test_12_bits_in_a_16_bit_gray_file_fill_8() -> None:
    gray = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    picture = load_image(encoded(Image.fromarray(gray)))
    np.testing.assert_array_equal(picture[:, :, 0], gray >> 4)


def test_16_bit_gray_in_which_0_is_white_is_inverted() -> None:
    gray = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    picture = load_image(encoded(Image.fromarray(gray), "TIFF", tiffinfo={262: 0}))
    np.testing.assert_array_equal(picture[:, :, 0], 255 - (gray >> 8))


def png_of_16_bits(values: npt.NDArray[np.uint16]) -> bytes:
    """A color PNG, which Pillow reads and cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + crc32(body).to_bytes(4, "big")

    height, width, _ = values.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_16_bit_color_is_scaled() -> None:
    values = np.linspace(0, 65535, 40 * 40 * 3).astype(np.uint16).reshape(40, 40, 3)
    np.testing.assert_array_equal(load_image(png_of_16_bits(values)), values >> 8)


def test_12_bits_in_a_16_bit_color_file_are_refused() -> None:
    values = np.linspace(0, 4095, 40 * 40 * 3).astype(np.uint16).reshape(40, 40, 3)
    with pytest.raises(ImageError, match=r"12 bits or less.*8 bits a channel"):
        load_image(png_of_16_bits(values))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_color_profile_is_converted_to_srgb(photograph: Picture, kind: str) -> None:
    image = Image.fromarray(photograph)
    plain = load_image(encoded(image, kind))
    converted = load_image(encoded(image, kind, icc_profile=swapped_profile()))
    np.testing.assert_allclose(converted, plain[:, :, ::-1], atol=2)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("damage", [lambda p: b"broken", lambda p: p[:200], lambda p: p[::-1]])
def test_a_broken_or_foreign_profile_counts_as_none(
    photograph: Picture, mode: str, damage: Callable[[bytes], bytes]
) -> None:
    image = Image.fromarray(photograph).convert(mode)
    plain = load_image(encoded(image, "TIFF"))
    data = encoded(image, "TIFF", icc_profile=damage(swapped_profile()))
    np.testing.assert_array_equal(load_image(data), plain)


def test_srgb_profiles_change_no_pixel(photograph: Picture) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(Image.fromarray(photograph), icc_profile=profile)
    np.testing.assert_array_equal(load_image(data), photograph)


def test_lab_becomes_srgb(photograph: Picture) -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(photograph), srgb, lab, outputMode="LAB")
    assert image is not None
    np.testing.assert_allclose(load_image(encoded(image, "TIFF")), photograph, atol=6)


def test_cmyk_of_a_jpeg_is_not_inverted(photograph: Picture) -> None:
    image = Image.fromarray(photograph)
    picture = load_image(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(picture.astype(int) - photograph).mean() < 3


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "PNG"])
def test_of_several_pictures_one_must_be_chosen(photograph: Picture, kind: str) -> None:
    pages = [Image.fromarray(np.roll(photograph, 40 * i, axis=1)) for i in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(pages[0], kind, save_all=True, append_images=pages[1:], **options)
    with pytest.raises(ImageError, match=r"found 3 pictures in one file.*--frame 0"):
        load_image(data)
    with pytest.raises(ImageError, match="found 3 pictures and frame 3"):
        load_image(data, 3)
    for index, page in enumerate(pages):
        off = load_image(data, frame=index).astype(int) - np.asarray(page)
        assert np.abs(off).max() <= 0


def test_a_jpeg_with_previews_is_one_picture(photograph: Picture) -> None:
    image = Image.fromarray(photograph)
    preview = image.resize((64, 48))
    data = encoded(image, "MPO", save_all=True, append_images=[preview])
    np.testing.assert_array_equal(load_image(data), load_image(encoded(image, "JPEG")))


@pytest.mark.parametrize("frame", [-1, True, 0.0, "0"])
def test_what_is_no_frame_number_is_refused(frame: Any) -> None:
    with pytest.raises(ImageError, match="frame: found"):
        load_image(encoded(Image.new("RGB", (40, 40))), frame)


def test_a_decoded_image_has_no_frames(photograph: Picture) -> None:
    for image in (photograph, Image.fromarray(photograph)):
        with pytest.raises(ImageError, match="Only files have frames"):
            load_image(image, frame=0)


def test_frames_of_one_file_have_different_keys() -> None:
    data = encoded(Image.new("RGB", (40, 40)))
    assert len({read_source(data, frame).key for frame in (None, 0, 1)}) == 3
    assert read_source(data).key == read_source(bytes(data)).key


def test_dicom_without_its_extra_is_refused_with_the_install_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.delitem(sys.modules, "mdf_sdk.dicom", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'mdf-mllm\[dicom\]'"):
        load_image(bytes(128) + b"DICM")


def test_transparency_becomes_black() -> None:
    image = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    assert load_image(encoded(image)).max() == 0


def flat(value: int, noise: int = 0) -> Picture:
    random = np.random.default_rng(0).integers(-noise, noise + 1, (300, 400, 3))
    return (value + random).astype(np.uint8)


@pytest.mark.parametrize(
    "picture",
    [flat(0), flat(255), flat(128), flat(3, noise=3)],
    ids=["black", "white", "gray", "unlit"],
)
def test_a_photograph_on_which_nothing_is_to_be_seen_is_refused(picture: Picture) -> None:
    picture[:10, :40] = 255  # a caption
    for source in (picture, encoded(Image.fromarray(picture))):
        with pytest.raises(ImageError, match="nothing to see"):
            decode(read_source(source))


def test_the_flattest_photograph_that_was_found_is_decoded() -> None:
    gradient = np.linspace(60, 100, 400).astype(np.uint8)  # of 1,458, the least was 42 of 255
    picture = np.tile(gradient[None, :, None], (300, 1, 3))
    np.testing.assert_array_equal(decode(read_source(picture)).picture, picture)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")]
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
    png[29:33] = crc32(png[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageError, match="too large to decode"):
        load_image(bytes(png))


@given(
    prefix=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"BM"]),
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


@pytest.fixture(scope="session")
def large() -> Image.Image:
    """A round field of 900 px with detail, off the center of 1,200 x 1,000 px."""
    rng = np.random.default_rng(0)
    grain = Image.fromarray(rng.integers(60, 200, (150, 180, 3), np.uint8))
    picture = np.array(grain.resize((1200, 1000), Image.Resampling.BICUBIC))
    rows, columns = np.mgrid[:1000, :1200]
    picture[(rows - 500) ** 2 + (columns - 620) ** 2 > 450**2] = 0
    return Image.fromarray(picture)


@pytest.mark.parametrize(
    ("least_px", "scale"), [(None, 1), (1000, 1), (460, 1), (440, 2), (260, 2), (10, 2)]
)
def test_a_jpeg_is_decoded_no_larger_than_is_needed(
    large: Image.Image, least_px: int | None, scale: int
) -> None:
    found = decode(read_source(encoded(large, "JPEG", quality=95)), least_px)
    assert (found.scale, found.size) == (scale, (1200, 1000))
    assert found.image.size == (1200 // scale, 1000 // scale)


def test_a_very_large_jpeg_is_decoded_to_a_quarter(large: Image.Image) -> None:
    found = decode(read_source(encoded(large.resize((2400, 2000)), "JPEG")), 400)
    assert (found.scale, found.image.size) == (4, (600, 500))


def test_a_field_of_view_that_would_come_out_too_small_is_decoded_larger() -> None:
    small = np.zeros((1000, 1200, 3), np.uint8)
    small[300:700, 400:800] = 200  # 400 of 1,000 px
    found = decode(read_source(encoded(Image.fromarray(small), "JPEG")), 300)
    assert found.scale == 1
    assert abs(found.square.side - 400) < 8


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_smaller_decode_gives_the_pixels_of_the_whole(
    large: Image.Image, mode: str, progressive: bool
) -> None:
    data = encoded(large.convert(mode), "JPEG", quality=95, progressive=progressive)
    spec = ImageSpec(400, 280, (0.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0,) * 3)
    smaller, whole = decode(read_source(data), 400), decode(read_source(data))
    square = smaller.square.times(smaller.scale)
    assert smaller.scale == 2
    for field, other in zip(astuple(square), astuple(whole.square), strict=True):
        assert abs(field - other) <= 6
    for found, expected in zip(
        prepare(smaller, spec), to_pixels(whole.picture, spec, square), strict=True
    ):
        off = 255 * np.abs(found - expected)
        assert off.mean() < 2
        assert off.max() < 30  # on the edge of the field


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_smaller_decode_is_upright_too(large: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = read_source(encoded(large, "JPEG", quality=95, exif=exif))
    smaller, whole = decode(source, 450), decode(source)
    assert smaller.scale == 2
    assert smaller.size == whole.size == whole.image.size
    assert smaller.image.size == (whole.size[0] // 2, whole.size[1] // 2)
    halved = np.asarray(whole.image.reduce(2)).astype(int)
    assert np.abs(smaller.picture - halved).mean() < 2


def test_other_formats_are_decoded_whole(large: Image.Image) -> None:
    for kind in ("PNG", "WEBP", "TIFF"):
        assert decode(read_source(encoded(large, kind)), 300).scale == 1


def test_a_large_jpeg_that_ends_early_is_refused(large: Image.Image) -> None:
    data = encoded(large, "JPEG")
    for end in (len(data) // 3, len(data) - 500):
        with pytest.raises(ImageError, match="broken"):
            decode(read_source(data[:end]), 300)


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"no photographs in {PHOTOGRAPHS}")
def test_a_smaller_decode_of_real_photographs_gives_the_pixels_of_the_whole() -> None:
    """Where the figures in docs/design.md come from."""
    spec = ImageSpec(256, 240, (0.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0,) * 3)
    means, largest, moved = [], [], []
    for path in sorted(PHOTOGRAPHS.iterdir())[::40]:
        source = read_source(path)
        smaller, whole = decode(source, 256), decode(source)
        if smaller.scale == 1:
            continue
        square = smaller.square.times(smaller.scale)
        off = 255 * np.abs(prepare(smaller, spec)[0] - to_pixels(whole.picture, spec, square)[0])
        means.append(off.mean())
        largest.append(off.max())
        pairs = zip(astuple(square), astuple(whole.square), strict=True)
        moved.append(max(abs(a - b) for a, b in pairs) / square.side)
    print(
        f"{len(means)} photographs: mean {np.mean(means):.2f}, at most {max(means):.2f} of 255, "
        f"one pixel {max(largest):.0f}; the square moved by {max(moved):.2%} of its side at most"
    )
    assert max(means) < 1
    assert max(moved) < 0.01


def test_overlapping_calls_leave_the_warning_filters_as_they_were() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ExitStack() as one:
            one.enter_context(no_warnings)
            with ExitStack() as two:
                two.enter_context(no_warnings)
                one.close()
                warnings.warn("not heard", stacklevel=1)
        assert list(warnings.filters) == before
        with pytest.raises(UserWarning, match="heard"):
            warnings.warn("heard", stacklevel=1)


def test_a_loaded_image_may_be_drawn_on(photograph: Picture) -> None:
    load_image(encoded(Image.fromarray(photograph)))[:] = 0

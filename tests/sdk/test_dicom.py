import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

pydicom = pytest.importorskip("pydicom")

from pydicom import uid  # noqa: E402
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate, get_frame  # noqa: E402

from mdf_sdk import ImageError, load_image  # noqa: E402

Picture = npt.NDArray[np.uint8]
OPHTHALMIC_8_BITS = "1.2.840.10008.5.1.4.1.1.77.1.5.1"
NAME = "DOE^JANE"


def ophthalmic(
    pixels: npt.NDArray[Any],
    photometric: str = "RGB",
    syntax: uid.UID = uid.ExplicitVRLittleEndian,
    streams: list[bytes] | None = None,
    **elements: Any,
) -> bytes:
    """An ophthalmic photography file of one frame, or of `streams` as an encoder made them."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = OPHTHALMIC_8_BITS
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName, dataset.PatientID, dataset.Modality = NAME, "4711", "OP"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    if streams is not None:
        dataset.PixelData, dataset.NumberOfFrames = encapsulate(streams), len(streams)
        dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    for key, value in elements.items():
        setattr(dataset, key, value)
    dataset.HighBit = elements.get("HighBit", dataset.BitsStored - 1)
    return saved(dataset)


def saved(dataset: Dataset) -> bytes:
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def jpeg(picture: Picture, **options: Any) -> bytes:
    return encoded(picture, "JPEG", quality=95, **options)


def jpeg_2000(picture: npt.NDArray[Any], **options: Any) -> bytes:
    return encoded(picture, "JPEG2000", no_jp2=True, **options)


def encoded(picture: npt.NDArray[Any], kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


def shipped(name: str) -> Path:
    """A file that pydicom's own wheel holds."""
    path = get_testdata_file(name, download=False)
    assert path is not None
    return Path(str(path))


def shipped_stream(name: str) -> bytes:
    return bytes(get_frame(pydicom.dcmread(shipped(name)).PixelData, 0, number_of_frames=1))


@pytest.fixture(scope="module")
def gray() -> npt.NDArray[np.uint16]:
    """uint16 (60, 70), every value of 12 bits among them."""
    return (np.arange(60 * 70) % 4096).astype(np.uint16).reshape(60, 70)


@pytest.mark.parametrize(
    "syntax",
    [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    ],
    ids=lambda syntax: syntax.name,
)
def test_uncompressed_colors_are_read_exactly(
    photograph: Picture, syntax: uid.UID, tmp_path: Path
) -> None:
    data = ophthalmic(photograph, syntax=syntax)
    np.testing.assert_array_equal(load_image(data), photograph)
    (tmp_path / "a file without suffix").write_bytes(data)
    np.testing.assert_array_equal(load_image(tmp_path / "a file without suffix"), photograph)


def test_color_by_plane_is_read(photograph: Picture) -> None:
    planes = photograph.transpose(2, 0, 1).tobytes()
    data = ophthalmic(photograph, PlanarConfiguration=1, PixelData=planes)
    np.testing.assert_array_equal(load_image(data), photograph)


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLSLossless], ids=lambda s: s.name)
@pytest.mark.parametrize("bits", [8, 16])
def test_lossless_compression_changes_nothing(
    photograph: Picture, gray: npt.NDArray[np.uint16], syntax: uid.UID, bits: int
) -> None:
    if syntax == uid.JPEGLSLossless:
        pytest.importorskip("jpeg_ls")
    pixels, photometric = (photograph, "RGB") if bits == 8 else (gray * 16, "MONOCHROME2")
    plain = pydicom.dcmread(io.BytesIO(ophthalmic(pixels, photometric)))
    expected = load_image(saved(plain))
    plain.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(load_image(saved(plain)), expected)


def test_near_lossless_jpeg_ls_is_near(photograph: Picture) -> None:
    pytest.importorskip("jpeg_ls")
    dataset = pydicom.dcmread(io.BytesIO(ophthalmic(photograph)))
    dataset.compress(uid.JPEGLSNearLossless, jls_error=2, generate_instance_uid=False)
    off = load_image(saved(dataset)).astype(int) - photograph
    assert 0 < np.abs(off).max() <= 2


def test_jpeg_2000_is_read(photograph: Picture, gray: npt.NDArray[np.uint16]) -> None:
    stream = jpeg_2000(photograph)
    lossless = ophthalmic(photograph, "YBR_RCT", uid.JPEG2000Lossless, [stream])
    np.testing.assert_array_equal(load_image(lossless), photograph)
    stream = jpeg_2000(photograph, irreversible=True, quality_layers=[10])
    lossy = load_image(ophthalmic(photograph, "YBR_ICT", uid.JPEG2000, [stream]))
    assert np.abs(lossy.astype(int) - photograph).mean() < 2
    stream = jpeg_2000(gray)
    deep = ophthalmic(gray, "MONOCHROME2", uid.JPEG2000Lossless, [stream])
    np.testing.assert_array_equal(load_image(deep), load_image(ophthalmic(gray, "MONOCHROME2")))


@pytest.mark.parametrize(("photometric", "sampling"), [("YBR_FULL", 0), ("YBR_FULL_422", 1)])
def test_baseline_jpeg_is_read(photograph: Picture, photometric: str, sampling: int) -> None:
    stream = jpeg(photograph, subsampling=sampling)
    picture = load_image(ophthalmic(photograph, photometric, uid.JPEGBaseline8Bit, [stream]))
    np.testing.assert_allclose(picture, load_image(stream), atol=2)


def test_a_jpeg_whose_colors_were_never_converted_is_read(photograph: Picture) -> None:
    stream = jpeg(photograph, keep_rgb=True)
    picture = load_image(ophthalmic(photograph, "RGB", uid.JPEGBaseline8Bit, [stream]))
    assert np.abs(picture.astype(int) - photograph).mean() < 2


# Ten bars of 10 px; these are the colors of five of them.
BARS = {5: (255, 0, 0), 15: (255, 128, 128), 45: (0, 0, 255), 75: (64, 64, 64), 95: (255, 255, 255)}


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", 0),  # JPEG Lossless
        ("SC_rgb_gdcm_KY.dcm", 0),
        ("SC_rgb_rle.dcm", 0),
        ("SC_rgb_rle_16bit.dcm", 0),
        ("SC_ybr_full_422_uncompressed.dcm", 2),
        ("SC_rgb_dcmtk_+eb+cr.dcm", 1),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 4),
        ("SC_rgb_dcmtk_+eb+cy+s4.dcm", 2),
        ("SC_rgb_jpeg_lossy_gdcm.dcm", 2),
        ("SC_rgb_jls_lossy_sample.dcm", 2),
    ],
)
def test_files_of_other_programs_show_their_colors(name: str, off: int) -> None:
    if "jls" in name:
        pytest.importorskip("jpeg_ls")
    picture = load_image(shipped(name))
    for row, color in BARS.items():
        np.testing.assert_allclose(picture[row, 50], color, atol=off)


def test_lossless_jpeg_is_read_as_dicom_says_whatever_its_own_markers_say() -> None:
    name = "SC_rgb_jpeg_gdcm.dcm"
    stream, picture = shipped_stream(name), load_image(shipped(name))
    at = stream.index(b"\xff\xee")  # Adobe's marker, which says RGB; JFIF's says YCbCr
    end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    jfif = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    other = stream[:2] + jfif + stream[2:at] + stream[end:]
    again = load_image(ophthalmic(picture, "RGB", uid.JPEGLosslessSV1, [other]))
    np.testing.assert_array_equal(again, picture)


def test_palette_colors_are_looked_up() -> None:
    picture = load_image(shipped("examples_palette.dcm"))
    assert picture.shape == (350, 800, 3)
    assert np.ptp(picture.astype(int).mean(axis=(0, 1))) > 5  # it is no gray picture


def test_a_palette_of_16_bits_is_scaled() -> None:
    index = np.tile(np.arange(256, dtype=np.uint8), (40, 1))
    elements = {}
    for color, factor in (("Red", 257), ("Green", 128), ("Blue", 1)):
        levels = (np.arange(256) * factor).astype("<u2")
        elements[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"{color}PaletteColorLookupTableData"] = levels.tobytes()
    picture = load_image(ophthalmic(index, "PALETTE COLOR", **elements))
    assert picture[0, -1].tolist() == [255, 127, 0]


def test_gray_of_12_bits_fills_8(gray: npt.NDArray[np.uint16]) -> None:
    picture = load_image(ophthalmic(gray, "MONOCHROME2", BitsStored=12))
    np.testing.assert_array_equal(picture[..., 0], np.rint(gray / 4095 * 255))


def test_bits_beyond_the_stored_ones_are_left_out(gray: npt.NDArray[np.uint16]) -> None:
    expected = load_image(ophthalmic(gray, "MONOCHROME2", BitsStored=12))
    overlay = ophthalmic(gray | 0x8000, "MONOCHROME2", BitsStored=12)
    np.testing.assert_array_equal(load_image(overlay), expected)
    dataset = pydicom.dcmread(io.BytesIO(overlay))
    dataset.compress(uid.RLELossless, generate_instance_uid=False)
    np.testing.assert_array_equal(load_image(saved(dataset)), expected)


def test_monochrome1_is_inverted(gray: npt.NDArray[np.uint16]) -> None:
    one, two = (
        load_image(ophthalmic(gray, kind, BitsStored=12)) for kind in ("MONOCHROME1", "MONOCHROME2")
    )
    np.testing.assert_array_equal(one, 255 - two)


def test_signed_gray_starts_at_its_lowest_value() -> None:
    signed = np.linspace(-2048, 2047, 64 * 64).astype(np.int16).reshape(64, 64)
    picture = load_image(ophthalmic(signed, "MONOCHROME2", BitsStored=12))
    assert (picture[0, 0, 0], picture[-1, -1, 0]) == (0, 255)


@pytest.mark.parametrize(
    ("function", "middle", "edge"),
    [("LINEAR", 128, 0), ("LINEAR_EXACT", 128, 0), ("SIGMOID", 128, 30)],
)
def test_gray_is_windowed_after_rescaling(
    gray: npt.NDArray[np.uint16], function: str, middle: int, edge: int
) -> None:
    window = {"WindowCenter": [2000, 9], "WindowWidth": [1000, 9], "VOILUTFunction": function}
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -1000}
    picture = load_image(ophthalmic(gray, "MONOCHROME2", BitsStored=12, **rescale, **window))
    levels = picture[..., 0].ravel()
    assert abs(int(levels[1500]) - middle) <= 1  # 1500 * 2 - 1000 = 2000, the center
    assert abs(int(levels[1250]) - edge) <= 1  # 1500, half a width below
    assert (np.diff(levels[:4096].astype(int)) >= 0).all()


def test_a_color_profile_is_converted_to_srgb(photograph: Picture) -> None:
    from .test_photograph import swapped_profile

    profile = swapped_profile()
    in_dicom = load_image(ophthalmic(photograph, ICCProfile=profile))
    np.testing.assert_array_equal(
        in_dicom, load_image(encoded(photograph, "PNG", icc_profile=profile))
    )
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(load_image(ophthalmic(photograph, ICCProfile=srgb)), photograph)


def test_a_frame_must_be_chosen_and_is_found(photograph: Picture) -> None:
    frames = np.stack([photograph, photograph[:, ::-1], photograph // 2])
    plain = ophthalmic(photograph, NumberOfFrames=3, PixelData=frames.tobytes())
    streams = [jpeg_2000(frame) for frame in frames]
    packed = ophthalmic(photograph, "YBR_RCT", uid.JPEG2000Lossless, streams)
    for data in (plain, packed):
        with pytest.raises(ImageError, match=r"found 3 pictures in one file.*frame=0"):
            load_image(data)
        with pytest.raises(ImageError, match="found 3 pictures and frame 3"):
            load_image(data, frame=3)
        for index, frame in enumerate(frames):
            np.testing.assert_array_equal(load_image(data, index), frame)


def test_a_frame_of_a_real_film_is_found() -> None:
    picture = load_image(shipped("examples_ybr_color.dcm"), frame=29)
    assert picture.shape == (240, 320, 3)


def altered(change: Callable[[Dataset], None]) -> bytes:
    file = io.BytesIO(ophthalmic(np.full((40, 50, 3), 9, np.uint8)))
    dataset = pydicom.dcmread(file)
    change(dataset)
    return saved(dataset)


def without(key: str) -> Callable[[Dataset], None]:
    return lambda dataset: dataset.__delattr__(key)


def with_values(**values: Any) -> Callable[[Dataset], None]:
    return lambda dataset: dataset.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("PixelData"), r"without a picture \(Ophthalmic Photography 8 Bit Image"),
        (without("Rows"), "without a picture"),
        (without("BitsAllocated"), "broken DICOM file"),
        (without("PhotometricInterpretation"), "unknown photometric interpretation"),
        (with_values(Rows=60_000), "50 x 60000 px, expected 32 to 9000"),
        (with_values(Rows=20), "50 x 20 px"),
        (with_values(Rows=41), "broken DICOM file"),
        (with_values(NumberOfFrames=2_000_000_000), "found 2000000000 pictures"),
        (with_values(PhotometricInterpretation="DOE JANE"), "unknown photometric interpretation"),
        (with_values(PhotometricInterpretation="YBR_ICT"), "broken DICOM file"),
        (with_values(BitsAllocated=32), "3 samples of 32 bits"),
        (with_values(SamplesPerPixel=4), "4 samples of 8 bits"),
        (with_values(BitsStored=7), "shifted within their bytes"),
    ],
)
def test_a_file_without_a_usable_picture_is_refused(
    change: Callable[[Dataset], None], message: str
) -> None:
    with pytest.raises(ImageError, match=message) as refusal:
        load_image(altered(change))
    assert "DOE" not in f"{refusal.value} {refusal.value.__cause__}"


def test_a_report_is_refused_by_its_kind() -> None:
    with pytest.raises(ImageError, match=r"without a picture \(Comprehensive SR Storage\)"):
        load_image(shipped("test-SR.dcm"))


@pytest.mark.parametrize(
    ("syntax", "stream", "message"),
    [
        (uid.JPEGBaseline8Bit, b"garbage", "broken DICOM file"),
        (uid.JPEGBaseline8Bit, b"\0\0", "broken DICOM file"),
        (uid.JPEG2000, b"\xff\x4f\xff\x51", "broken DICOM file"),
        (uid.RLELossless, b"garbage", "broken DICOM file"),
        (uid.RLELossless, b"\x03" + bytes(63), "broken DICOM file"),
        (uid.MPEG2MPML, b"garbage", "found the transfer syntax MPEG2 Main Profile"),
    ],
)
def test_streams_that_no_decoder_takes_are_refused(
    syntax: uid.UID, stream: bytes, message: str
) -> None:
    data = ophthalmic(np.zeros((40, 50, 3), np.uint8), syntax=syntax, streams=[stream])
    with pytest.raises(ImageError, match=message):
        load_image(data)


def test_a_transfer_syntax_that_is_none_is_not_shown() -> None:
    data = ophthalmic(np.zeros((40, 50, 3), np.uint8))
    syntax = uid.ExplicitVRLittleEndian.encode()
    data = data.replace(b"UI\x14\0" + syntax, b"UI\x14\0" + b"1.2.3.4".ljust(len(syntax), b"\0"))
    with pytest.raises(ImageError, match="found the transfer syntax of an unknown kind"):
        load_image(data)


@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEG2000, uid.JPEGLSLossless])
def test_a_stream_of_another_size_than_its_header_is_refused(
    photograph: Picture, syntax: uid.UID
) -> None:
    stream = jpeg_2000(photograph) if syntax == uid.JPEG2000 else jpeg(photograph)
    with pytest.raises(ImageError, match="found 320 x 240 px in a frame of 50 x 40 px"):
        load_image(ophthalmic(np.zeros((40, 50, 3), np.uint8), "RGB", syntax, [stream]))


def test_jpeg_of_12_bits_is_refused_by_name() -> None:
    with pytest.raises(ImageError, match=r"found JPEG Extended .* of 12 bits a sample"):
        load_image(shipped("JPGExtended.dcm"))


def test_what_inflates_beyond_any_photograph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mdf_sdk import dicom

    zeros = np.zeros((3000, 3000, 3), np.uint8)
    data = ophthalmic(zeros, syntax=uid.DeflatedExplicitVRLittleEndian)
    assert len(data) < zeros.nbytes // 500
    monkeypatch.setattr(dicom, "MAX_FILE_BYTES", 1_000_000)
    with pytest.raises(ImageError, match="broken DICOM file"):
        load_image(data)


SEEDS = (
    "SC_rgb_rle.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "SC_rgb_gdcm_KY.dcm",
    "MR_small_bigendian.dcm",
    "image_dfl.dcm",
    "test-SR.dcm",
)


@given(
    name=st.sampled_from(SEEDS),
    at=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    length=st.integers(0, 20),
    frame=st.sampled_from([None, 0, 1]),
)
@settings(deadline=None, max_examples=200)
def test_a_damaged_file_gives_a_picture_or_an_image_error(
    name: str, at: float, value: int, length: int, frame: int | None
) -> None:
    data = bytearray(shipped(name).read_bytes())
    start = 132 + int(at * (len(data) - 132))
    data[start : start + length] = bytes([value])
    try:
        picture = load_image(bytes(data), frame)
    except ImageError:
        return
    assert (picture.dtype, picture.shape[2]) == (np.uint8, 3)

"""A DICOM file in, one of its frames as an 8-bit gray or RGB image out (extra `dicom`).

Reads only the elements that describe pixels: nothing that names a patient is parsed or printed.
"""

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import get_frame
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut

from mdf_sdk.errors import ImageError, MDFError
from mdf_sdk.extras import import_extra
from mdf_sdk.photograph import MAX_FILE_BYTES, check_frame, check_size

Values = npt.NDArray[Any]  # (rows, columns) or (rows, columns, 3), integers

# Which of pydicom's plugins decodes; named, so that what else is installed changes no pixel.
_PLUGINS = {
    uid.ImplicitVRLittleEndian: "",
    uid.ExplicitVRLittleEndian: "",
    uid.DeflatedExplicitVRLittleEndian: "",
    uid.ExplicitVRBigEndian: "",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "pillow",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pillow",
    uid.JPEG2000: "pillow",
}
_JPEG_LOSSLESS = (uid.JPEGLossless, uid.JPEGLosslessSV1)
_EXPECTED_SYNTAX = (
    "expected uncompressed, deflated, RLE, JPEG-LS, JPEG or JPEG Lossless of 8 bits, or JPEG 2000 "
    "of 8 bits or gray. Decompress the file first (dcmdjpeg, gdcmconv --raw), or export the "
    "photograph as JPEG or PNG"
)
_GRAY = ("MONOCHROME1", "MONOCHROME2")
_YBR = ("YBR_FULL", "YBR_FULL_422")
_PHOTOMETRIC = (*_GRAY, "PALETTE COLOR", "RGB", *_YBR, "YBR_ICT", "YBR_RCT")
_LUTS = [
    f"{color}PaletteColorLookupTable{part}"
    for color in ("Red", "Green", "Blue")
    for part in ("Descriptor", "Data")
]
_TAGS: list[str] = [
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "ICCProfile",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelData",
    *_LUTS,
]


def read_frame(data: bytes, name: str, frame: int | None) -> Image.Image:
    """Decode one frame of a DICOM file.

    Gray is windowed (rescale, then the first window) where the file has a window, else scaled from
    the whole range of its stored bits. The caller converts the colors by `info["icc_profile"]`.

    Args:
        data: the file, with "DICM" at byte 128.
        name: what an error calls it.
        frame: which one, from 0; None where the file must hold one alone.

    Returns:
        Mode L or RGB.

    Raises:
        ImageError: it holds no picture, several without a choice, or one that cannot be used.
        MissingExtraError: a decoder is not installed.
    """
    try:
        dataset = dcmread(io.BytesIO(_inflate(data)), specific_tags=_TAGS)
        _check_picture(dataset, name)
        frames = int(dataset.get("NumberOfFrames") or 1)
        index = check_frame(frame, frames, name)
        values, photometric = _decode(dataset, index, frames, name)
        image = _to_image(values, dataset, photometric, name)
    except MDFError:
        raise
    except Exception:  # pydicom and its decoders raise many types; some quote an element's value
        raise ImageError(
            f"{name}: found a broken DICOM file, expected a whole one. Export it again"
        ) from None
    if profile := dataset.get("ICCProfile"):
        image.info["icc_profile"] = bytes(profile)
    return image


def _inflate(data: bytes) -> bytes:
    """Undo the Deflated transfer syntax, which pydicom would inflate without a limit."""
    deflated = uid.DeflatedExplicitVRLittleEndian.encode()
    match = re.match(rb"\x02\0\0\0UL\x04\0(....)", data[132:144], re.DOTALL)
    end = 144 + int.from_bytes(match[1], "little") if match else 132
    # (0002,0010), the transfer syntax
    element = b"\x02\0\x10\0UI" + len(deflated).to_bytes(2, "little")
    head = data[:end]
    if element + deflated not in head:
        return data
    body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[end:], MAX_FILE_BYTES)
    plain = uid.ExplicitVRLittleEndian.encode().ljust(len(deflated), b"\0")
    return head.replace(element + deflated, element + plain) + body


def _check_picture(dataset: Dataset, name: str) -> None:
    """Refuse what holds no picture or one that cannot be used, before any of it is decoded."""
    if "PixelData" not in dataset or not dataset.get("Rows"):
        kind = _known_name(dataset.file_meta.get("MediaStorageSOPClassUID"))
        raise ImageError(
            f"{name}: found a DICOM file without a picture ({kind}), expected a photograph"
        )
    check_size(int(dataset.Columns), int(dataset.Rows), name)
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    samples, bits = int(dataset.SamplesPerPixel), int(dataset.BitsAllocated)
    if photometric not in _PHOTOMETRIC:
        raise ImageError(
            f"{name}: found an unknown photometric interpretation, expected one of "
            f"{', '.join(_PHOTOMETRIC)}"
        )
    gray = photometric in (*_GRAY, "PALETTE COLOR")
    if samples != (1 if gray else 3) or bits not in (1, 8, 16):
        raise ImageError(
            f"{name}: found {samples} samples of {bits} bits, expected 1 sample of a gray or "
            "palette picture or 3 of a color one, of at most 16 bits"
        )
    if int(dataset.get("HighBit", dataset.BitsStored - 1)) != dataset.BitsStored - 1:
        raise ImageError(
            f"{name}: found pixels that are shifted within their bytes, expected HighBit to be "
            "BitsStored - 1"
        )
    if "ModalityLUTSequence" in dataset or "VOILUTSequence" in dataset:
        raise ImageError(
            f"{name}: found a lookup table for gray values, expected a window, or stored values "
            "alone. Export the photograph as JPEG or PNG"
        )


def _decode(dataset: Dataset, index: int, frames: int, name: str) -> tuple[Values, str]:
    """Decode the pixels of one frame, as stored; also the photometric interpretation they have."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    photometric = str(dataset.PhotometricInterpretation)
    shape = (int(dataset.Rows), int(dataset.Columns))
    if syntax not in (*_PLUGINS, *_JPEG_LOSSLESS, uid.RLELossless):
        raise ImageError(
            f"{name}: found the transfer syntax {_known_name(syntax)}, {_EXPECTED_SYNTAX}"
        )
    if syntax.is_compressed and syntax != uid.DeflatedExplicitVRLittleEndian:
        offsets = None
        if "ExtendedOffsetTable" in dataset:
            offsets = dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
        stream = get_frame(
            dataset.PixelData, index, number_of_frames=frames, extended_offsets=offsets
        )
        if syntax == uid.RLELossless:
            return _decode_rle(stream, dataset), photometric
        # Decoders believe the stream: what it says of its size is checked before one sees it.
        rows, columns, bits = _read_stream_header(stream)
        if (rows, columns) != shape:
            raise ImageError(
                f"{name}: found {columns} x {rows} px in a frame of {shape[1]} x {shape[0]} px, "
                "expected as many. Export it again"
            )
        gray_2000 = syntax in uid.JPEG2000TransferSyntaxes and dataset.SamplesPerPixel == 1
        if bits > 8 and not gray_2000 and syntax not in uid.JPEGLSTransferSyntaxes:
            raise ImageError(
                f"{name}: found {syntax.name} of {bits} bits a sample, {_EXPECTED_SYNTAX}"
            )
        if syntax in _JPEG_LOSSLESS:
            return _decode_jpeg_lossless(stream), photometric
        if syntax in uid.JPEGLSTransferSyntaxes:
            import_extra("jpeg_ls", "dicom")
    values, description = get_decoder(syntax).as_array(
        dataset, index=index, raw=True, decoding_plugin=_PLUGINS[syntax]
    )
    return values, str(description["photometric_interpretation"])


def _read_stream_header(stream: bytes) -> tuple[int, int, int]:
    """Read rows, columns and bits a sample off a JPEG, JPEG-LS or JPEG 2000 stream."""
    if stream.startswith(b"\xff\x4f\xff\x51"):  # JPEG 2000, without a file format around it
        right, bottom, left, top = struct.unpack(">4I", stream[8:24])
        return bottom - top, right - left, (stream[42] & 0x7F) + 1
    at = 2 if stream.startswith(b"\xff\xd8") else len(stream)
    while stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits, rows, columns = struct.unpack(">BHH", stream[at + 4 : at + 9])
            return rows, columns, bits
        # 0xFF may fill the space before a marker.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    raise ValueError("no frame header")


def _decode_jpeg_lossless(stream: bytes) -> Values:
    """Decode with Pillow's libjpeg-turbo 3. Lossless samples are never converted to RGB."""
    image = Image.open(io.BytesIO(stream), formats=("JPEG",))
    try:
        return np.asarray(image)
    except OSError:  # a stream that calls itself YCbCr is given as such alone
        image = Image.open(io.BytesIO(stream), formats=("JPEG",))
        image.draft("YCbCr", image.size)
        return np.asarray(image)


def _decode_rle(stream: bytes, dataset: Dataset) -> Values:
    """Decode RLE Lossless (PS3.5, annex G); never makes more bytes than the picture has."""
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel)
    sample_bytes = int(dataset.BitsAllocated) // 8
    count, *offsets = struct.unpack("<16I", stream[:64])
    if not 0 < count == samples * sample_bytes:
        raise ValueError("another number of segments")
    ends = [*offsets[1:count], len(stream)]
    planes: list[Values] = [
        np.frombuffer(_unpack_bits(stream[start:end], rows * columns), np.uint8)
        for start, end in zip(offsets, ends, strict=False)
    ]
    if sample_bytes == 2:  # the upper bytes first
        pairs = zip(planes[::2], planes[1::2], strict=True)
        joined = [(high.astype(np.uint16) << 8 | low) for high, low in pairs]
        shift = 16 - int(dataset.BitsStored)
        kind = np.int16 if dataset.PixelRepresentation else np.uint16
        planes = [(plane << shift).view(kind) >> shift for plane in joined]
    shape = (rows, columns) if samples == 1 else (rows, columns, samples)
    return np.stack(planes, axis=-1).reshape(shape)


def _unpack_bits(segment: bytes, size: int) -> bytes:
    out, at = bytearray(), 0
    while len(out) < size:
        code = segment[at]
        if code < 128:
            out += segment[at + 1 : at + 2 + code]
            at += 2 + code
        else:  # 128 says nothing
            out += segment[at + 1 : at + 2] * (257 - code if code > 128 else 0)
            at += 2 if code > 128 else 1
    return bytes(out[:size])


def _to_image(values: Values, dataset: Dataset, photometric: str, name: str) -> Image.Image:
    shape = (int(dataset.Rows), int(dataset.Columns))
    stored, signed = int(dataset.BitsStored), bool(dataset.get("PixelRepresentation", 0))
    if photometric in _GRAY:
        gray = _window(dataset, stored, signed, name)
        low = -(1 << stored - 1) if signed else 0
        at = np.clip(values.astype(np.int32) - low, 0, len(gray) - 1)
        return Image.fromarray((255 - gray if photometric == "MONOCHROME1" else gray)[at])
    if photometric == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
        stored = int(dataset.RedPaletteColorLookupTableDescriptor[2])
        stored = 8 if values.max() < 256 else stored  # many say 16 bits and hold 8
    if values.shape != (*shape, 3) or signed or not 8 <= stored <= 16:
        raise ValueError("no color picture")
    if photometric == "RGB" or photometric == "PALETTE COLOR":
        return Image.fromarray((values >> (stored - 8)).astype(np.uint8))
    if photometric not in _YBR or stored != 8:
        raise ValueError("colors that no decoder converted")
    values = np.ascontiguousarray(values, np.uint8)
    return Image.frombytes("YCbCr", shape[::-1], values.tobytes()).convert("RGB")


def _window(dataset: Dataset, stored: int, signed: bool, name: str) -> npt.NDArray[np.uint8]:
    """The gray level of every stored value, from the lowest (PS3.3, C.11.1 and C.11.2)."""
    low = -(1 << stored - 1) if signed else 0
    slope = float(dataset.get("RescaleSlope") or 1)
    x = np.arange(low, low + (1 << stored)) * slope + float(dataset.get("RescaleIntercept") or 0)
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if dataset.get("WindowCenter") is None or not dataset.get("WindowWidth"):
        y = (x - x.min()) / np.ptp(x)
    else:
        center, width = _first(dataset.WindowCenter), _first(dataset.WindowWidth)
        if function == "SIGMOID":
            y = 1 / (1 + np.exp(-4 * (x - center) / width))
        elif function == "LINEAR_EXACT":
            y = (x - center) / width + 0.5
        else:
            y = (x - (center - 0.5)) / max(width - 1, 1e-6) + 0.5
    if not np.isfinite(y).all():
        raise ImageError(f"{name}: found a window without finite numbers, expected some")
    gray: npt.NDArray[np.uint8] = (255 * np.clip(y, 0, 1)).round().astype(np.uint8)
    return gray


def _first(value: Any) -> float:
    """The first of one or several windows."""
    return float(value[0] if isinstance(value, MultiValue) else value)


def _known_name(code: uid.UID | None) -> str:
    """The standard's name of a UID; what else stands there is not shown."""
    return code.name if code and code.name != code else "of an unknown kind"

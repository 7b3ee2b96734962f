"""A photograph as clinics have it in, RGB pixels out: upright, sRGB, checked before it is decoded.

Training and the runtime both go through this module, so that they see the same pixels.
"""

import functools
import hashlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageOps

from mdf_sdk.errors import ImageError, MDFError
from mdf_sdk.extras import import_extra
from mdf_sdk.manifest import ImageSpec
from mdf_sdk.preprocessing import (
    THUMBNAIL_PX,
    Picture,
    Pixels,
    Square,
    Thumbnail,
    empty_pixels,
    square_pixels,
)

ImageSource = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
MIN_SIDE_PX = 32
MAX_SIDE_PX = 9000  # a square of it, the most that padding can make, is below Pillow's own limit
MAX_PIXELS = 52_000_000  # the largest camera back of a fundus camera has 8688 x 5792
MAX_FILE_BYTES = 200_000_000
_MAX_FRAMES = 1000  # Pillow follows the pages of a TIFF one by one
# What cameras and archives write; Pillow's other readers (one starts Ghostscript) are never tried.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "JPEG2000", "PPM")
_EXPECTED = "expected a whole picture (JPEG, PNG, TIFF, BMP, WebP, JPEG 2000, PPM or DICOM)"
_EXPECTED_SIZE = (
    f"{MIN_SIDE_PX} to {MAX_SIDE_PX} px on each side"
    f" and at most {MAX_PIXELS // 10**6} million in all"
)
# Of 255, from the 1st to the 99th percentile of brightness: the flattest of 1,458 photographs of
# public sets has 42. A closed shutter's noise and a small caption stay below it.
_LEAST_CONTRAST = 8
_12_BITS = 0xFFF
_TURNED = range(5, 9)  # EXIF orientations in which width and height change places
_PHOTOMETRIC = ExifTags.Base.PhotometricInterpretation  # 0 in a TIFF: white is 0


@dataclass(frozen=True)
class Photograph:
    """A decoded photograph.

    Attributes:
        image: RGB, upright.
        scale: the photograph's pixels per side of one of `image`; not 1 only for a JPEG that was
            asked for smaller.
        size: width and height of the photograph itself, upright.
    """

    image: Image.Image
    scale: int
    size: tuple[int, int]

    @property
    def picture(self) -> Picture:
        """uint8 (H, W, 3), read-only."""
        return np.asarray(self.image)

    @functools.cached_property
    def thumbnail(self) -> Thumbnail:
        """The image's brightness, thinned out."""
        return Thumbnail.of_image(self.image)

    @functools.cached_property
    def square(self) -> Square:
        """The part that is classified, in pixels of `image`."""
        return self.thumbnail.square


@dataclass(frozen=True)
class Source:
    """A photograph as passed: read, but a file not yet decoded.

    Attributes:
        data: content of a picture file, or uint8 (H, W, 3) RGB.
        name: what an error calls it.
        key: digest of the content and of `frame`.
        frame: which picture of the file, from 0; None where it must hold one alone.
    """

    data: bytes | Picture
    name: str
    key: bytes
    frame: int | None = None


def read_source(source: ImageSource, frame: int | None = None) -> Source:
    """Read a path, bytes, a PIL image or an array; checks all but what only decoding can show.

    Raises:
        ImageError: no such file, a wrong type, shape or dtype.
    """
    if frame is not None and (type(frame) is not int or frame < 0):
        raise ImageError(f"frame: found {frame!r}, expected None, or 0 or more")
    name = "image"
    if isinstance(source, str | os.PathLike):
        name, source = f"image {os.fspath(source)!r}", _read_file(Path(source))
    if isinstance(source, bytes):
        return Source(source, name, _digest(source, frame), frame)
    if frame is not None:
        raise ImageError(
            f"frame: found {frame} with a decoded image, expected None. Only files have frames"
        )
    if isinstance(source, Image.Image):
        check_size(*source.size, name)
        picture = np.asarray(_to_rgb(source, name))
    elif isinstance(source, np.ndarray):
        picture = _check_array(source)
    else:
        raise ImageError(
            f"image: found {type(source).__name__}, "
            "expected a path, bytes, a PIL image or a numpy array"
        )
    return Source(picture, name, _digest(picture.data, picture.shape))


def decode(source: Source, least_px: int | None = None) -> Photograph:
    """Decode what `read_source` read.

    Args:
        least_px: how many pixels a side its square is wanted to have; None for all there are. A
            JPEG that has twice, four or eight times as many is decoded to a half, a quarter or an
            eighth of its sides.

    Raises:
        ImageError: not a picture, broken, too small or too large, several without a choice, or
            nothing is to be seen on it.
    """
    photograph = _decode(source, least_px)
    dark, bright = photograph.thumbnail.percentiles(1, 99)
    if bright - dark < _LEAST_CONTRAST:
        raise ImageError(
            f"{source.name}: found brightness from {dark:.0f} to {bright:.0f} of 255 and nothing "
            "to see, expected a photograph of a retina. Take it again"
        )
    return photograph


def load_image(source: ImageSource, frame: int | None = None) -> Picture:
    """Read and decode a photograph: uint8 (H, W, 3), sRGB, upright by its EXIF orientation.

    Transparency becomes black. An ICC profile is converted to sRGB, relative colorimetric with
    black point compensation; one that is broken counts as none. 16-bit gray is scaled to 8 bits:
    from 12 where no value is above 4095, as cameras with 12 bits write it, else from 16. DICOM
    needs the `dicom` extra.

    Args:
        source: a path, the bytes of a picture file, a PIL image (as it stands, whatever its
            file holds beside), or uint8 (H, W, 3) RGB or (H, W) gray.
        frame: which picture, from 0, of a multi-frame DICOM, multi-page TIFF or animated file.

    Raises:
        ImageError: it cannot be used; says why.
        MissingExtraError: a DICOM file, and pydicom is not installed.
    """
    return np.array(_decode(read_source(source, frame)).image)


def load_photograph(source: ImageSource, least_px: int | None = None) -> Photograph:
    """Read and decode a photograph as MDFClassifier does, flat or not.

    Args:
        source: as for `load_image`.
        least_px: as for `decode`.

    Raises:
        ImageError, MissingExtraError: as `load_image`.
    """
    return _decode(read_source(source), least_px)


def prepare(
    photograph: Photograph, spec: ImageSpec, empty: Callable[[int], Pixels] = empty_pixels
) -> tuple[Pixels, Pixels]:
    """Square, resize and normalize, as `square_pixels`; returns what `to_pixels` does."""
    return square_pixels(photograph.image, photograph.square, spec, empty)


def check_size(width: int, height: int, name: str) -> None:
    """Refuse a size, which a file's header tells before anything is decoded."""
    sides = (width, height)
    if min(sides) < MIN_SIDE_PX or max(sides) > MAX_SIDE_PX or width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: found {width} x {height} px, expected {_EXPECTED_SIZE}. "
            "Pass the camera's original photograph"
        )


def check_frame(frame: int | None, frames: int, name: str) -> int:
    """Return the chosen frame of a file that holds `frames` of them."""
    if frame is None and frames > 1:
        raise ImageError(
            f"{name}: found {frames} pictures in one file, expected one. Choose it: "
            "load_image(file, frame=0), or mdf predict --frame 0"
        )
    if frame is not None and frame >= frames:
        raise ImageError(f"{name}: found {frames} pictures and frame {frame}, expected one of them")
    return frame or 0


def _digest(content: bytes | memoryview, *more: object) -> bytes:
    digest = hashlib.sha256(repr(more).encode())
    digest.update(content)
    return digest.digest()


def _read_file(path: Path) -> bytes:
    name = f"image {str(path)!r}"
    try:
        if path.is_dir():
            raise ImageError(f"{name}: found a directory, {_EXPECTED}")
        if not path.is_file():
            raise ImageError(f"{name}: found no such file, {_EXPECTED}. Check the path")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(
                f"{name}: found {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}"
            )
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{name}: could not be read ({error.strerror}), {_EXPECTED}") from error


def _check_array(array: npt.NDArray[Any]) -> Picture:
    expected = "expected uint8 of shape (H, W, 3), RGB, or (H, W), gray"
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ImageError(f"image: found NaN in a {array.dtype} array, {expected}")
    if array.dtype != np.uint8:
        cure = "Values in [0, 1] convert with (array * 255).round().astype(numpy.uint8)"
        raise ImageError(f"image: found dtype {array.dtype}, {expected}. {cure}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(f"image: found shape {array.shape}, {expected}")
    check_size(array.shape[1], array.shape[0], "image")
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=2)
    return np.ascontiguousarray(array)


def _decode(source: Source, least_px: int | None = None) -> Photograph:
    data, name = source.data, source.name
    if not isinstance(data, bytes):
        image = Image.fromarray(data)
        return Photograph(image, 1, image.size)
    if not data:
        raise ImageError(f"{name}: found no bytes, {_EXPECTED}")
    if data[128:132] == b"DICM":
        dicom = import_extra("mdf_sdk.dicom", "dicom")
        with no_warnings:
            image = _to_rgb(dicom.read_frame(data, name, source.frame), name)
        return Photograph(image, 1, image.size)
    least_px = max(least_px, THUMBNAIL_PX) if least_px else MAX_SIDE_PX
    scale = 8
    while True:
        with (
            _pillow_errors(name),
            Image.open(io.BytesIO(data), formats=FORMATS) as file,
        ):
            file.seek(check_frame(source.frame, _count_frames(file), name))
            check_size(*file.size, name)  # before anything is decoded
            size, scale = file.size, _shrink(file, scale, least_px)
            image = _to_rgb(file, name)
            if file.getexif().get(ExifTags.Base.Orientation) in _TURNED:
                size = size[::-1]
            photograph = Photograph(image, scale, size)
        if scale == 1 or photograph.square.side >= least_px:
            return photograph
        scale //= 2


def _shrink(image: Image.Image, most: int, least_px: int) -> int:
    """Let a JPEG's decoder leave out what would be averaged away; return by how much it shrinks.

    A cosine transform of fewer coefficients is a picture of 1/2, 1/4 or 1/8 of the sides.
    """
    scale = most if image.format in ("JPEG", "MPO") else 1
    while scale > 1 and min(image.size) < scale * least_px:
        scale //= 2
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    return scale


def _count_frames(image: Image.Image) -> int:
    if image.format == "MPO":  # previews and gain maps beside a JPEG, no other pictures
        return 1
    if image.format != "TIFF":
        return getattr(image, "n_frames", 1)
    for count in range(1, _MAX_FRAMES):
        try:
            image.seek(count)
        except EOFError:
            return count
    return _MAX_FRAMES


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert to sRGB, upright, black where transparent."""
    with _pillow_errors(name):
        # Of 16 bits of color Pillow keeps the upper 8.
        deep_color = not image.mode.startswith("I") and ";16" in str(getattr(image, "tile", ""))
        white_is_0 = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        profile = image.info.get("icc_profile")
        if image.mode == "F":
            raise ImageError(
                f"{name}: found floating-point pixels, expected 8 or 16 bits a channel"
            )
        if image.mode.startswith("I"):
            # of which Pillow inverts those of 8 bits alone
            image = _to_8_bits(image, name, white_is_0)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        image = _to_srgb(image, profile)
        image.load()
        if deep_color and np.asarray(image).max() <= _12_BITS >> 8:
            raise ImageError(
                f"{name}: found 12 bits or less in a color file of 16, of which only 4 can be "
                "read, expected the whole range. Save it with 8 bits a channel"
            )
        return image


def _to_8_bits(image: Image.Image, name: str, white_is_0: bool) -> Image.Image:
    gray = np.asarray(image)
    if gray.min() < 0 or gray.max() > 0xFFFF:
        raise ImageError(f"{name}: found 32-bit pixels, expected 8 or 16 bits a channel")
    gray = (gray >> (4 if gray.max() <= _12_BITS else 8)).astype(np.uint8)
    return Image.fromarray(255 - gray if white_is_0 else gray)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "LAB":
        return _convert_profile(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if not ImageCms.getProfileDescription(own).startswith("sRGB"):
                image = _convert_profile(image, own)
        except (ImageCms.PyCMSError, OSError):
            pass  # broken, or of another kind of pixels: every viewer leaves it out
    return image if image.mode == "RGB" else image.convert("RGB")


def _convert_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    transform = ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        image.mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return transform.apply(image)


class _NoWarnings:
    """Ignores warnings, for threads: `catch_warnings` changes the whole process.

    Of calls that overlap, the first saves the filters and the last restores them.
    """

    def __init__(self) -> None:
        self._lock, self._calls = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._calls == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._filters.__exit__(None, None, None)


no_warnings = _NoWarnings()


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Map whatever Pillow raises to ImageError: on broken files its readers raise a dozen types."""
    try:
        with no_warnings:
            yield
    except MDFError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: found a picture too large to decode, expected {_EXPECTED_SIZE}"
        ) from error
    except Exception as error:
        raise ImageError(f"{name}: found no picture or a broken one, {_EXPECTED}") from error

"""A photograph and its prediction in, one picture out: with mask and evidence map beside it."""

import os
from dataclasses import astuple
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mdf_sdk.errors import ImageError, InputError
from mdf_sdk.photograph import ImageSource, load_image
from mdf_sdk.prediction import Prediction
from mdf_sdk.preprocessing import Picture, crop_square, find_square

_PANEL_PX = 512
_MARGIN_PX = 24
_HEADER_PX = 96
_CAPTION_PX = 40
_FOOTER_PX = 64
_BACKGROUND = (16, 18, 22)
_TEXT = (240, 240, 240)
_DIM_TEXT = (165, 170, 178)
_WARNING = (255, 190, 70)
# Okabe and Ito's palette: told apart by color-blind readers too, and seldom a retina's own color.
_MASK_COLORS = ((86, 180, 233), (240, 228, 66), (0, 200, 140), (204, 121, 167), (230, 230, 230))
_FOR, _AGAINST = (255, 70, 30), (40, 120, 255)
_FULL_COLOR = 0.5  # nats: where every cell moves the log-odds less than this, all stay faint
_SAME_SQUARE = 0.03  # of its side
_SUFFIXES = (".png", ".jpg", ".jpeg")


def check_picture_path(path: str | os.PathLike[str], image: ImageSource) -> None:
    """Check that a picture can be written there, before the work that it is to show.

    Raises:
        InputError: another suffix than .png or .jpg, no such folder, or the photograph itself.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"picture {str(target)!r}: found suffix {target.suffix!r}, expected .png or .jpg"
        )
    photograph = Path(image) if isinstance(image, str | os.PathLike) else None
    if photograph and photograph.exists() and target.exists() and target.samefile(photograph):
        raise InputError(
            f"picture {str(target)!r}: found the photograph itself there, expected another name"
        )
    if not target.parent.is_dir() or target.is_dir():
        raise InputError(
            f"picture {str(target)!r}: expected a file name in a folder that exists. Make the "
            "folder first"
        )


def save_picture(path: str | os.PathLike[str], image: ImageSource, prediction: Prediction) -> None:
    """Draw the squared photograph, and beside it the mask and evidence map that were asked for.

    Args:
        path: .png or .jpg; a file there is replaced.
        image: the photograph that the prediction is about. One whose field of view lies elsewhere
            is refused; another that happens to fill the same square is not noticed.

    Raises:
        ImageError: the photograph cannot be used, or is another.
        InputError: nothing can be written to the path.
    """
    check_picture_path(path, image)
    photograph = load_image(image)
    found, square = find_square(photograph), prediction.square
    # A few pixels of difference: a JPEG may have been decoded smaller for the prediction.
    pairs = zip(astuple(found), astuple(square), strict=True)
    if max(abs(a - b) for a, b in pairs) > _SAME_SQUARE * square.side:
        raise ImageError(
            f"image: found its field of view at {found}, expected {square} as in the "
            "prediction. Pass the photograph that was predicted"
        )
    squared: Picture = crop_square(photograph, square, _PANEL_PX)
    panels = [("Photograph", squared)]
    if prediction.mask is not None:
        panels.append(("Mask", _draw_mask(squared, prediction.mask)))
    if prediction.evidence is not None:
        panels.append(
            (f"Evidence for {prediction.label}", _draw_evidence(squared, prediction.evidence))
        )

    width = len(panels) * (_PANEL_PX + _MARGIN_PX) + _MARGIN_PX
    canvas = Image.new(
        "RGB", (width, _HEADER_PX + _CAPTION_PX + _PANEL_PX + _FOOTER_PX), _BACKGROUND
    )
    draw = ImageDraw.Draw(canvas)
    _draw_header(draw, prediction)
    for i, (caption, picture) in enumerate(panels):
        left, top = _MARGIN_PX + i * (_PANEL_PX + _MARGIN_PX), _HEADER_PX
        draw.text((left, top + _CAPTION_PX // 2), caption, _TEXT, _font(20), anchor="lm")
        canvas.paste(Image.fromarray(picture), (left, top + _CAPTION_PX))
        legend_at = (left, top + _CAPTION_PX + _PANEL_PX + 18)
        if caption == "Mask" and prediction.mask is not None:
            _draw_legend(draw, legend_at, dict(zip(prediction.mask, _MASK_COLORS, strict=False)))
        elif prediction.evidence is not None and picture is not squared:
            most, least = prediction.evidence.max(), prediction.evidence.min()
            sides = {
                f"for it, up to {most:+.1f} nats": _FOR,
                f"against it, to {least:+.1f}": _AGAINST,
            }
            _draw_legend(draw, legend_at, sides)
    if prediction.notice:
        at = (_MARGIN_PX, canvas.height - 16)
        draw.text(at, prediction.notice, _WARNING, _font(16), anchor="lm")

    target = Path(path)
    unfinished = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        canvas.save(unfinished)
        unfinished.replace(target)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(
            f"picture {str(target)!r}: could not be written ({error.strerror}), expected a "
            "writable folder"
        ) from error


def _draw_header(draw: ImageDraw.ImageDraw, prediction: Prediction) -> None:
    title = f"{prediction.label}  {prediction.probability:.1%}"
    draw.text((_MARGIN_PX, 34), title, _TEXT, _font(34), anchor="lm")
    others = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:4]
    line = "   ".join(f"{label} {probability:.3f}" for label, probability in others)
    engine = prediction.engine
    line += (
        f"   |   {engine.model} {engine.precision}   |   {prediction.latency_ms['total']:.0f} ms"
    )
    draw.text((_MARGIN_PX, 72), line, _DIM_TEXT, _font(15), anchor="lm")


def _draw_legend(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], colors: dict[str, tuple[int, int, int]]
) -> None:
    left, middle = at
    for name, color in colors.items():
        draw.rectangle((left, middle - 7, left + 14, middle + 7), fill=color)
        draw.text((left + 22, middle), name, _TEXT, _font(15), anchor="lm")
        left += 22 + int(draw.textlength(name, _font(15))) + 24


def _draw_mask(squared: Picture, mask: dict[str, npt.NDArray[np.float32]]) -> Picture:
    picture = squared.astype(np.float32)
    # Large areas first, so that a small lesion is not hidden under them.
    kinds = sorted(zip(mask.values(), _MASK_COLORS, strict=False), key=lambda pair: -pair[0].mean())
    for values, color in kinds:
        share = 0.65 * (_to_panel(values) > 0.5)[:, :, None]
        picture = picture * (1 - share) + np.asarray(color) * share
    return picture.round().astype(np.uint8)


def _draw_evidence(squared: Picture, evidence: npt.NDArray[np.float32]) -> Picture:
    strength = _to_panel(evidence / max(float(np.abs(evidence).max()), _FULL_COLOR))[:, :, None]
    gray = np.repeat(squared.mean(axis=2, keepdims=True), 3, axis=2)
    color = np.where(strength > 0, np.asarray(_FOR), np.asarray(_AGAINST))
    share = 0.75 * np.clip(np.abs(strength), 0, 1)
    return (gray * (1 - share) + color * share).round().astype(np.uint8)


def _to_panel(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((_PANEL_PX, _PANEL_PX), Image.Resampling.BICUBIC))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)

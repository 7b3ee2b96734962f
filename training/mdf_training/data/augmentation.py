"""A squared photograph and its masks in, the same eye as another camera would show it out.

Cameras differ in color, exposure, evenness of light, sharpness, compression, angle of view and the
shape of their field: a model that has learned one camera's fails on the next one's pictures.
"""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
GRAY_WEIGHTS = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Camera:
    """One other camera; lengths are shares of the square's side, so every size gets the same.

    Attributes:
        rotation: radians.
        zoom: above 1 enlarges the middle.
        shift: right and down.
        colors: float (3, 3), from RGB to RGB: hue and saturation.
        curves: uint8 (3, 256), each channel's new value: gain and gamma.
        light: uint8 (4, 4), a coarse picture of the illumination, 255 where it is full.
        field: height of the round field of view over its width, cut flat above and below; None
            where the picture fills its square.
        blur: by how much the resolution falls, 1 or more.
        jpeg_quality: None where nothing is compressed.
    """

    rotation: float
    zoom: float
    shift: tuple[float, float]
    colors: npt.NDArray[np.float64]
    curves: UInt8
    light: UInt8
    field: float | None
    blur: float
    jpeg_quality: int | None

    @classmethod
    def draw(cls, rng: np.random.Generator, strength: float) -> "Camera":
        """Draw a camera; `strength`, above 0 to 1, scales how far it may be from the original."""
        vary, one_in_two = rng.uniform, strength / 2
        # Brighter on average, as uneven light only takes away.
        gains = np.exp(strength * (vary(-0.1, 0.5) + vary(-0.2, 0.2, 3)))
        gamma = np.exp(strength * vary(-0.4, 0.4))
        values = 255 * gains[:, None] * np.linspace(0, 1, 256) ** gamma
        return cls(
            rotation=strength * vary(-0.3, 0.3),
            zoom=np.exp(strength * vary(-0.1, 0.35)),
            shift=tuple(strength * vary(-0.05, 0.05, 2)),
            colors=_colors(strength * vary(-0.25, 0.25), np.exp(strength * vary(-0.5, 0.4))),
            curves=values.clip(0, 255).round().astype(np.uint8),
            light=(255 * vary(1 - 0.5 * strength, 1, (4, 4))).astype(np.uint8),
            field=vary(0.75, 1) if rng.random() < one_in_two else None,
            blur=1 + 2 * strength * rng.random() if rng.random() < one_in_two else 1.0,
            jpeg_quality=int(vary(30, 90)) if rng.random() < one_in_two else None,
        )

    def photograph(self, picture: UInt8) -> UInt8:
        """Return a square picture, uint8 (S, S, 3), as this camera takes it."""
        side_px = len(picture)
        image = self._move(Image.fromarray(picture), Image.Resampling.BILINEAR)
        image = ImageChops.multiply(image, self._light(side_px))
        matrix = np.hstack([self.colors, np.zeros((3, 1))]).ravel().tolist()
        image = image.convert("RGB", matrix).point(self.curves.ravel().tolist())
        if self.blur > 1:
            small_px = round(side_px / self.blur)
            image = image.resize((small_px, small_px), Image.Resampling.BILINEAR)
            image = image.resize((side_px, side_px), Image.Resampling.BILINEAR)
        if self.jpeg_quality is not None:
            file = BytesIO()
            image.save(file, "JPEG", quality=self.jpeg_quality)
            image = Image.open(file)
        return np.array(image)

    def mask(self, mask: Bool) -> Bool:
        """Return a square mask, bool (S, S), of what `photograph` shows."""
        image = self._move(Image.fromarray(mask), Image.Resampling.NEAREST)
        moved: Bool = np.array(image)
        return moved if self.field is None else moved & (np.array(self._field(len(mask))) > 0)

    def _move(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Rotate, enlarge and shift; what comes from outside is black."""
        middle = image.width / 2
        cos, sin = np.cos(self.rotation) / self.zoom, np.sin(self.rotation) / self.zoom
        x, y = (middle + share * image.width for share in self.shift)
        # Where in the original each pixel comes from.
        back = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
        return image.transform(image.size, Image.Transform.AFFINE, back, resample)

    def _light(self, side_px: int) -> Image.Image:
        light = Image.fromarray(self.light).resize((side_px, side_px), Image.Resampling.BICUBIC)
        if self.field is not None:
            light = ImageChops.multiply(light, self._field(side_px))
        return Image.merge("RGB", [light] * 3)

    def _field(self, side_px: int) -> Image.Image:
        """White within the field of view: it touches the square, as `find_square` leaves it."""
        assert self.field is not None
        field = Image.new("L", (side_px, side_px))
        draw = ImageDraw.Draw(field)
        draw.ellipse((0, 0, side_px - 1, side_px - 1), fill=255)
        cut = round(side_px * (1 - self.field) / 2)
        if cut:
            draw.rectangle((0, 0, side_px, cut - 1), fill=0)
            draw.rectangle((0, side_px - cut, side_px, side_px), fill=0)
        return field


def _colors(hue: float, saturation: float) -> npt.NDArray[np.float64]:
    """The RGB matrix that turns hues by an angle in radians and scales the distance from gray."""
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    # Rodrigues' rotation about the gray axis.
    turn = np.cos(hue) * np.eye(3) + (1 - np.cos(hue)) / 3 + np.sin(hue) * axis
    gray = np.tile(GRAY_WEIGHTS, (3, 1))
    matrix: npt.NDArray[np.float64] = (gray + saturation * (np.eye(3) - gray)) @ turn
    return matrix

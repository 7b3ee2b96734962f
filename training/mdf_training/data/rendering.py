"""The procedural fundus photograph: the name of a sign and a random generator in, picture out.

A picture depends on its case through the name of the sign alone, so nothing else in it can tell
the classes apart.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE_PX = 192
MASK_KINDS = ("vessel", "lesion", "disc")

_FIELD_RADIUS_PX = 0.46 * SIZE_PX
# Shapes are drawn twice as large and averaged down, which smooths their edges.
_OVERSAMPLING = 2

Floats = NDArray[np.float32]
Points = NDArray[np.float64]
Window = tuple[slice, slice]
Color = tuple[float, float, float]

_YELLOW: Color = (238, 198, 92)
_ORANGE: Color = (206, 130, 62)
_PALE: Color = (236, 188, 136)
_BLACK: Color = (36, 26, 24)
_BLOOD: Color = (92, 16, 16)

_Y, _X = np.mgrid[:SIZE_PX, :SIZE_PX].astype(np.float32)


def render(
    sign: str, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.bool_]]]:
    """Render a round photograph of one eye that shows `sign`.

    Args:
        sign: a key of `SIGNS`.

    Returns:
        The picture, uint8 (192, 192, 3), RGB, 0 to 255, and its masks, kind -> bool (192, 192)
        for every kind of `MASK_KINDS`.
    """
    pale = sign in ("pale_disc", "spicules")
    eye = _Eye(rng, pale_disc=pale, vessel_width=0.6 if sign == "spicules" else 1)
    SIGNS[sign](eye, rng)
    return eye.develop()


class _Eye:
    """A right eye while it is painted; positions are (x, y) in px, the disc lies at the right."""

    def __init__(self, rng: np.random.Generator, pale_disc: bool, vessel_width: float) -> None:
        self.center = rng.normal((SIZE_PX - 1) / 2, 1.2, 2)
        self.disc = self.center + rng.normal((38, -2), (2, 3))
        self.fovea = self.disc + rng.normal((-58, 5), (1.5, 2))
        self.disc_radii = rng.uniform(11.5, 13.5) * np.array([1, rng.uniform(1.04, 1.14)])
        self.is_left = rng.random() < 0.5
        self.masks = {kind: np.zeros((SIZE_PX, SIZE_PX), bool) for kind in MASK_KINDS}
        self.rgb = _background(rng, self.fovea)  # float32 (192, 192, 3)
        self._paint_disc(rng, pale_disc)
        # What blood takes from red, green and blue; veins are darker and wider than arteries.
        for absorbed, width_px in (((0.30, 0.56, 0.46), 3.3), ((0.17, 0.46, 0.40), 2.4)):
            self._paint_vessels(rng, vessel_width * width_px, absorbed)

    def paint(
        self, color: Color, opacity: float, shapes: Sequence[Points], kind: str | None = "lesion"
    ) -> None:
        """Lay a color over polygons (N, 2) and enter them in the mask of `kind`."""
        window, cover = _cover(shapes)
        self.rgb[window] += (
            opacity * cover[..., None] * (np.array(color, np.float32) - self.rgb[window])
        )
        if kind:
            self.masks[kind][window] |= cover > 0.5

    def develop(self) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.bool_]]]:
        """Cut out the round field of view and turn the eye to its side (see `render`)."""
        distance = np.hypot(_X - np.float32(self.center[0]), _Y - np.float32(self.center[1]))
        field = np.clip(np.float32(_FIELD_RADIUS_PX) - distance, 0, 1)
        image = np.clip(self.rgb * field[..., None], 4, 255).astype(np.uint8)
        side = slice(None, None, -1 if self.is_left else 1)
        masks = {kind: (mask & (field > 0.5))[:, side] for kind, mask in self.masks.items()}
        return np.ascontiguousarray(image[:, side]), masks

    def _paint_disc(self, rng: np.random.Generator, pale: bool) -> None:
        rim: Color = (240, 206, 164) if pale else (234, 172, 108)
        cup: Color = (252, 236, 208) if pale else (252, 224, 172)
        share = rng.uniform(0.57, 0.67) if pale else rng.uniform(0.32, 0.44)
        middle = self.disc + rng.uniform((-1.5, -1), (0, 1))
        self.paint(_ORANGE, 0.5, [_ellipse(self.disc, self.disc_radii + 2)], kind=None)
        self.paint(rim, 0.9, [_ellipse(self.disc, self.disc_radii)], kind="disc")
        self.paint(cup, 0.8, [_ellipse(middle, share * self.disc_radii)], kind=None)

    def _paint_vessels(self, rng: np.random.Generator, width_px: float, absorbed: Color) -> None:
        window, cover = _cover(_vessel_tree(rng, self.disc, self.fovea, width_px))
        self.rgb[window] *= 1 - cover[..., None] * np.array(absorbed, np.float32)
        self.masks["vessel"][window] |= cover > 0.4


def _background(rng: np.random.Generator, fovea: Points) -> Floats:
    """Draw a fundus without disc and vessels: float32 (192, 192, 3), RGB, about 0 to 200."""
    tint = rng.normal((176, 88, 48), (9, 9, 7)).astype(np.float32)
    middle = np.float32((SIZE_PX - 1) / 2)
    slope = rng.normal(0, 0.0008, 2).astype(np.float32)
    falloff = np.float32(rng.uniform(1.5e-5, 3e-5))
    dx, dy = _X - middle, _Y - middle
    light = 1 + slope[0] * dx + slope[1] * dy - falloff * (dx * dx + dy * dy)
    squared = (_X - np.float32(fovea[0])) ** 2 + (_Y - np.float32(fovea[1])) ** 2
    light *= 1 - np.float32(rng.uniform(0.18, 0.28)) * np.exp(squared / np.float32(-2 * 12**2))
    grain = _grain()
    x, y = rng.integers(0, len(grain) - SIZE_PX, 2)
    # Every case mixes the grain's channels anew, so no color of a texture means anything.
    mix = rng.normal(np.eye(3) * 0.5, 0.5).astype(np.float32)
    texture: Floats = grain[y : y + SIZE_PX, x : x + SIZE_PX] @ mix
    texture += light[..., None] * tint
    return texture


@cache
def _grain() -> Floats:
    """Draw the noise that every case cuts its own from: float32 (448, 448, 3), mean about 0."""
    rng = np.random.default_rng(0)
    side = 448
    grain = np.zeros((side, side, 3), np.float32)
    for cell_px, deviation in ((1, 2.5), (4, 6.0), (8, 4.0), (28, 5.0)):
        cells = rng.normal(0, deviation, (side // cell_px, side // cell_px, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(cells[..., channel])
            grain[..., channel] += np.asarray(plane.resize((side, side), Image.Resampling.BICUBIC))
    return grain


def _vessel_tree(
    rng: np.random.Generator, disc: Points, fovea: Points, width_px: float
) -> list[Points]:
    """Grow four arcades with branches and twigs out of the disc, as polygons (N, 2)."""
    reach = fovea[0] - disc[0]
    # Bezier control points of the temporal and the nasal arcade, below the disc and above it.
    lower = np.array(
        [
            [(0, 0), (6, 44), (0.7 * reach, 68), (1.6 * reach, 34)],
            [(0, 0), (6, 20), (22, 32), (40, 64)],
        ]
    )
    control = np.concatenate([lower, lower * (1, -1)])
    control += rng.normal(0, 1, control.shape) * np.array([1, 4, 6, 9])[:, None]
    t = np.linspace(0, 1, 18)[:, None]
    bernstein = np.hstack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    curves = disc + bernstein @ control  # (4, 18, 2)
    phase = rng.uniform(0, 2 * np.pi, (len(curves), 1))
    curves[..., 1] += 1.5 * np.sin(phase + 12 * t[:, 0]) * t[:, 0]
    polygons = _tapered(curves, width_px, 0.4 * width_px)
    for children, length_px, share in ((4, 38, 0.5), (2, 22, 0.34)):
        curves = _branches(rng, curves, children, length_px)
        polygons += _tapered(curves, share * width_px, 0.6 * share * width_px)
    return polygons


def _branches(rng: np.random.Generator, parents: Points, children: int, length_px: float) -> Points:
    """Let curves leave every parent: (V, N, 2) -> (V * children, 9, 2)."""
    count, steps = parents.shape[:2]
    at = rng.integers(steps // 4, steps - 1, (count, children))
    parent = np.arange(count)[:, None]
    start = parents[parent, at].reshape(-1, 2)
    ahead = (parents[parent, at + 1] - parents[parent, at]).reshape(-1, 2)
    angle = np.arctan2(ahead[:, 1], ahead[:, 0])[:, None]
    bend = np.resize([1.0, -1.0], angle.shape) * rng.uniform(0.5, 1.0, angle.shape)
    t = np.linspace(0, 1, 9)
    heading = angle + bend * (1 - 0.8 * t)  # leaves at an angle, then turns along the parent
    step_px = rng.uniform(0.6, 1.3, angle.shape) * length_px / len(t)
    path = step_px[..., None] * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    curves: Points = start[:, None] + path.cumsum(axis=1) - path[:, :1]
    return curves


def _tapered(curves: Points, first_px: float, last_px: float) -> list[Points]:
    """Turn center lines (V, N, 2) into polygons whose width falls from first to last."""
    along = np.gradient(curves, axis=1)
    along /= np.linalg.norm(along, axis=-1, keepdims=True)
    offset = np.stack([-along[..., 1], along[..., 0]], axis=-1)
    offset *= np.linspace(first_px / 2, last_px / 2, curves.shape[1])[:, None]
    return list(np.concatenate([curves + offset, (curves - offset)[:, ::-1]], axis=1))


def _cover(shapes: Sequence[Points]) -> tuple[Window, Floats]:
    """Give the rows and columns that polygons (N, 2) touch, and their share of every pixel.

    Returns:
        The window and float32 (rows, columns), 0 to 1.
    """
    points = np.concatenate(shapes)
    low = np.clip(points.min(axis=0) - 1, 0, SIZE_PX - 1).astype(int)
    high = np.clip(points.max(axis=0) + 3, low + 1, SIZE_PX).astype(int)
    width, height = (_OVERSAMPLING * (high - low)).tolist()
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        draw.polygon((_OVERSAMPLING * (shape - low) + 0.5).ravel().tolist(), fill=255)
    cover = np.asarray(canvas.reduce(_OVERSAMPLING)).astype(np.float32) / np.float32(255)
    return (slice(low[1], high[1]), slice(low[0], high[0])), cover


_ROUND = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE: Points = np.stack([np.cos(_ROUND), np.sin(_ROUND)], axis=-1)


def _ellipse(center: Points, radii: Points | float) -> Points:
    outline: Points = center + radii * _CIRCLE
    return outline


def _blob(rng: np.random.Generator, center: Points, radius_px: float, wobble: float) -> Points:
    """Draw an irregular outline (24, 2): two waves run around a circle."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    radius = 1 + wobble * (np.sin(2 * _ROUND + phase[0]) + 0.6 * np.sin(5 * _ROUND + phase[1]))
    outline: Points = center + radius_px * radius[:, None] * _CIRCLE
    return outline


def _ring(
    rng: np.random.Generator, center: Points, count: int, inner_px: float, outer_px: float
) -> Points:
    """Scatter points (count, 2) evenly over a ring."""
    radius = np.sqrt(rng.uniform(inner_px**2, outer_px**2, count))
    angle = rng.uniform(0, 2 * np.pi, count)
    points: Points = center + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return points


def _off_disc(eye: _Eye, points: Points, margin_px: float) -> Points:
    distance = np.linalg.norm(points - eye.disc, axis=1)
    kept: Points = points[distance > eye.disc_radii[1] + margin_px]
    return kept


def _strokes(points: Points, angle: Points, length_px: Points, width_px: float) -> list[Points]:
    """Draw short lines from points (N, 2), as polygons (3, 2) that end in a tip."""
    along = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    across = width_px / 2 * np.stack([-along[:, 1], along[:, 0]], axis=-1)
    tip = points + length_px[:, None] * along
    return list(np.stack([points - across, points + across, tip], axis=1))


# Look-alikes: either class of a pair may show them.


def _spots(eye: _Eye, rng: np.random.Generator) -> None:
    """Yellow spots in the macula: drusen or flecks."""
    points = eye.fovea + rng.normal(0, 13, (rng.integers(20, 40), 2))
    points = _off_disc(eye, points, 4)
    eye.paint(_YELLOW, 0.75, [_ellipse(point, rng.uniform(1.3, 2.6)) for point in points])


def _yolk(eye: _Eye, rng: np.random.Generator) -> None:
    """One small evenly yellow disc at the fovea."""
    radius = rng.uniform(7.5, 11)
    eye.paint(_ORANGE, 0.5, [_ellipse(eye.fovea, radius + 2)], kind=None)
    eye.paint(_YELLOW, 0.85, [_ellipse(eye.fovea, radius)])


def _scars(eye: _Eye, rng: np.random.Generator) -> None:
    """Round pale scars with pigment far from the fovea: after laser or after degeneration."""
    points = _ring(rng, eye.center, int(rng.integers(24, 40)), 54, 80)
    points = _off_disc(eye, points, 8)
    radii = rng.uniform(3.2, 5, len(points))
    pairs = list(zip(points, radii, strict=True))
    eye.paint(_PALE, 0.6, [_blob(rng, point, radius, 0.1) for point, radius in pairs])
    eye.paint(_BLACK, 0.75, [_blob(rng, point, 0.5 * radius, 0.2) for point, radius in pairs])


def _pale_disc(eye: _Eye, rng: np.random.Generator) -> None:
    """A pale disc with a large cup, which `render` has painted already; no lesion."""


# Gross signs: they decide, and can be seen at 48 px.


def _exudates(eye: _Eye, rng: np.random.Generator) -> None:
    """Clusters of hard yellow exudates and dark red blots: diabetic retinopathy."""
    blots = _off_disc(eye, _ring(rng, eye.fovea, int(rng.integers(9, 14)), 14, 52), 8)
    eye.paint(_BLOOD, 0.85, [_blob(rng, point, rng.uniform(3, 6), 0.15) for point in blots])
    for cluster in _ring(rng, eye.fovea, int(rng.integers(3, 5)), 12, 34):
        points = cluster + rng.normal(0, 4.5, (rng.integers(8, 14), 2))
        eye.paint(
            _YELLOW, 0.95, [_blob(rng, point, rng.uniform(1.2, 2.4), 0.2) for point in points]
        )


def _atrophy(eye: _Eye, rng: np.random.Generator) -> None:
    """One large pale patch with a sharp border in the macula: late age-related degeneration."""
    outline = _blob(rng, eye.fovea, rng.uniform(19, 25), 0.12)
    eye.paint(_PALE, 0.8, [outline])
    # The large vessels below show through.
    start = eye.fovea + rng.normal(0, 5, (5, 2)) - (13, 0)
    deep = _strokes(start, rng.normal(0, 0.5, 5), rng.uniform(18, 26, 5), 2.4)
    eye.paint(_ORANGE, 0.7, deep, kind=None)


def _cupping(eye: _Eye, rng: np.random.Generator) -> None:
    """A cup almost as large as its disc, a dark wedge and a bleeding at the rim: glaucoma."""
    side = rng.choice([-1, 1])
    angle = np.pi + side * rng.uniform(0.7, 1.0) + np.array([-0.22, 0.22])
    rays = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    wedge = np.concatenate([eye.disc + 13 * rays, eye.disc + 62 * rays[::-1]])
    eye.paint((84, 34, 20), 0.55, [wedge])
    eye.paint((255, 246, 216), 0.95, [_ellipse(eye.disc, 0.85 * eye.disc_radii)], kind=None)
    at = eye.disc + eye.disc_radii * rays.mean(axis=0)
    eye.paint(_BLOOD, 0.95, [_blob(rng, at, 4, 0.2)])


def _spicules(eye: _Eye, rng: np.random.Generator) -> None:
    """Branching black pigment around the middle, thin vessels, pale disc: retinitis pigmentosa."""
    points = _off_disc(eye, _ring(rng, eye.center, int(rng.integers(70, 95)), 48, 82), 9)
    arms = np.repeat(points, 4, axis=0)
    strokes = _strokes(
        arms, rng.uniform(0, 2 * np.pi, len(arms)), rng.uniform(3, 7.5, len(arms)), 2.2
    )
    eye.paint(_BLACK, 0.9, strokes)


def _bulls_eye(eye: _Eye, rng: np.random.Generator) -> None:
    """Dark and pale rings around the fovea within a wreath of long flecks: Stargardt disease."""
    radius, flat = rng.uniform(13, 16), np.array([1, 0.85])
    eye.paint(_PALE, 0.75, [_ellipse(eye.fovea, radius * flat)])
    eye.paint((96, 40, 24), 0.9, [_ellipse(eye.fovea, 0.52 * radius * flat)])
    points = _off_disc(eye, _ring(rng, eye.fovea, int(rng.integers(45, 65)), radius + 7, 42), 5)
    angle = rng.uniform(0, 2 * np.pi, len(points))
    eye.paint(_YELLOW, 0.85, _strokes(points, angle, rng.uniform(5, 9, len(points)), 2.8))


def _layered_yolk(eye: _Eye, rng: np.random.Generator) -> None:
    """A large blister whose yellow content has sunk to a level: Best disease."""
    radius = rng.uniform(18, 23)
    outline = _ellipse(eye.fovea, radius)
    level = eye.fovea[1] + rng.uniform(-4, 4)
    sunk = np.maximum(outline, (-np.inf, level))
    eye.paint((120, 52, 24), 0.7, [_ellipse(eye.fovea, radius + 2)], kind=None)
    eye.paint(_ORANGE, 0.8, [outline])
    eye.paint(_YELLOW, 0.95, [sunk])


# Tiny signs: they decide, and are lost at 48 px.

_DOT_REACH_PX = 6


@cache
def _dot() -> Floats:
    """Give the contrast of a tiny dot: float32 (13, 13), sum 0, peak 1.

    A core of 3 px lies in a ring that makes up for it. As a ripple of period 5.2 px it is averaged
    away on the way from 192 px to 48 px, and mostly kept on the way to 128 px.
    """
    offset = np.arange(-_DOT_REACH_PX, _DOT_REACH_PX + 1)
    radius = np.hypot(offset, offset[:, None])
    envelope = np.exp(-(radius**2) / (2 * 2.0**2))
    ripple = np.cos(2 * np.pi * radius / 5.2)
    profile = envelope * (ripple - (envelope * ripple).sum() / envelope.sum())
    normalized: Floats = (profile / profile.max()).astype(np.float32)
    return normalized


def _dots(eye: _Eye, rng: np.random.Generator, change: Color) -> None:
    points = _off_disc(eye, _ring(rng, eye.center, int(rng.integers(28, 61)), 0, 74), 9)
    stamp = _dot()[..., None] * np.array(change, np.float32)
    for low in np.rint(points).astype(int) - _DOT_REACH_PX:
        columns, rows = (slice(at, at + len(stamp)) for at in low)
        eye.rgb[rows, columns] += stamp
        eye.masks["lesion"][rows, columns] |= _dot() > 0.3


# The two differ in red alone, by the same amount up and down: as many, as large, as dark in green.


def _red_dots(eye: _Eye, rng: np.random.Generator) -> None:
    """Scattered microaneurysms: early diabetic retinopathy."""
    _dots(eye, rng, (72, -60, -36))


def _dark_dots(eye: _Eye, rng: np.random.Generator) -> None:
    """Scattered grains of pigment: early retinitis pigmentosa."""
    _dots(eye, rng, (-72, -60, -36))


SIGNS: dict[str, Callable[[_Eye, np.random.Generator], None]] = {
    "spots": _spots,
    "yolk": _yolk,
    "scars": _scars,
    "pale_disc": _pale_disc,
    "exudates": _exudates,
    "atrophy": _atrophy,
    "cupping": _cupping,
    "spicules": _spicules,
    "bulls_eye": _bulls_eye,
    "layered_yolk": _layered_yolk,
    "red_dots": _red_dots,
    "dark_dots": _dark_dots,
}

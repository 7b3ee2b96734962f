"""data.augmentation: one camera for a picture of any size and for its masks."""

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from mdf_sdk.manifest import ImageSpec
from mdf_training.data.augmentation import Camera
from mdf_training.data.pixels import PixelSet
from mdf_training.data.synthetic import SyntheticData

SIDE_PX = 128
SAME = Camera(
    rotation=0.0,
    zoom=1.0,
    shift=(0.0, 0.0),
    colors=np.eye(3),
    curves=np.tile(np.arange(256, dtype=np.uint8), (3, 1)),
    light=np.full((4, 4), 255, np.uint8),
    field=None,
    blur=1.0,
    jpeg_quality=None,
)
SPEC = ImageSpec(48, SIDE_PX, (0.5,) * 3, (0.25,) * 3, (0.5,) * 3, (0.25,) * 3)


def disc(side_px: int = SIDE_PX) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """A bright disc to the upper left on a gray picture, and its mask."""
    y, x = (np.mgrid[:side_px, :side_px] + 0.5) / side_px
    mask = np.hypot(x - 0.4, y - 0.35) < 0.15
    picture = np.full((side_px, side_px, 3), 60, np.uint8)
    picture[mask] = (200, 150, 100)
    return picture, mask


def draw(seed: int, strength: float = 1.0) -> Camera:
    return Camera.draw(np.random.default_rng(seed), strength)


def test_a_camera_without_differences_changes_nothing() -> None:
    picture, mask = disc()
    assert np.array_equal(SAME.photograph(picture), picture)
    assert np.array_equal(SAME.mask(mask), mask)


@pytest.mark.parametrize("seed", range(8))
def test_the_mask_follows_the_picture(seed: int) -> None:
    picture, mask = disc()
    camera = dataclasses.replace(
        draw(seed), colors=SAME.colors, curves=SAME.curves, light=SAME.light, blur=1.0
    )
    moved = camera.mask(mask)
    bright = camera.photograph(picture)[..., 0] > 130
    assert moved.any()
    assert (moved != bright).mean() < 0.01


@pytest.mark.parametrize("seed", range(8))
def test_every_size_shows_the_same(seed: int) -> None:
    camera = dataclasses.replace(draw(seed), jpeg_quality=None)
    large, small = camera.photograph(disc(256)[0]), camera.photograph(disc(128)[0])
    halved = large.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).mean() < 4


def test_each_property_changes_the_picture() -> None:
    picture, _ = disc()
    other = draw(3)
    changed = {"field": 0.8, "blur": 2.5, "jpeg_quality": 30}
    for field in dataclasses.fields(Camera):
        value = changed.get(field.name, getattr(other, field.name))
        camera = dataclasses.replace(SAME, **{field.name: value})
        assert not np.array_equal(camera.photograph(picture), picture), field.name


def test_a_field_of_view_is_cut_flat_above_and_below() -> None:
    white = np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)
    camera = dataclasses.replace(SAME, field=0.75)
    seen = camera.photograph(white)[..., 0] > 0
    rows = np.flatnonzero(seen.any(axis=1))
    assert (rows[0], rows[-1]) == (SIDE_PX // 8, SIDE_PX - SIDE_PX // 8 - 1)
    assert seen.any(axis=0).all()
    assert not seen[SIDE_PX // 8, 0]
    assert np.array_equal(camera.mask(np.ones((SIDE_PX, SIDE_PX), np.bool_)), seen)


def test_black_surround_stays_black() -> None:
    black = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)
    for seed in range(8):
        assert not draw(seed).photograph(black).any()


def test_a_stronger_camera_is_farther_from_the_original() -> None:
    picture, _ = disc()
    distances = [
        np.mean(
            [
                np.abs(draw(seed, strength).photograph(picture).astype(float) - picture).mean()
                for seed in range(16)
            ]
        )
        for strength in (0.1, 0.4, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_the_same_chance_gives_the_same_camera() -> None:
    picture, _ = disc()
    assert np.array_equal(draw(5).photograph(picture), draw(5).photograph(picture))


def test_a_pixel_set_shows_each_case_as_its_camera_does() -> None:
    pixels = PixelSet(SyntheticData(3, 0), SPEC, ("vessel", "spare"))
    plain, camera = pixels.read([0, 1, 2]), draw(1)
    cases = pixels.read([0, 1, 2], [None, camera, None])
    for before, after, same in zip(plain, cases, (True, False, True), strict=True):
        for name in ("tower_pixels", "unet_pixels", "masks"):
            equal = np.array_equal(getattr(before, name), getattr(after, name))
            assert equal == same, name
        assert np.array_equal(before.has_mask, after.has_mask)
    assert np.array_equal(cases[1].masks[0] > 0, camera.mask(plain[1].masks[0] > 0))
    assert not cases[1].masks[1].any()

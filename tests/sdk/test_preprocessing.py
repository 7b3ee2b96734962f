"""mdf_sdk.preprocessing: the field of view found, squared and normalized."""

import multiprocessing
import sys
import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mdf_sdk.manifest import ImageSpec
from mdf_sdk.photograph import decode, load_photograph, read_source
from mdf_sdk.preprocessing import (
    Square,
    crop_square,
    find_square,
    normalize,
    shared_threads,
    to_pixels,
)

SPEC = ImageSpec(56, 48, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (0.0,) * 3, (1.0,) * 3)
Picture = npt.NDArray[np.uint8]


def test_a_thumbnail_is_what_slicing_gives() -> None:
    rng = np.random.default_rng(0)
    for shape in ((513, 700), (300, 1411), (1411, 1000), (64, 64)):
        picture = rng.integers(0, 256, (*shape, 3), np.uint8)
        photograph = decode(read_source(picture))
        step = max(1, max(shape) // 256)
        expected = picture[::step, ::step].max(axis=2)
        np.testing.assert_array_equal(np.asarray(photograph.thumbnail.brightness), expected)
        assert photograph.square == find_square(picture)


def test_percentiles_are_numpys() -> None:
    rng = np.random.default_rng(0)
    for high in (2, 40, 256):
        picture = rng.integers(0, high, (77, 91, 3), np.uint8)
        thumbnail = load_photograph(picture).thumbnail
        expected = np.percentile(np.asarray(thumbnail.brightness), (0, 1, 33, 95, 99, 100))
        found = thumbnail.percentiles(0, 1, 33, 95, 99, 100)
        np.testing.assert_allclose(found, expected, atol=1e-9)


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


@pytest.mark.parametrize("side", [40, 100, 1395])
@pytest.mark.parametrize("at", [-7, 0, 60])
def test_pixels_are_the_squares_that_training_keeps(side: int, at: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (200, 230, 3), np.uint8)
    square = Square(at, -at, side)
    tower, unet = to_pixels(picture, SPEC, square)
    own = crop_square(picture, square, SPEC.tower_px)
    np.testing.assert_array_equal(tower, normalize(own, SPEC.tower_mean, SPEC.tower_std))
    own = crop_square(picture, square, SPEC.unet_px)
    np.testing.assert_array_equal(unet, normalize(own, SPEC.unet_mean, SPEC.unet_std))


@given(
    left=st.integers(-5, 60),
    top=st.integers(-5, 60),
    side=st.integers(1, 400),
    side_px=st.integers(1, 120),
)
@settings(deadline=None, max_examples=200)
def test_a_crop_is_what_pillow_makes_of_it_in_one_call(
    left: int, top: int, side: int, side_px: int
) -> None:
    """Whether the square lies in the picture or reaches beyond it."""
    picture = np.random.default_rng(0).integers(0, 256, (200, 230, 3), np.uint8)
    whole = Image.fromarray(picture).crop((left, top, left + side, top + side))
    bilinear = Image.Resampling.BILINEAR
    expected = whole.resize((side_px, side_px), bilinear, reducing_gap=1.0)
    crop = crop_square(picture, Square(left, top, side), side_px)
    np.testing.assert_array_equal(crop, np.asarray(expected))


@pytest.mark.parametrize("side_px", [300, 512, 560])
def test_a_crop_in_strips_is_the_whole_to_rounding(photograph: Picture, side_px: int) -> None:
    square = Square(-5, 3, 677)
    picture = np.asarray(Image.fromarray(photograph).resize((800, 700)))
    whole = Image.fromarray(picture).crop((-5, 3, 672, 680))
    bilinear = Image.Resampling.BILINEAR
    expected = np.asarray(whole.resize((side_px, side_px), bilinear, reducing_gap=1.0))
    off = np.abs(crop_square(picture, square, side_px).astype(int) - expected)
    assert off.max() <= 1
    assert off.mean() < 0.01


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


def test_threads_that_are_all_busy_with_photographs_wait_for_no_strip(photograph: Picture) -> None:
    expected = to_pixels(photograph, SPEC)
    tasks = [shared_threads().submit(to_pixels, photograph, SPEC) for _ in range(50)]
    for task in tasks:
        for first, second in zip(task.result(20), expected, strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows forks no process")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_prepares_pixels_too(photograph: Picture) -> None:
    expected = to_pixels(photograph, SPEC)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        found = to_pixels(photograph, SPEC)
        answers.put(all((a == b).all() for a, b in zip(found, expected, strict=True)))

    process = context.Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert answers.get()

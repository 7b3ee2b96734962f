import numpy as np
import pytest

from mdf_sdk.evidence import GRID, cover_cells

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.mark.parametrize("side_px", [28, 32])
def test_every_pixel_of_the_field_is_covered_exactly_once(side_px: int) -> None:
    pixels = np.random.default_rng(0).uniform(0, 2, (3, side_px, side_px)).astype(np.float32)
    copies = np.concatenate([cover_cells(pixels, MEAN, STD, row) for row in range(GRID)])
    assert copies.shape == (GRID * GRID, 3, side_px, side_px)
    changed = (copies != pixels).all(axis=1).sum(axis=0)
    assert changed.min() == changed.max() == 1


def test_cells_run_from_left_to_right_and_rows_from_the_top() -> None:
    pixels = np.random.default_rng(0).uniform(0, 2, (3, 28, 28)).astype(np.float32)
    changed = (cover_cells(pixels, MEAN, STD, 1)[2] != pixels).any(axis=0)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 7, 8, 11)


def test_the_black_surround_stays_black_and_does_not_tint_the_color() -> None:
    pixels = np.full((3, 28, 28), -2, np.float32)  # black
    pixels[:, :, 14:] = 1
    pixels[:, :, 21:] = 0
    middle = cover_cells(pixels, MEAN, STD, 0)[3]  # columns 12 to 15
    assert (middle[:, :, :14] == -2).all()
    assert (middle[:, :4, 14:16] == 0.5).all()


def test_a_black_picture_is_left_as_it_is() -> None:
    pixels = np.full((3, 28, 28), -2, np.float32)
    np.testing.assert_array_equal(cover_cells(pixels, MEAN, STD, 0), np.stack([pixels] * GRID))

"""Occlusion (Zeiler and Fergus, 2014): pixel tensors with one cell of a grid covered at a time."""

from collections.abc import Sequence

import numpy as np

from mdf_sdk.preprocessing import Pixels

GRID = 7
_BLACK = 0.1  # on values in [0, 1]: what is darker lies outside the field of view


def cover_cells(pixels: Pixels, mean: Sequence[float], std: Sequence[float], row: int) -> Pixels:
    """Cover the cells of one row of the grid, each in its own copy, with the field's mean color.

    The black surround stays black: only what shows the retina is covered.

    Args:
        pixels: float32 (3, S, S), normalized by mean and std.
        row: 0, the top one, to GRID - 1.

    Returns:
        float32 (GRID, 3, S, S), one covered cell each, from left to right.
    """
    black = (_BLACK - np.asarray(mean)) / np.asarray(std)
    field = (pixels > black[:, None, None]).any(axis=0)  # (S, S)
    color = pixels[:, field].mean(axis=1) if field.any() else np.zeros(3)
    edges = np.linspace(0, pixels.shape[1], GRID + 1).astype(int)
    covered = np.repeat(pixels[None], GRID, axis=0)
    rows = slice(edges[row], edges[row + 1])
    for column, picture in enumerate(covered):
        columns = slice(edges[column], edges[column + 1])
        cell = picture[:, rows, columns]
        cell[:, field[rows, columns]] = color[:, None]
    return covered

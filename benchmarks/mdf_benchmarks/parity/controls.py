"""A scorer and a few cases in; its scores when it is denied the photograph or the text, out.

Cross-attention that has died in a port goes unnoticed by accuracy where the text says enough. It
cannot hide here: its scores do not move.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mdf_sdk.manifest import ImageSpec
from mdf_training.data.cases import Row
from mdf_training.data.pixels import batches, blank_pixels
from mdf_training.data.synthetic import NEUTRAL_TEXT
from mdf_training.evaluation.evaluate import BATCH_SIZE, Scores, swap_partner

Float32 = npt.NDArray[np.float32]
# Indices of cases in, their pixels out: (B, 3, S, S) and (B, 3, U, U).
ReadPixels = Callable[[Sequence[int]], tuple[Float32, Float32]]
# Such pixels and B texts in, label scores (B, K) out.
Score = Callable[[Float32, Float32, Sequence[str]], Scores]

CONTROLS = ("swapped_image", "blank_image", "shuffled_image", "dropped_text")
CONTROL_CASES = 64
_CELLS = 4  # a side; every preset's pictures divide by it
_SEED = 0


def score_controls(
    score: Score, spec: ImageSpec, read: ReadPixels, rows: Sequence[Row], indices: Sequence[int]
) -> dict[str, Scores]:
    """Score some cases with another's photograph, a black one, one in pieces, and no text.

    Args:
        score: the reference's or the engine's.
        spec: how it takes photographs.
        read: its own pixels.
        rows: of all cases.
        indices: of the cases to score.

    Returns:
        By name of CONTROLS, float32 (len(indices), K).
    """
    labels = sorted({row.label for row in rows})
    truth = np.array([labels.index(row.label) for row in rows])
    scores: dict[str, list[Scores]] = {name: [] for name in CONTROLS}
    for batch in batches(indices, BATCH_SIZE):
        texts = [rows[i].text for i in batch]
        whole = read(batch)
        pictures = {
            "swapped_image": read([swap_partner(i, truth) for i in batch]),
            "blank_image": _blank(spec, len(batch)),
            "shuffled_image": (shuffle_cells(whole[0]), shuffle_cells(whole[1])),
        }
        for name, pixels in pictures.items():
            scores[name].append(score(*pixels, texts))
        scores["dropped_text"].append(score(*whole, [NEUTRAL_TEXT] * len(batch)))
    return {name: np.concatenate(parts) for name, parts in scores.items()}


def shuffle_cells(pixels: Float32) -> Float32:
    """Cut pictures (B, 3, S, S) into 4 x 4 cells and lay them in another, fixed order."""
    batch, channels, side, _ = pixels.shape
    cell = side // _CELLS
    cells = pixels.reshape(batch, channels, _CELLS, cell, _CELLS, cell).transpose(2, 4, 0, 1, 3, 5)
    order = np.random.default_rng(_SEED).permutation(_CELLS**2)
    shuffled = cells.reshape(_CELLS**2, batch, channels, cell, cell)[order]
    grid = shuffled.reshape(_CELLS, _CELLS, batch, channels, cell, cell)
    return np.ascontiguousarray(grid.transpose(2, 3, 0, 4, 1, 5).reshape(pixels.shape))


def _blank(spec: ImageSpec, count: int) -> tuple[Float32, Float32]:
    tower, unet = (np.repeat(pixels[None], count, axis=0) for pixels in blank_pixels(spec))
    return tower, unet

"""mdf_benchmarks.parity.controls: pictures that say something else, or nothing."""

import numpy as np

from mdf_benchmarks.parity.controls import CONTROLS, shuffle_cells
from mdf_benchmarks.parity.reference import Reference
from mdf_training.config import load_preset


def test_a_shuffled_picture_has_the_same_cells_in_another_order() -> None:
    picture = np.arange(2 * 3 * 8 * 8, dtype=np.float32).reshape(2, 3, 8, 8)
    shuffled = shuffle_cells(picture)
    assert shuffled.shape == picture.shape
    assert (shuffled != picture).any()

    def cells(channel: np.ndarray) -> set[tuple[float, ...]]:
        corners = [(y, x) for y in range(0, 8, 2) for x in range(0, 8, 2)]
        return {tuple(channel[y : y + 2, x : x + 2].ravel()) for y, x in corners}

    for before, after in zip(picture.reshape(-1, 8, 8), shuffled.reshape(-1, 8, 8), strict=True):
        assert cells(before) == cells(after)
    # Every channel and every picture in the same order, or colors would tear.
    assert (shuffled[:, 1] - shuffled[:, 0] == 64).all()
    assert (shuffled[1] - shuffled[0] == 192).all()


def test_every_preset_can_be_cut_into_cells() -> None:
    for name in ("nano", "smol-135m", "llama-3.2-11b"):
        image = load_preset(name).image
        assert image.tower_px % 4 == 0
        assert image.unet_px % 4 == 0


def test_every_control_was_scored(reference: Reference) -> None:
    assert list(reference.controls) == list(CONTROLS)
    whole = reference.scores[reference.control_indices]
    for scores in reference.controls.values():
        assert scores.shape == whole.shape
        assert (scores != whole).any()

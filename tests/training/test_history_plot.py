"""mdf_training.history_plot: both losses, their best epochs and what stopped are on the plot."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mdf_training.history_plot import draw_history, plot_history


def history(mask_losses: list[float | None]) -> list[dict[str, Any]]:
    return [
        {
            "epoch": number,
            "label_loss": 1 / number,
            "mask_loss": 2 / number,
            "validation_loss": 3 - number,
            "validation_mask_loss": mask_loss,
            "stopped": ["unet"] if number == 3 else [],
        }
        for number, mask_loss in enumerate(mask_losses, start=1)
    ]


def test_the_epochs_where_each_loss_is_best_are_marked_in_both_panels() -> None:
    figure = draw_history(history([1.0, 0.5, 0.7]))
    for panel in figure.axes:
        labels = panel.get_legend_handles_labels()[1]
        assert {"best label loss: epoch 3", "best mask loss: epoch 2"} <= set(labels)
    assert "stopped: unet" in [text.get_text() for text in figure.axes[1].texts]


def test_a_run_without_masks_has_a_plot() -> None:
    labels = draw_history(history([None, None])).axes[1].get_legend_handles_labels()[1]
    assert set(labels) == {"training", "best label loss: epoch 2"}


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_plot_is_a_picture_file(tmp_path: Path, epochs: int) -> None:
    plot_history(history([1.0] * epochs), tmp_path / "history.png")
    with Image.open(tmp_path / "history.png") as picture:
        assert picture.format == "PNG"

"""ablation.plots: a study's document in, the figures that its tables have on the picture."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mdf_training.ablation.plots import draw_study, plot_study


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "interval_95": [value - 0.1, value + 0.1]}


def variant(name: str, accuracy: float, losses: list[float | None]) -> dict[str, Any]:
    history = [{"validation_loss": 1.0, "validation_mask_loss": loss} for loss in losses]
    return {
        "name": name,
        "accuracy": estimate(accuracy),
        "accuracy_by_seed": [accuracy - 0.02, accuracy + 0.02],
        "histories": {"0": history, "1": history},
    }


@pytest.fixture
def document() -> dict[str, Any]:
    other = variant("other", 0.7, [0.9, 0.4, 0.6]) | {"difference": {"accuracy": estimate(-0.2)}}
    return {
        "question": "Which?",
        "preset": "nano",
        "cases": 10,
        "reference": "fused",
        "variants": [variant("fused", 0.9, [0.8, 0.7, 0.5]), other, {"name": "failed"}],
    }


def test_every_variant_that_has_figures_has_a_row(document: dict[str, Any]) -> None:
    left, right = draw_study(document).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["fused", "other"]
    dots = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "o"]
    assert dots == [0.9, 0.7]
    assert [line.get_xdata()[0] for line in right.lines if line.get_marker() == "o"] == [-0.2]


def test_a_line_marks_the_reference(document: dict[str, Any]) -> None:
    left, right = draw_study(document).axes
    marked = [
        axes.lines[i].get_xdata()[0]
        for axes in (left, right)
        for i in range(len(axes.lines))
        if axes.lines[i].get_linestyle() == "--"
    ]
    assert marked == [0.9, 0]


def test_losses_are_drawn_by_epoch_with_the_least_marked(document: dict[str, Any]) -> None:
    _, _, labels, masks = draw_study(document, losses=True).axes
    assert labels.get_ylabel() == "validation label loss"
    least = [(m.get_xdata()[0], m.get_ydata()[0]) for m in masks.lines if m.get_marker() == "o"]
    assert least == [(3, 0.5), (3, 0.5), (2, 0.4), (2, 0.4)]


def test_cases_without_masks_have_no_mask_loss_to_draw(document: dict[str, Any]) -> None:
    document["variants"] = [variant("fused", 0.9, [None, None])]
    *_, masks = draw_study(document, losses=True).axes
    assert not masks.lines


def test_the_plot_is_a_picture(document: dict[str, Any], tmp_path: Path) -> None:
    plot_study(document, tmp_path / "study.png", losses=True)
    with Image.open(tmp_path / "study.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000

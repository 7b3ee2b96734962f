"""A study's document in, its plot out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdf_sdk.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = {"validation_loss": "label loss", "validation_mask_loss": "segmentation loss"}


def plot_study(document: Mapping[str, Any], path: Path, *, losses: bool = False) -> None:
    """Write `draw_study`'s figure as a PNG file."""
    draw_study(document, losses=losses).savefig(path, dpi=120)


def draw_study(document: Mapping[str, Any], *, losses: bool = False) -> "Figure":
    """Draw each variant's accuracy and its difference to the reference, with 95 % intervals.

    Args:
        document: of `report_study`.
        losses: draw both validation losses by epoch below, too.
    """
    variants = [variant for variant in document["variants"] if "accuracy" in variant]
    top, below = 1.6 + 0.4 * len(variants), 3.4
    figure: Figure = import_extra("matplotlib.figure", "training").Figure(
        figsize=(10, top + below * losses), layout="constrained"
    )
    rows = figure.subfigures(
        1 + losses, height_ratios=[top, below][: 1 + losses], squeeze=False
    ).ravel()
    left, right = rows[0].subplots(1, 2, sharey=True)
    _plot_accuracies(left, variants, document["reference"])
    _plot_differences(right, variants, document["reference"])
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=5)  # else the numbers run into each other
    if losses:
        for axes, (key, name) in zip(rows[1].subplots(1, 2), LOSSES.items(), strict=True):
            _plot_losses(axes, variants, key, name)
    figure.suptitle(f"{document['question']} ({document['preset']}, {document['cases']} cases)")
    return figure


def _plot_accuracies(axes: "Axes", variants: Sequence[Mapping[str, Any]], reference: str) -> None:
    for y, variant in enumerate(variants):
        _plot_interval(axes, variant["accuracy"], y)
        seeds = variant["accuracy_by_seed"]
        axes.plot(seeds, [y] * len(seeds), "|", color="black", markersize=10)
        if variant["name"] == reference:
            axes.axvline(variant["accuracy"]["value"], color="gray", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(variants)), [variant["name"] for variant in variants])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy; | one seed")
    axes.grid(alpha=0.3)


def _plot_differences(axes: "Axes", variants: Sequence[Mapping[str, Any]], reference: str) -> None:
    for y, variant in enumerate(variants):
        if "difference" in variant:
            _plot_interval(axes, variant["difference"]["accuracy"], y)
    axes.axvline(0, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel=f"accuracy against {reference}")
    axes.grid(alpha=0.3)


def _plot_interval(axes: "Axes", estimate: Mapping[str, Any], y: int) -> None:
    low, high = estimate["interval_95"]
    axes.plot([low, high], [y, y], color="tab:blue", linewidth=2)
    axes.plot(estimate["value"], y, "o", color="tab:blue")


def _plot_losses(axes: "Axes", variants: Sequence[Mapping[str, Any]], key: str, name: str) -> None:
    """Draw a loss of every seed, the epoch where it is least marked."""
    for number, variant in enumerate(variants):
        color = f"C{number}"
        for place, history in enumerate(variant["histories"].values()):
            values = [epoch[key] for epoch in history]
            if None in values:  # no held-out case has a mask
                continue
            label = variant["name"] if place == 0 else None
            axes.plot(range(1, len(values) + 1), values, color=color, alpha=0.6, label=label)
            best = min(range(len(values)), key=values.__getitem__)
            axes.plot(best + 1, values[best], "o", color=color)
    axes.set(xlabel="epoch; the least is marked", ylabel=f"validation {name}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()

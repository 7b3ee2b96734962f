"""A run's history in, a plot of both validation losses out: the epochs where each is best."""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import IO, Any

from matplotlib.figure import Figure

# Title, training loss, validation loss, color.
PANELS = (
    ("label loss", "label_loss", "validation_loss", "tab:blue"),
    ("mask loss", "mask_loss", "validation_mask_loss", "tab:orange"),
)


def plot_history(
    history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str] | IO[bytes]
) -> None:
    """Write `draw_history`'s figure as a PNG file."""
    draw_history(history).savefig(path, format="png", dpi=120)


def draw_history(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw label and mask loss by epoch, the best epoch of each marked in both panels.

    Args:
        history: as `train` returns it, one entry for each epoch.
    """
    figure = Figure(figsize=(7, 6))
    panels = figure.subplots(2, sharex=True)
    epochs = [epoch["epoch"] for epoch in history]
    for panel, (title, training, validation, color) in zip(panels, PANELS, strict=True):
        panel.plot(epochs, [e[training] for e in history], color="0.7", label="training")
        losses = {e["epoch"]: e[validation] for e in history if e[validation] is not None}
        if losses:
            best = min(losses, key=losses.__getitem__)
            panel.plot(losses.keys(), losses.values(), color=color, marker=".", label="validation")
            panel.plot(best, losses[best], "*", color=color, markersize=14)
            for each in panels:
                name = f"best {title}: epoch {best}"
                each.axvline(best, color=color, linestyle="--", linewidth=1, label=name)
        panel.set(ylabel=title)
        panel.grid(alpha=0.3)
    for before, after in pairwise(history):
        if new := [part for part in after["stopped"] if part not in before["stopped"]]:
            panels[-1].axvline(after["epoch"], color="0.3", linestyle=":", linewidth=1)
            panels[-1].annotate(
                f"stopped: {', '.join(new)}",
                (after["epoch"], 0.95),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize="small",
            )
    panels[-1].set(xlabel="epoch")
    for panel in panels:
        panel.legend(fontsize="small")
    return figure

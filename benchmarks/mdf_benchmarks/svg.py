"""Axes to draw on, and what is drawn as SVG. Needs matplotlib, of the training extra."""

import io
import re
from typing import TYPE_CHECKING, Any

from mdf_benchmarks.html import Markup, fill
from mdf_sdk.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, BLUE, ORANGE, GREEN = "#222222", "#9aa5b1", "#2563a8", "#d9822b", "#3a8f5c"
RED = "#b3261e"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def new_figure(height_in: float, columns: int = 1, width_in: float = 10.3) -> "tuple[Figure, Any]":
    """Make a figure, by default as wide as a page's text, and its axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib.figure", "training")
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure = matplotlib.Figure(figsize=(width_in, height_in), layout="constrained")
        return figure, figure.subplots(1, columns)


def to_svg(figure: "Figure", name: str) -> Markup:
    """Return the <svg> element alone, the same bytes for the same drawing.

    Args:
        figure: of `new_figure`.
        name: begins every id, so that those of a page's plots differ.
    """
    from matplotlib import rc_context

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return fill('<div class="wide">{}</div>', Markup(svg))

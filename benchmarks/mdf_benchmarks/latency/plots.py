"""A benchmark's report in, its plots as SVG out. Needs matplotlib, of the training extra."""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mdf_benchmarks.latency.text import KIND_NAMES
from mdf_sdk.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, BLUE, ORANGE, GREEN = "#222222", "#9aa5b1", "#2563a8", "#d9822b", "#3a8f5c"
_PHASE_COLORS = ("#eceff3", "#dbe8f5", "#e2f0e6", "#fbeeda", "#efe6f5")
_WIDTH_IN = 8.6
_STAGE_COLORS = {
    "image": SOFT,
    "text": SOFT,
    "vision": BLUE,
    "unet_encoder": GREEN,
    "fusion": "#7a5ea8",
    "decoder": ORANGE,
}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def plot_waterfall(report: Mapping[str, Any]) -> str:
    """Draw the stages of a new photograph, each beginning where what it waits for ends."""
    figure, axes = _new(2.5)
    stages = report["stages"]["new_image"]
    together = report["device"] != "cpu"  # on a card the two encoders run at the same time
    end = 0.0
    shown = [name for name in _STAGE_COLORS if name in stages]
    for row, name in enumerate(shown):
        ms = stages[name]["p50_ms"]
        start = end
        if name == "unet_encoder" and together:
            start = end - stages["vision"]["p50_ms"]
        axes.barh(row, ms, left=start, color=_STAGE_COLORS[name], height=0.62)
        _label(axes, start + ms, row, f"{ms:.2f} ms")
        end = max(end, start + ms)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * end)
    axes.set_xlabel("ms, medians")
    return _to_svg(figure, "waterfall")


def plot_distribution(report: Mapping[str, Any]) -> str:
    """Draw every call: histograms of both kinds, percentiles marked."""
    figure, rows = _new(2.6, columns=2)
    for axes, (kind, times) in zip(rows, report["latency"].items(), strict=True):
        samples = np.array(times["samples_ms"])
        most = float(np.quantile(samples, 0.995))
        axes.hist(samples[samples <= most], bins=50, color=BLUE, alpha=0.75)
        for key, color in (("p50", INK), ("p90", GREEN), ("p99", ORANGE)):
            value = times[f"{key}_ms"]
            axes.axvline(value, color=color, linewidth=1.2, label=f"{key} {value:.2f}")
        axes.set_title(f"{KIND_NAMES[kind]}, n = {times['n']}", fontsize=9)
        axes.set_xlabel("ms, the longest 0.5 % not shown" if len(samples) > 200 else "ms")
        axes.set_ylabel("calls")
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
    return _to_svg(figure, "distribution")


def plot_memory(report: Mapping[str, Any]) -> str:
    """Draw memory over the run, its phases named."""
    figure, axes = _new(2.7)
    memory = report["memory"]
    for where, color in (("host", BLUE), ("device", ORANGE)):
        known = [
            (at, size / 1e9)
            for at, size in zip(memory["at_s"], memory[f"{where}_bytes"], strict=True)
            if size is not None
        ]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, linewidth=1.4, label=where)
    for phase, color in zip(memory["phases"], _PHASE_COLORS, strict=False):
        axes.axvspan(
            phase["start_s"], phase["end_s"], color=color, linewidth=0, label=phase["name"]
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("s")
    axes.set_ylabel("GB")
    figure.legend(loc="outside upper left", ncols=7, frameon=False, fontsize=8)
    return _to_svg(figure, "memory")


def plot_floor(report: Mapping[str, Any]) -> str:
    """Draw each block's median, and in it what bytes and arithmetic take at the least."""
    figure, axes = _new(2.5)
    blocks = report["floor"]["blocks"]
    for row, block in enumerate(blocks.values()):
        axes.barh(
            row, block["p50_ms"], color=SOFT, height=0.62, label="measured" if not row else None
        )
        for offset, key, color in ((-0.15, "bytes_ms", BLUE), (0.15, "arithmetic_ms", ORANGE)):
            label = f"floor by {key.removesuffix('_ms')}" if not row else None
            axes.barh(row + offset, block[key], color=color, height=0.26, label=label)
        note = f"{block['p50_ms']:.2f} ms, {block['times_floor']:.1f} times its floor"
        _label(axes, block["p50_ms"], row, note)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(block["p50_ms"] for block in blocks.values()))
    axes.set_xlabel("ms")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return _to_svg(figure, "floor")


def plot_peers(report: Mapping[str, Any]) -> str:
    """Draw how many times as long as the engine each takes over a new photograph, preparing it
    left out, with the interval."""
    answered = [peer for peer in report["peers"] if peer["status"] == "ok"]
    figure, axes = _new(0.9 + 0.36 * (len(answered) + 1))
    most = 1.0
    axes.barh(0, 1.0, color=BLUE, height=0.62)
    axes.axvline(1.0, color=BLUE, linewidth=0.8, linestyle=":")
    for row, peer in enumerate(answered, start=1):
        found = peer["ratios"]["new_image"]["without_image"]
        ratio, (low, high) = found["ratio"], found["interval"]
        ms = peer["latency"]["new_image"]["without_image"]["p50_ms"]
        axes.barh(row, ratio, color=SOFT, height=0.62)
        axes.plot([low, high], [row, row], color=INK, linewidth=1.2)
        _label(axes, max(ratio, high), row, f"{ratio:.2f} times, {ms:.2f} ms")
        most = max(most, ratio, high)
    names = [f"engine, {report['precision']}", *(peer["name"] for peer in answered)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * most)
    axes.set_xlabel("times as long as the engine, new photograph, preparing it left out")
    return _to_svg(figure, "peers")


def plot_sweeps(report: Mapping[str, Any]) -> str:
    """Draw what more callers do to throughput and to the wait."""
    figure, (left, right) = _new(2.3, columns=2)
    for key, size, color in (("batches", "batch", BLUE), ("callers", "callers", ORANGE)):
        entries = report[key]
        sizes = [entry[size] for entry in entries]
        left.plot(sizes, [e["per_s"] for e in entries], "o-", color=color, label=key, markersize=4)
    callers = report["callers"]
    for key, color in (("p50", INK), ("p99", ORANGE)):
        values = [entry[f"{key}_ms"] for entry in callers]
        right.plot(
            [e["callers"] for e in callers], values, "o-", color=color, label=key, markersize=4
        )
    left.set_ylabel("predictions per s")
    left.set_xlabel("cases in a batch, or callers")
    right.set_ylabel("ms of a call")
    right.set_xlabel("callers")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_xticks([1, 2, 4, 8])
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
    return _to_svg(figure, "sweeps")


def _label(axes: "Axes", x: float, row: int, text: str) -> None:
    """Write beside the end of a bar."""
    axes.annotate(
        text, (x, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
    )


def _new(height_in: float, columns: int = 1) -> "tuple[Figure, Any]":
    import_extra("matplotlib.figure", "training")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        return figure, figure.subplots(1, columns)


def _to_svg(figure: "Figure", name: str) -> str:
    """Return the <svg> element alone, with ids of its own and nothing that points outside."""
    from matplotlib import rc_context

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"',
        r'<svg \1width="100%"',
        re.sub(r' height="[^"]*pt"', "", svg, count=1),
        count=1,
    )

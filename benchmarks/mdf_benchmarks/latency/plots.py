"""A benchmark's report in, its plots as SVG out. Needs matplotlib, of the training extra."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mdf_benchmarks.html import Markup
from mdf_benchmarks.latency.text import KIND_NAMES
from mdf_benchmarks.svg import BLUE, GREEN, INK, ORANGE, SOFT, new_figure, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PHASE_COLORS = ("#eceff3", "#dbe8f5", "#e2f0e6", "#fbeeda", "#efe6f5")
_STAGE_COLORS = {
    "image": SOFT,
    "text": SOFT,
    "vision": BLUE,
    "unet_encoder": GREEN,
    "fusion": "#7a5ea8",
    "decoder": ORANGE,
}


def plot_waterfall(report: Mapping[str, Any]) -> Markup:
    """Draw the stages of a new photograph, each beginning where what it waits for ends."""
    figure, axes = new_figure(2.9)
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
    _name_rows(axes, shown, 1.12 * end, "ms, medians")
    return to_svg(figure, "waterfall")


def plot_distribution(report: Mapping[str, Any]) -> Markup:
    """Draw every call: histograms of both kinds, percentiles marked."""
    figure, rows = new_figure(3.0, columns=2)
    for axes, (kind, times) in zip(rows, report["latency"].items(), strict=True):
        samples = np.array(times["samples_ms"])
        most = float(np.quantile(samples, 0.995))
        axes.hist(samples[samples <= most], bins=50, color=BLUE, alpha=0.75)
        for key, color in (("p50", INK), ("p90", GREEN), ("p99", ORANGE)):
            value = times[f"{key}_ms"]
            axes.axvline(value, color=color, linewidth=1.2, label=f"{key} {value:.2f}")
        axes.set_title(f"{KIND_NAMES[kind]}, n = {times['n']}", fontsize=10)
        what = "ms, the longest 0.5 % not shown" if len(samples) > 200 else "ms"
        axes.set(xlabel=what, ylabel="calls")
        axes.legend(fontsize=9, framealpha=0.85, edgecolor="none")
    return to_svg(figure, "distribution")


def plot_memory(report: Mapping[str, Any]) -> Markup:
    """Draw memory over the run, its phases named."""
    figure, axes = new_figure(3.1)
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
    axes.set(xlabel="s", ylabel="GB")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper left", ncols=7, frameon=False, fontsize=9)
    return to_svg(figure, "memory")


def plot_floor(report: Mapping[str, Any]) -> Markup:
    """Draw each block's median, and in it what bytes and arithmetic take at the least."""
    figure, axes = new_figure(2.9)
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
    _name_rows(axes, blocks, 1.45 * max(block["p50_ms"] for block in blocks.values()), "ms")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return to_svg(figure, "floor")


def plot_peers(report: Mapping[str, Any]) -> Markup:
    """Draw how many times as long as the engine each takes over a new photograph, preparing it
    left out, with the interval."""
    answered = [peer for peer in report["peers"] if peer["status"] == "ok"]
    figure, axes = new_figure(1.0 + 0.42 * (len(answered) + 1))
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
    what = "times as long as the engine, new photograph, preparing it left out"
    _name_rows(axes, names, 1.35 * most, what)
    return to_svg(figure, "peers")


def plot_sweeps(report: Mapping[str, Any]) -> Markup:
    """Draw what more callers do to throughput and to the wait."""
    figure, (left, right) = new_figure(2.7, columns=2)
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
    left.set(xlabel="cases in a batch, or callers", ylabel="predictions per s")
    right.set(xlabel="callers", ylabel="ms of a call")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_xticks([1, 2, 4, 8])
        axes.legend(fontsize=9, framealpha=0.85, edgecolor="none")
    return to_svg(figure, "sweeps")


def _name_rows(axes: "Axes", names: Collection[str], most: float, what: str) -> None:
    """Name horizontal bars, the first on top; x is `what`, from 0 to `most`."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, most), xlabel=what)


def _label(axes: "Axes", x: float, row: int, text: str) -> None:
    """Write beside the end of a bar."""
    axes.annotate(
        text, (x, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5
    )

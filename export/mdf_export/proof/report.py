"""A ladder or a sensitivity in, its tables as Markdown and its plot out."""

from pathlib import Path

from mdf_export.proof.ladder import Ladder
from mdf_export.proof.sensitivity import LinearDamage, Sensitivity
from mdf_sdk.manifest import Manifest
from mdf_training.evaluation.statistics import Estimate


def format_ladder(ladder: Ladder) -> str:
    """Lay a ladder out as Markdown."""
    lines = [
        f"# Ladder of proof: {ladder.model}",
        "",
        f"Reference: PyTorch float32, checkpoint {ladder.checkpoint[:12]}, {ladder.cases} cases. "
        f"Calibration error of the reference: {_optional(ladder.calibration_error)}.",
        "",
        "## Decisions",
        "",
        "| engine | precision | MB | flips | 95 % interval | KL, nats | 95 % interval "
        "| calibration error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rung in ladder.rungs:
        low, high = rung.flips.interval()
        other = "" if rung.same_checkpoint else " (from another checkpoint)"
        lines.append(
            f"| {rung.engine}{other} | {_precision(rung.manifest)} "
            f"| {rung.weight_bytes / 1e6:.1f} | {rung.flips.correct} of {rung.flips.n} "
            f"| {low:.2%} to {high:.2%} | {rung.kl.value:.2e} | {_interval(rung.kl)} "
            f"| {_optional(rung.calibration_error)} |"
        )
    lines += [
        "",
        "Flips: labels that are not the reference's, Wilson interval. KL(reference || engine) of "
        "the calibrated label probabilities; interval by bootstrap over patients. Calibration "
        "error: ECE, 15 bins of equal mass.",
    ]
    for step in ladder.steps:
        low, high = step.kl_removed.interval_95
        verdict = "excludes 0" if low > 0 or high < 0 else "does not exclude 0"
        lines += [
            "",
            f"From {step.before} to {step.after} the KL falls by {step.kl_removed.value:.2e} "
            f"({_interval(step.kl_removed)}, case by case): the interval {verdict}.",
        ]
    lines += [
        "",
        "## Where it is lost",
        "",
        f"Worst of {ladder.tensor_cases} cases. A block is fed the reference's inputs; "
        "of each, the output that is farthest off.",
        "",
        "| engine | block | output | relative L2 | cosine | max abs | |",
        "|---|---|---|---|---|---|---|",
    ]
    for rung in ladder.rungs:
        for block in rung.blocks:
            name, d = rung.worst_output(block)
            mark = "most" if block == rung.worst_block else ""
            lines.append(
                f"| {rung.engine} | {block} | {name} | {d.relative_l2:.2e} | {d.cosine:.6f} "
                f"| {d.max_abs:.2e} | {mark} |"
            )
    lines += ["", *_format_layers(ladder)]
    return "\n".join(lines) + "\n"


def _format_layers(ladder: Ladder) -> list[str]:
    """Lay out the layers, one column for each engine."""
    names = [str(rung.engine) for rung in ladder.rungs]
    lines = [
        "## Decoder layers",
        "",
        "Relative L2 of the residual stream behind each layer: as the decoder runs, and in "
        "brackets the layer's own, fed the reference's stream. Cosines and largest differences "
        "are in ladder.json.",
        "",
        f"| layer | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for i in range(len(ladder.rungs[0].layers)):
        cells = []
        for rung in ladder.rungs:
            layer = rung.layers[i]
            mark = " **most**" if layer.layer == rung.worst_layer else ""
            cells.append(f"{layer.stream.relative_l2:.2e} ({layer.own.relative_l2:.2e}){mark}")
        lines.append(f"| {i} | {' | '.join(cells)} |")
    return lines


def plot_layers(ladder: Ladder, path: Path) -> None:
    """Draw relative L2 over the decoder's layers, one line for each engine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = ("as the decoder runs", "the layer's own, fed the reference's stream")
    for axis, kind, title in zip(axes, ("stream", "own"), titles, strict=True):
        for rung in ladder.rungs:
            values = [getattr(layer, kind).relative_l2 for layer in rung.layers]
            name = f"{rung.engine.name} ({_precision(rung.manifest)})"
            axis.semilogy(values, marker=".", label=name)
        axis.set(title=title, xlabel="decoder layer")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative L2 of the residual stream")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def format_sensitivity(sensitivity: Sensitivity, most: int | None = None) -> str:
    """Lay a sensitivity out as Markdown: the `most` damaging linears, or all of them."""
    ranked = sensitivity.ranked()
    lines = [
        "# Sensitivity of each linear",
        "",
        f"Checkpoint {sensitivity.checkpoint[:12]}: each of {len(ranked)} linears alone rounded to "
        f"nearest {sensitivity.precision} in blocks of {sensitivity.block_size}, all else float32, "
        f"on {sensitivity.cases} cases of {sensitivity.data}. KL of the calibrated label "
        "probabilities from those of the unquantized model, mean.",
        "",
        "| linear | KL, nats | flips | int4 kB | int8 kB | fp16 kB |",
        "|---|---|---|---|---|---|",
    ]
    for linear in ranked[:most]:
        sizes = (linear.bytes_int4, linear.bytes_int8, linear.bytes_fp16)
        lines.append(
            f"| {linear.name} | {linear.kl:.2e} | {linear.flips} "
            f"| {' | '.join(f'{size / 1e3:.1f}' for size in sizes)} |"
        )
    return "\n".join(lines) + "\n"


def plot_sensitivity(sensitivity: Sensitivity, path: Path) -> None:
    """Draw each linear's KL over the layers, one mark for each kind of linear."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[int, float]]] = {}
    for linear in sensitivity.linears:
        kind, index = _place(linear)
        kinds.setdefault(kind, []).append((index, linear.kl))
    figure = Figure(figsize=(10, 5), layout="constrained")
    axis = figure.subplots()
    marks = "osv^D*PX<>hd"
    for i, (kind, points) in enumerate(kinds.items()):
        axis.semilogy(*zip(*points, strict=True), marks[i % len(marks)], label=kind, alpha=0.7)
    axis.set(
        title=f"{sensitivity.precision}, one linear at a time",
        xlabel="decoder layer, or fusion block",
        ylabel="KL, nats",
    )
    axis.grid(alpha=0.3)
    axis.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def _place(linear: LinearDamage) -> tuple[str, int]:
    """Split a name: "fusion.0.q_proj" is ("fusion q_proj", 0)."""
    words = linear.name.split(".")
    at = next(i for i, word in enumerate(words) if word.isdecimal())
    owner = ["fusion"] if words[0] == "fusion" else []
    return " ".join([*owner, *words[at + 1 :]]), int(words[at])


def _precision(manifest: Manifest) -> str:
    spec = manifest.quantization
    words: list[str] = [manifest.precision]
    if spec.method != "none":
        words += [spec.method, *([str(spec.block_size)] if spec.block_size else [])]
    if spec.kept:
        words.append(f"{len(spec.kept)} kept")
    return " ".join(words)


def _interval(mean: Estimate) -> str:
    low, high = mean.interval_95
    return f"{low:.2e} to {high:.2e}"


def _optional(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"

"""A certificate and its photographs in, one HTML page out that needs nothing else."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from mdf_benchmarks.parity.compare import Parity
from mdf_benchmarks.parity.reference import Reference
from mdf_benchmarks.parity.text import (
    Document,
    describe_check,
    describe_fault,
    describe_off,
    describe_proof,
    describe_subject,
)
from mdf_sdk.errors import StorageError
from mdf_sdk.manifest import BLOCKS
from mdf_sdk.preprocessing import crop_square, find_square

_PICTURE_PX = 240
_MOST_FAULTS = 100

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 60rem; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .5rem 0; }
.verdict { border-left: .5rem solid; padding: .9rem 1.2rem; border-radius: 4px; }
.pass { border-color: #1a7f4b; background: #e9f6ef; } .fail { border-color: #b3261e;
  background: #fdeceb; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #dfe4ea;
  vertical-align: top; }
th { font-weight: 600; color: #51606f; } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; }
.ok { color: #1a7f4b; font-weight: 600; } .bad { color: #b3261e; font-weight: 600; }
code { font-size: 13px; overflow-wrap: anywhere; } .quiet { color: #66727f; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr));
  gap: 1rem; } figure { margin: 0; } figure img { width: 100%; border-radius: 4px; }
figcaption { font-size: 12.5px; line-height: 1.4; } svg { max-width: 100%; height: auto; }
summary { cursor: pointer; color: #51606f; }
@media print { body { margin: 0; max-width: none; } details { display: block; } }
"""


def save_page(parity: Parity, document: Document, path: Path) -> None:
    """Write the report: plots and photographs are inside, it loads nothing from anywhere.

    Raises:
        StorageError: it cannot be written.
    """
    checks = {check["name"]: check for check in document["checks"]}
    measured = bool(checks["decisions"]["results"])
    parts = [
        _banner(document),
        "<h2>The chain, link by link</h2>",
        "<p>Each block is fed the reference's own tensors, so a fault shows where it is and "
        "nowhere else.</p>",
        _checks_table(document),
        _faults(document),
        "<h2>What these data can prove</h2>",
        *(f"<p>{escape(line)}</p>" for line in describe_proof(document)),
    ]
    if measured:
        parts += [_decisions(checks["decisions"]["results"]), _scores(checks["scores"]["results"])]
        parts += [_sensitivity(checks["sensitivity"]["results"])]
    parts += [_blocks(checks), _layers(checks["decoder"]["results"])]
    if measured:
        parts += [_worst_cases(parity.reference, checks["scores"]["results"])]
    parts += [_identity(document), _how_to_check(document)]
    title = f"Parity of {document['engine']['model']} {document['engine']['precision']}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror}; expected a file that can be written. Name another: --html"
        ) from error


def _banner(document: Document) -> str:
    fault = document["first_fault"]
    words = (
        f"<p>First at fault: <b>{escape(fault['check'])}</b>, {escape(describe_fault(fault))}</p>"
        if fault is not None
        else ""
    )
    notice = document["engine"]["notice"]
    return (
        f'<div class="verdict {document["verdict"]}"><h1>{document["verdict"].upper()}</h1>'
        f"<p>{escape(describe_subject(document))}</p>{words}"
        + (f'<p class="quiet">{escape(notice)}</p>' if notice else "")
        + "</div>"
    )


def _checks_table(document: Document) -> str:
    rows = [
        (
            check["name"].replace("_", " "),
            _Raw('<span class="ok">ok</span>' if check["ok"] else '<span class="bad">FAIL</span>'),
            describe_check(check),
        )
        for check in document["checks"]
    ]
    return _table(("check", "", "measured"), rows)


def _faults(document: Document) -> str:
    rows = [
        (check["name"], fault["where"], fault["found"], fault["expected"])
        for check in document["checks"]
        for fault in check["faults"]
    ]
    if not rows:
        return ""
    shown = rows[:_MOST_FAULTS]
    table = _table(("check", "where", "found", "expected"), shown)
    more = f"<p>{len(rows) - len(shown)} more in the certificate.</p>" if shown != rows else ""
    return f"<h2>Faults</h2>{table}{more}"


def _decisions(results: Mapping[str, Any]) -> str:
    paired, difference = results["paired"], results["accuracy_difference"]
    low, high = difference["newcombe_interval_95"]
    rows = [
        ("engine right", paired["both_right"], paired["only_engine_right"]),
        ("engine wrong", paired["only_reference_right"], paired["neither_right"]),
    ]
    accuracies = ", ".join(
        f"{name} {results[f'{name}_accuracy']['value']:.4f} "
        f"({results[f'{name}_accuracy']['interval_95'][0]:.4f} to "
        f"{results[f'{name}_accuracy']['interval_95'][1]:.4f})"
        for name in ("engine", "reference")
    )
    flips = [
        (flip["file"], flip["truth"], flip["reference_label"], flip["engine_label"])
        for flip in results["flips"]
    ]
    listed = (
        f"<details open><summary>Flips: {len(flips)}</summary>"
        + _table(("case", "truth", "reference", "engine"), flips)
        + "</details>"
        if flips
        else "<p>No label differs.</p>"
    )
    return (
        "<h2>Decisions</h2>"
        f"<p>Accuracy, 95 % Wilson: {escape(accuracies)}. Difference {difference['value']:+.4f}, "
        f"95 % {low:+.4f} to {high:+.4f} (Newcombe, paired, method 10).</p>"
        + _table(("", "reference right", "reference wrong"), rows, numbers=(1, 2))
        + listed
    )


def _scores(results: Mapping[str, Any]) -> str:
    rows = []
    for key, name in (
        ("kl_nats", "KL(reference || engine)"),
        ("jensen_shannon_nats", "Jensen-Shannon"),
    ):
        low, high = results[key]["interval_95"]
        figure = results[key]
        rows.append(
            (name, f"{figure['value']:.2e}", f"{low:.2e} to {high:.2e}", f"{figure['max']:.2e}")
        )
    shift = results["margin_shift_nats"]
    rows.append(
        ("margin shift, absolute", f"{shift['mean_abs']:.2e}", "", f"{shift['max_abs']:.2e}")
    )
    calibration = [
        (
            name,
            f"{found['temperature']:.4g}",
            f"{found['expected_calibration_error']:.4f}",
            f"{found['brier_score']:.4f}",
            f"{found['negative_log_likelihood']:.4f}",
        )
        for name, found in results["calibration"].items()
    ]
    return (
        "<h2>Scores, nats</h2>"
        + _table(("", "mean", "95 % interval", "largest"), rows, numbers=(1, 2, 3))
        + "<h2>Calibration before and after</h2>"
        + _table(
            ("", "temperature", "ECE, 15 bins of equal mass", "Brier", "NLL"),
            calibration,
            numbers=(1, 2, 3, 4),
        )
        + _plot(lambda axis: _draw_reliability(axis, results["calibration"]), (4.6, 4.2))
    )


def _sensitivity(results: Mapping[str, Any]) -> str:
    rows = [
        (
            name.replace("_", " "),
            f"{pair['reference_shift_nats']:.4g}",
            f"{pair['engine_shift_nats']:.4g}",
        )
        for name, pair in results["controls"].items()
    ]
    return (
        "<h2>Do photograph and text matter?</h2><p>By how much the margin moves, in nats, mean of "
        f"{results['cases']} cases. A dead cross-attention would give 0.</p>"
        + _table(("what is changed", "reference", "engine"), rows, numbers=(1, 2))
    )


def _blocks(checks: Mapping[str, Any]) -> str:
    outputs, constants = [], []
    for block in BLOCKS:
        results = checks[block]["results"]
        outputs += [
            (
                block,
                results["precision"],
                name,
                describe_off(d["relative_l2"]),
                f"{results['tolerance']:g}",
                "NaN" if d["cosine"] is None else f"{d['cosine']:.6f}",
                describe_off(d["max_abs"]),
            )
            for name, d in results["outputs"].items()
        ]
        constants += [
            (
                block,
                kind,
                worst["n"],
                describe_off(worst["relative_l2"]),
                describe_off(worst["gain_off_1"]),
                describe_off(worst["spread"]),
            )
            for kind, worst in results["constants"].items()
        ]
    heads = ("block", "weights", "output", "relative L2", "allowed", "cosine", "max abs")
    kinds = ("block", "constants", "n", "relative L2", "gain off 1", "spread of groups")
    return (
        "<h2>Blocks, fed the reference's inputs</h2>"
        + _table(heads, outputs, numbers=(3, 4, 5, 6))
        + "<h2>Constants against the checkpoint's: the worst of each kind</h2>"
        + _table(kinds, constants, numbers=(2, 3, 4, 5))
    )


def _layers(results: Mapping[str, Any]) -> str:
    def cell(difference: Mapping[str, Any] | None) -> str:
        return "" if difference is None else describe_off(difference["relative_l2"])

    rows = [
        (x["layer"], cell(x["own"]), cell(x["cross_attention"]), cell(x["stream"]))
        for x in results["layers"]
    ]
    heads = ("layer", "its own", "its cross-attention", "stream, errors added up")
    return (
        "<h2>Decoder layers, relative L2</h2>"
        + _plot(lambda axis: _draw_layers(axis, results), (9, 3.4))
        + "<details><summary>as a table</summary>"
        + _table(heads, rows, numbers=(0, 1, 2, 3))
        + "</details>"
    )


def _worst_cases(reference: Reference, results: Mapping[str, Any]) -> str:
    figures = []
    for case in results["worst_cases"]:
        image = reference.data[case["index"]].image
        square = crop_square(image, find_square(image), _PICTURE_PX)
        data = io.BytesIO()
        Image.fromarray(square).save(data, "JPEG", quality=85)
        flip = (
            ' <span class="bad">flip</span>'
            if case["shift_nats"] < -case["reference_margin_nats"]
            else ""
        )
        figures.append(
            f'<figure><img alt="{escape(case["file"])}" src="data:image/jpeg;base64,'
            f'{base64.b64encode(data.getvalue()).decode()}"><figcaption><b>{escape(case["file"])}'
            f"</b>{flip}<br>truth {escape(case['truth'])}<br>reference "
            f"{escape(case['reference_label'])} by {case['reference_margin_nats']:.3f} nats<br>"
            f"engine {escape(case['engine_label'])}, moved by {case['shift_nats']:+.4f}"
            "</figcaption></figure>"
        )
    return (
        f'<h2>The cases whose margin moved most</h2><div class="pictures">{"".join(figures)}</div>'
    )


def _identity(document: Document) -> str:
    engine, reference, data = (document[name] for name in ("engine", "reference", "data"))
    machine = document["machine"]
    made = "" if reference["made_the_engine"] else " (the engine names another checkpoint)"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    code = [
        ("engine, manifest.json", engine["manifest_sha256"]),
        (f"reference checkpoint{made}", reference["sha256"]),
        *((f"reference, {name}", value) for name, value in reference["files"].items()),
        (
            f"data {data['name']}: {data['cases']} cases, {data['patients']} patients",
            data["sha256"],
        ),
        ("certificate", document["sha256"]),
    ]
    rows: list[tuple[Any, ...]] = [
        (name, _Raw(f"<code>{escape(value)}</code>")) for name, value in code
    ]
    rows += [
        ("machine", f"{machine['cores']} cores of {machine['cpu']}, {machine['system']}"),
        ("engine ran on", f"{engine['backend']}, {engine['device']}, {engine['card']}"),
        ("reference ran on", f"{reference['device']}, PyTorch float32"),
        ("versions", f"Python {machine['python']}, {versions}"),
        ("date", document["date"]),
        ("labels", ", ".join(engine["labels"])),
    ]
    return "<h2>What was measured, and where (SHA-256)</h2>" + _table(("", ""), rows)


def _how_to_check(document: Document) -> str:
    signature = document.get("signature")
    signed = (
        f"Signed with Ed25519 by the key <code>{signature['key_sha256']}</code>."
        if signature
        else "Not signed: <code>--key private.pem</code> signs it."
    )
    return (
        "<h2>Check it</h2><p><code>mdf parity --check CERT.json ENGINE --public-key public.pem"
        "</code> says whether the certificate still speaks of an engine, without PyTorch; "
        "<code>mdf verify ENGINE</code> repeats the blocks on the machine that will use it. "
        f"{signed}</p>"
    )


def _draw_layers(axis: Any, results: Mapping[str, Any]) -> None:
    layers = results["layers"]
    own = [(x["layer"], x["own"]["relative_l2"]) for x in layers]
    crossed = [
        (x["layer"], x["cross_attention"]["relative_l2"]) for x in layers if x["cross_attention"]
    ]
    for points, mark, name in ((own, "o-", "layer"), (crossed, "D", "its cross-attention")):
        known = [point for point in points if point[1]]
        if known:
            axis.semilogy(*zip(*known, strict=True), mark, label=name, markersize=5)
    axis.axhline(results["tolerance"], color="#b3261e", linestyle="--", label="allowed")
    axis.set(xlabel="decoder layer, fed the reference's stream", ylabel="relative L2")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _draw_reliability(axis: Any, calibration: Mapping[str, Any]) -> None:
    axis.plot([0, 1], [0, 1], color="#98a2ad", linewidth=1)
    for name, mark in (("reference", "o-"), ("engine", "x--")):
        bins = calibration[name]["reliability"]
        axis.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], mark, label=name)
    least = min(b["confidence"] for found in calibration.values() for b in found["reliability"])
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(min(0.5, least), 1.02), ylim=(0, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def _plot(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    figure, data = Figure(figsize=size, layout="constrained"), io.StringIO()
    # The same numbers give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mdf", "font.size": 10}):
        draw(figure.subplots())
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()[data.getvalue().index("<svg") :]


class _Raw(str):
    """HTML that is already escaped."""


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Sequence[int] = ()
) -> str:
    def cell(tag: str, column: int, value: Any) -> str:
        kind = ' class="n"' if column in numbers else ""
        return f"<{tag}{kind}>{value if isinstance(value, _Raw) else escape(str(value))}</{tag}>"

    lines = [
        "<tr>" + "".join(cell(tag, i, value) for i, value in enumerate(row)) + "</tr>"
        for tag, row in [("th", heads), *(("td", row) for row in rows)]
    ]
    return f"<table>{''.join(lines)}</table>"

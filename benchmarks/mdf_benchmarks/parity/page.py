"""A certificate and its photographs in, one HTML page out that needs nothing else."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mdf_benchmarks.html import Markup, fill, to_document, to_note, to_section, to_table
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
from mdf_benchmarks.svg import BLUE, ORANGE, RED, SOFT, new_figure, to_svg
from mdf_sdk.errors import StorageError
from mdf_sdk.manifest import BLOCKS
from mdf_sdk.preprocessing import crop_square, find_square

_PICTURE_PX = 240
_MOST_FAULTS = 100


def save_page(parity: Parity, document: Document, path: Path) -> None:
    """Write the report: plots and photographs are inside, it loads nothing from anywhere.

    Raises:
        MissingExtraError: matplotlib is not installed.
        StorageError: it cannot be written.
    """
    results = {check["name"]: check["results"] for check in document["checks"]}
    parts = [
        _banner(document),
        to_section(
            "The chain, link by link",
            "Each block is fed the reference's own tensors, so a fault shows where it is and "
            "nowhere else.",
            _checks(document),
        ),
        _faults(document),
        to_section("What these data can prove", *describe_proof(document)),
    ]
    measured = bool(results["decisions"])
    if measured:
        parts += [
            _decisions(results["decisions"]),
            *_scores(results["scores"]),
            _sensitivity(results["sensitivity"]),
        ]
    parts += [*_blocks(results), _layers(results["decoder"])]
    if measured:
        parts.append(_worst_cases(parity.reference, results["scores"]))
    parts += [_identity(document), _how_to_check(document)]
    title = f"Parity of {document['engine']['model']} {document['engine']['precision']}"
    try:
        path.write_text(to_document(title, *parts), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror}; expected a file that can be written. Name another: --html"
        ) from error


def _banner(document: Document) -> Markup:
    fault, notice = document["first_fault"], document["engine"]["notice"]
    first = "<p>First at fault: <b>{}</b>, {}</p>"
    return fill(
        '<div class="banner {}"><h1>{}</h1><p>{}</p>{}{}</div>',
        document["verdict"],
        document["verdict"].upper(),
        describe_subject(document),
        fill(first, fault["check"], describe_fault(fault)) if fault else "",
        to_note(notice) if notice else "",
    )


def _checks(document: Document) -> Markup:
    marks = {True: Markup('<b class="pass">ok</b>'), False: Markup('<b class="fail">FAIL</b>')}
    rows = [
        (check["name"].replace("_", " "), marks[check["ok"]], describe_check(check))
        for check in document["checks"]
    ]
    return to_table(("check", "", "measured"), rows, words=range(3))


def _faults(document: Document) -> str:
    rows = [
        (check["name"], fault["where"], fault["found"], fault["expected"])
        for check in document["checks"]
        for fault in check["faults"]
    ]
    if not rows:
        return ""
    more = len(rows) - _MOST_FAULTS
    return to_section(
        "Faults",
        to_table(("check", "where", "found", "expected"), rows[:_MOST_FAULTS], words=range(4)),
        f"{more} more in the certificate." if more > 0 else "",
    )


def _decisions(results: Mapping[str, Any]) -> Markup:
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
    return to_section(
        "Decisions",
        f"Accuracy, 95 % Wilson: {accuracies}. Difference {difference['value']:+.4f}, "
        f"95 % {low:+.4f} to {high:+.4f} (Newcombe, paired, method 10).",
        to_table(("", "reference right", "reference wrong"), rows),
        fill(
            "<details open><summary>Flips: {}</summary>{}</details>",
            len(flips),
            to_table(("case", "truth", "reference", "engine"), flips, words=range(4)),
        )
        if flips
        else "No label differs.",
    )


def _scores(results: Mapping[str, Any]) -> list[Markup]:
    rows = []
    for key, name in (
        ("kl_nats", "KL(reference || engine)"),
        ("jensen_shannon_nats", "Jensen-Shannon"),
    ):
        mean, (low, high), most = (results[key][part] for part in ("value", "interval_95", "max"))
        rows.append((name, f"{mean:.2e}", f"{low:.2e} to {high:.2e}", f"{most:.2e}"))
    mean, most = (results["margin_shift_nats"][part] for part in ("mean_abs", "max_abs"))
    rows.append(("margin shift, absolute", f"{mean:.2e}", "", f"{most:.2e}"))
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
    head = ("", "temperature", "ECE, 15 bins of equal mass", "Brier", "NLL")
    plot = _plot_reliability(results["calibration"])
    return [
        to_section("Scores, nats", to_table(("", "mean", "95 % interval", "largest"), rows)),
        to_section("Calibration before and after", to_table(head, calibration), plot),
    ]


def _sensitivity(results: Mapping[str, Any]) -> Markup:
    rows = [
        (
            name.replace("_", " "),
            f"{pair['reference_shift_nats']:.4g}",
            f"{pair['engine_shift_nats']:.4g}",
        )
        for name, pair in results["controls"].items()
    ]
    return to_section(
        "Do photograph and text matter?",
        f"By how much the margin moves, in nats, mean of {results['cases']} cases. A dead "
        "cross-attention would give 0.",
        to_table(("what is changed", "reference", "engine"), rows),
    )


def _blocks(all_results: Mapping[str, Any]) -> list[Markup]:
    outputs, constants = [], []
    for block in BLOCKS:
        results = all_results[block]
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
    return [
        to_section("Blocks, fed the reference's inputs", to_table(heads, outputs, words=range(3))),
        to_section(
            "Constants against the checkpoint's: the worst of each kind",
            to_table(kinds, constants, words=range(2)),
        ),
    ]


def _layers(results: Mapping[str, Any]) -> Markup:
    def cell(difference: Mapping[str, Any] | None) -> str:
        return "" if difference is None else describe_off(difference["relative_l2"])

    rows = [
        (x["layer"], cell(x["own"]), cell(x["cross_attention"]), cell(x["stream"]))
        for x in results["layers"]
    ]
    heads = ("layer", "its own", "its cross-attention", "stream, errors added up")
    return to_section(
        "Decoder layers, relative L2",
        _plot_layers(results),
        fill("<details><summary>as a table</summary>{}</details>", to_table(heads, rows, words=())),
    )


def _worst_cases(reference: Reference, results: Mapping[str, Any]) -> Markup:
    figures = []
    for case in results["worst_cases"]:
        image = reference.data[case["index"]].image
        square = crop_square(image, find_square(image), _PICTURE_PX)
        data = io.BytesIO()
        Image.fromarray(square).save(data, "JPEG", quality=85)
        flipped = case["shift_nats"] < -case["reference_margin_nats"]
        figures.append(
            fill(
                '<figure><img alt="{file}" src="data:image/jpeg;base64,{image}"><figcaption>'
                "<b>{file}</b>{flip}<br>truth {truth}<br>reference {reference_label} by "
                "{reference_margin_nats:.3f} nats<br>engine {engine_label}, moved by "
                "{shift_nats:+.4f}</figcaption></figure>",
                image=base64.b64encode(data.getvalue()).decode(),
                flip=Markup(' <b class="fail">flip</b>') if flipped else "",
                **case,
            )
        )
    pictures = fill('<div class="pictures">{}</div>', Markup("".join(figures)))
    return to_section("The cases whose margin moved most", pictures)


def _identity(document: Document) -> Markup:
    engine, reference, data = (document[name] for name in ("engine", "reference", "data"))
    machine = document["machine"]
    made = "" if reference["made_the_engine"] else " (the engine names another checkpoint)"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    digests = [
        ("engine, manifest.json", engine["manifest_sha256"]),
        (f"reference checkpoint{made}", reference["sha256"]),
        *((f"reference, {name}", value) for name, value in reference["files"].items()),
        ("data {name}: {cases} cases, {patients} patients".format(**data), data["sha256"]),
        ("certificate", document["sha256"]),
    ]
    rows = [
        *((name, fill("<code>{}</code>", value)) for name, value in digests),
        ("machine", f"{machine['cores']} cores of {machine['cpu']}, {machine['system']}"),
        ("engine ran on", f"{engine['backend']}, {engine['device']}, {engine['card']}"),
        ("reference ran on", f"{reference['device']}, PyTorch float32"),
        ("versions", f"Python {machine['python']}, {versions}"),
        ("date", document["date"]),
        ("labels", ", ".join(engine["labels"])),
    ]
    table = to_table(("", ""), rows, words=range(2))
    return to_section("What was measured, and where (SHA-256)", table)


def _how_to_check(document: Document) -> Markup:
    signature = document.get("signature")
    signed = (
        fill("Signed with Ed25519 by the key <code>{}</code>.", signature["key_sha256"])
        if signature
        else Markup("Not signed: <code>--key private.pem</code> signs it.")
    )
    return to_section(
        "Check it",
        fill(
            "<p><code>mdf parity --check CERT.json ENGINE --public-key public.pem</code> says "
            "whether the certificate still speaks of an engine, without PyTorch; <code>mdf verify "
            "ENGINE</code> repeats the blocks on the machine that will use it. {}</p>",
            signed,
        ),
    )


def _plot_layers(results: Mapping[str, Any]) -> Markup:
    figure, axes = new_figure(3.4)
    for kind, mark, color, name in (
        ("own", "o-", BLUE, "layer"),
        ("cross_attention", "D", ORANGE, "its cross-attention"),
    ):
        found = [(x["layer"], x[kind]["relative_l2"]) for x in results["layers"] if x[kind]]
        if known := [point for point in found if point[1]]:
            axes.semilogy(*zip(*known, strict=True), mark, color=color, label=name, markersize=5)
    axes.axhline(results["tolerance"], color=RED, linestyle="--", label="allowed")
    axes.set(xlabel="decoder layer, fed the reference's stream", ylabel="relative L2")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return to_svg(figure, "layers")


def _plot_reliability(calibration: Mapping[str, Any]) -> Markup:
    figure, axes = new_figure(4.2, width_in=6.0)
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1)
    for name, mark, color in (("reference", "o-", BLUE), ("engine", "x--", ORANGE)):
        points = [(b["confidence"], b["accuracy"]) for b in calibration[name]["reliability"]]
        axes.plot(*zip(*points, strict=True), mark, color=color, label=name)
    least = min(b["confidence"] for found in calibration.values() for b in found["reliability"])
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(min(0.5, least), 1.02), ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return to_svg(figure, "reliability")

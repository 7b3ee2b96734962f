"""A checkpoint and reports of `mdf evaluate` in, a model card in Markdown out."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import torch

from mdf_sdk.errors import DataError
from mdf_training.checkpoint import (
    TOKENIZER,
    build_configured_model,
    checkpoint_digest,
    read_provenance,
)
from mdf_training.config import ModelConfig

TEMPLATE = "model_card.md"
TO_FILL = "**to be filled by who publishes this model: each collection, and its license.**"
# What a report of `mdf evaluate --json` holds, and what it may hold besides.
FIELDS = frozenset(
    {
        "model",
        "data",
        "n",
        "accuracy",
        "balanced_accuracy",
        "balanced_accuracy_interval_95",
        "per_class",
        "per_source",
        "controls",
        "swap_margin_shift",
        "calibration",
        "dice",
        "source_probe",
    }
)
COMPARISON = frozenset(
    {
        "skipped",
        "agreement",
        "flips",
        "max_score_difference",
        "reference_accuracy",
        "accuracy_difference",
        "balanced_accuracy_difference",
    }
)
CONTROLS = {
    "text_only": "text only, no photograph at all",
    "image_only": "photograph only, a neutral text",
    "blank_image": "a black photograph",
    "swapped_image": "the photograph of a case of another class",
}
LLAMA = (
    "**Built with Llama.** Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright "
    "© Meta Platforms, Inc. All Rights Reserved. That license and its acceptable use policy go "
    "with this model; read what they ask of its name, and where its multimodal models may be used."
)


def build_card(
    checkpoint: str | os.PathLike[str], reports: Sequence[str | os.PathLike[str]] = ()
) -> str:
    """Fill the template from a checkpoint's config and provenance, and from reports.

    Args:
        checkpoint: directory that `mdf train` wrote. `data_licenses` in its provenance.json, a
            sentence that its publisher adds, goes into the card.
        reports: files of what `mdf evaluate CHECKPOINT DATA --json` printed.

    Returns:
        Markdown.

    Raises:
        CheckpointError: no checkpoint there.
        DataError: a file is no such report, or lacks a field, or has one that is unknown here, or
            is of a model with other labels or masks.
    """
    folder = Path(checkpoint)
    with torch.device("meta"):
        model = build_configured_model(folder)
    config, provenance = model.config, read_provenance(folder)
    parameters = sum(p.numel() for p in model.parameters())
    image = config.image
    results = [_results_of(path, config) for path in reports]
    facts = {
        "preset": config.preset,
        "parameters": f"{parameters:,}",
        "labels": ", ".join(config.labels),
        "masks": ", ".join(config.mask_kinds),
        "photograph": f"{image.tower_px} px for the vision tower, {image.unet_px} px for the U-Net",
        "text": f"up to {config.prompt.max_text_tokens} tokens, English",
        "made": provenance.get("created", "not recorded"),
        "by": _versions(provenance),
    }
    template = (
        resources.files("mdf_training.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    return Template(template).substitute(
        name=folder.resolve().name,
        notice=provenance.get("notice") or "Not for clinical use.",
        facts=_table(("", ""), facts.items()),
        labels=", ".join(config.labels),
        mask_kinds=", ".join(config.mask_kinds),
        data=_data(provenance),
        licenses=provenance.get("data_licenses") or TO_FILL,
        training=_training(provenance),
        recipe=_recipe(provenance),
        results="\n\n".join(results)
        or "None was given to this card: nothing is known of how well it does.",
        weights=_weights(provenance, config.preset),
        identity=_table(
            ("SHA-256", ""),
            {
                "config.json and the weights": f"`{checkpoint_digest(folder)}`",
                TOKENIZER: f"`{sha256((folder / TOKENIZER).read_bytes()).hexdigest()}`",
            }.items(),
        ),
    )


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `mdf evaluate --json` printed: the JSON document alone, or as the last line.

    Raises:
        DataError: no such file, no such report, or other fields than this release's.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: {reason}; expected {_ORIGIN}") from None
    report = _parse(text) or _parse(text.rpartition("\n")[2])
    if report is None:
        raise DataError(f"{path}: found no JSON object, expected {_ORIGIN}")
    problems = [f"missing {name}" for name in sorted(FIELDS - report.keys())]
    problems += [f"unknown {name}" for name in sorted(report.keys() - FIELDS - COMPARISON)]
    if problems:
        raise DataError(f"{path}: {', '.join(problems)}; expected {_ORIGIN}")
    return report


_ORIGIN = "what this release prints: mdf evaluate CHECKPOINT DATA --json > report.json"


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _versions(provenance: Mapping[str, Any]) -> str:
    versions = provenance.get("built_with", {})
    return ", ".join(f"{name} {v}" for name, v in versions.items()) or "not recorded"


def _data(provenance: Mapping[str, Any]) -> str:
    facts = {
        "data": _name(provenance.get("data", "not recorded")),
        "cases trained on": provenance.get("training_cases", "not recorded"),
        "cases held out": provenance.get("validation_cases", "not recorded"),
        "SHA-256 of its rows": f"`{provenance.get('rows', 'not recorded')}`",
    }
    return _table(("", ""), facts.items())


def _training(provenance: Mapping[str, Any]) -> str:
    history = provenance.get("history", [])
    if not history:
        return "Its provenance names no epoch: the weights are as they were built."
    last = history[-1]
    return (
        f"{len(history)} epochs of label loss and segmentation loss. After the last, on the cases "
        f"held out: label loss {last['validation_loss']:.4f}, {last['validation_accuracy']:.4f} of "
        "the labels right. These cases chose the temperature; they are no test."
    )


def _recipe(provenance: Mapping[str, Any]) -> str:
    recipe = provenance.get("recipe", {})
    shown = {name: f"`{json.dumps(value)}`" for name, value in recipe.items()}
    return _table(("recipe", ""), shown.items()) if shown else ""


def _weights(provenance: Mapping[str, Any], preset: str) -> str:
    lines = []
    if backbone := provenance.get("backbone"):
        lines.append(
            f"{LLAMA} Its language model and vision tower started from `{backbone['directory']}` "
            f"(SHA-256 of its config.json `{backbone['config_sha256'][:12]}`, of its index "
            f"`{backbone['index_sha256'][:12]}`)."
        )
    elif preset == "smol-135m":
        lines.append(
            "Its language model started from SmolLM2-135M-Instruct (Apache-2.0), its vision tower "
            "from random weights."
        )
    else:
        lines.append("Its language model and vision tower started from random weights.")
    if unet := provenance.get("unet_weights"):
        lines.append(
            f"Its U-Net encoder started from `{unet['file']}` (SHA-256 `{unet['sha256']}`)."
        )
    else:
        lines.append("Its U-Net started from random weights.")
    return " ".join(lines)


def _results_of(path: str | os.PathLike[str], config: ModelConfig) -> str:
    """Write the section of one report; refuse one that another model's labels or masks are in."""
    report = read_report(path)
    try:
        for what, known in (("per_class", config.labels), ("dice", config.mask_kinds)):
            if unknown := sorted(report[what].keys() - set(known)):
                raise DataError(
                    f"{path}, {what}: found {', '.join(unknown)}, expected names of this "
                    f"checkpoint, which has {', '.join(known)}: the report is another model's. "
                    f"Give {_ORIGIN}"
                )
        return _results(report)
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: found a field that is damaged ({type(error).__name__}: {error}), expected "
            f"{_ORIGIN}"
        ) from error


def _results(report: Mapping[str, Any]) -> str:
    """One evaluation as a section: every figure that the report has, with its 95 % interval."""
    balanced = {
        "value": report["balanced_accuracy"],
        "interval_95": report["balanced_accuracy_interval_95"],
    }
    rows = [("accuracy", report["accuracy"]), ("balanced accuracy", balanced)]
    rows += [(f"of {label}", p) for label, p in report["per_class"].items()]
    rows += [(f"from {source}", p) for source, p in report["per_source"].items()]
    rows += [(f"control: {CONTROLS.get(n, n)}", p) for n, p in report["controls"].items()]
    rows += [(f"Dice of {kind}", d) for kind, d in report["dice"].items() if d["n"]]
    parts = [
        f"### `{_name(report['model'])}` on `{_name(report['data'])}`, {report['n']} cases",
        _table(("", "value", "95 % interval", "cases"), (_row(*row) for row in rows)),
    ]
    found = report["calibration"]
    parts.append(
        f"Calibration: expected error {found['expected_calibration_error']:.3f}, Brier score "
        f"{found['brier_score']:.3f}, negative log-likelihood "
        f"{found['negative_log_likelihood']:.3f}, at temperature {found['temperature']:.3f}."
    )
    if (shift := report["swap_margin_shift"]) is not None:
        parts.append(f"Swapping the photograph moves the score margin by {shift:.2f} on average.")
    parts.append(_probe(report["source_probe"]))
    if skipped := report.get("skipped"):
        parts.append(f"{len(skipped)} further cases could not be read and are left out.")
    if "accuracy_difference" in report:
        rows = [
            ("accuracy of the reference", report["reference_accuracy"]),
            ("accuracy beyond the reference", report["accuracy_difference"]),
            ("balanced accuracy beyond the reference", report["balanced_accuracy_difference"]),
            ("same label as the reference", report["agreement"]),
        ]
        parts.append(
            _table(("paired", "value", "95 % interval", "cases"), (_row(*row) for row in rows))
        )
    return "\n\n".join(parts)


def _probe(probe: Mapping[str, Any] | None) -> str:
    if probe is None:
        return "The source probe was not run."
    if not probe:
        return "Source probe: no class has two sources with enough patients to tell apart."
    rows = [
        (
            label,
            f"{p['balanced_accuracy']['value']:.3f}",
            _interval(p["balanced_accuracy"]),
            f"{p['chance']:.3f}",
            ", ".join(p["sources"]),
        )
        for label, p in probe.items()
    ]
    header = ("source told from the features, within", "balanced accuracy", "95 % interval")
    return _table((*header, "by chance", "sources"), rows)


def _row(name: str, figure: Mapping[str, Any]) -> tuple[str, str, str, str]:
    n = figure.get("n")
    right = f"{figure['correct']} of {n}" if "correct" in figure else n
    return name, f"{figure['value']:.3f}", _interval(figure), "" if right is None else str(right)


def _interval(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval_95"]
    return f"{low:.3f} to {high:.3f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    """A data set's own names must not break the table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _name(path: str) -> str:
    """Leave a path's last part: a card is published, a machine's folders are not."""
    return Path(path).name or path

"""`mdf evaluate`, `mdf baseline`, `mdf card`: command lines in, reports and a model card out."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdf_sdk.errors import InputError, StorageError
from mdf_sdk.extras import import_extra
from mdf_training.arguments import add_json, names

if TYPE_CHECKING:  # `mdf --help` starts without them
    import numpy as np
    import numpy.typing as npt

    from mdf_training.data.cases import DataSet


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf evaluate CHECKPOINT_OR_ENGINE DATA [--reference OTHER]`."""
    parser = commands.add_parser("evaluate", help="accuracy with intervals and controls")
    parser.add_argument("model", type=Path, metavar="CHECKPOINT_OR_ENGINE")
    parser.add_argument("data", help="folder with labels.csv, or synthetic:COUNT:SEED")
    parser.add_argument(
        "--split", type=Path, metavar="FILE", help="evaluate on a part of it (see mdf split)"
    )
    parser.add_argument("--part", help="the part; test if left out")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="OTHER",
        help="also compare, case by case, with another model of the same labels: a checkpoint, an "
        "engine, a CNN, or its --predictions of the same data",
    )
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="CSV for the label scores of every case"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out, and name, what cannot be read"
    )
    add_json(parser)
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    from mdf_training.data.folder import drop_broken, open_data
    from mdf_training.evaluation.evaluate import compare_scores, evaluate_cases, open_scorer
    from mdf_training.evaluation.predictions import save_predictions

    if args.part and not args.split:
        raise InputError(f"--part {args.part}: found no --split, expected the file of its parts.")
    scorer = open_scorer(args.model)
    part = {"split": args.split, "part": args.part or "test"} if args.split else {}
    data = open_data(args.data, scorer.labels, **part)
    data, broken = drop_broken(data, skip=True) if args.skip_broken else (data, ())
    reference = _reference_scores(args.reference, scorer.labels, data) if args.reference else None
    evaluation = evaluate_cases(scorer, data)
    report = evaluation.report
    if broken:
        report["skipped"] = list(broken)
    if reference is not None:
        report |= compare_scores(evaluation.scores, reference, scorer.labels, data)
    if args.predictions:
        save_predictions(args.predictions, scorer.labels, data, evaluation.scores)
    print(format_report(report))
    if reference is not None:
        print(format_comparison(report, str(args.reference)))
    if args.json:
        print(json.dumps({"model": str(args.model), "data": args.data, **report}))
    return 0


def _reference_scores(
    path: Path, labels: Sequence[str], data: "DataSet"
) -> "npt.NDArray[np.float32]":
    """Score the data with another model, or read what it scored."""
    from mdf_training.evaluation.evaluate import check_same_labels, open_scorer, score_cases
    from mdf_training.evaluation.predictions import read_predictions

    if path.is_file():
        return read_predictions(path, labels, data)
    scorer = open_scorer(path)
    check_same_labels(labels, scorer.labels)
    return score_cases(scorer, data)


def format_report(report: dict[str, Any]) -> str:
    """Lay `evaluate`'s result out as a table for people."""
    balanced = {
        "value": report["balanced_accuracy"],
        "interval_95": report["balanced_accuracy_interval_95"],
    }
    rows = [("accuracy", report["accuracy"]), ("balanced accuracy", balanced)]
    rows += [(f"  {label}", p) for label, p in report["per_class"].items()]
    if len(report["per_source"]) > 1:
        rows += [(f"  from {source}", p) for source, p in report["per_source"].items()]
    rows += [(name.replace("_", " "), p) for name, p in report["controls"].items()]
    rows += [(f"Dice of {kind}", d) for kind, d in report["dice"].items() if d["n"]]
    width = max(20, *(len(name) for name, _ in rows))
    lines = [f"{report['n']} cases".ljust(width) + "   correct   95 % interval"]
    if skipped := report.get("skipped"):
        lines.insert(0, f"{len(skipped)} cases that cannot be read are left out: {skipped[0]} ...")
    for name, p in rows:
        low, high = p["interval_95"]
        lines.append(f"{name:{width}s}   {p['value']:7.3f}   {low:.3f} to {high:.3f}")
    if (shift := report["swap_margin_shift"]) is not None:
        lines.append(f"swapping the image moves the score margin by {shift:.2f} on average")
    found = report["calibration"]
    lines.append(
        f"calibration error {found['expected_calibration_error']:.3f}, "
        f"Brier score {found['brier_score']:.3f}, "
        f"negative log-likelihood {found['negative_log_likelihood']:.3f}"
    )
    lines += _probe_lines(report["source_probe"])
    return "\n".join(lines)


def _probe_lines(probe: dict[str, Any] | None) -> list[str]:
    if probe is None:
        return ["source probe: not run. Install what it needs: pip install 'mdf-mllm[training]'"]
    return [
        f"source told from the features, within {label}: balanced accuracy "
        f"{p['balanced_accuracy']['value']:.3f} ({_interval(p['balanced_accuracy'])}), "
        f"{p['chance']:.3f} by chance"
        for label, p in probe.items()
    ]


def format_comparison(report: dict[str, Any], reference: str) -> str:
    """Say how a model and its reference differ on the same cases."""
    same, right = report["agreement"], report["accuracy_difference"]
    balanced = report["balanced_accuracy_difference"]
    return "\n".join(
        (
            f"same label as {reference}: {same['value']:.4f} ({_interval(same, 4)}), "
            f"{len(report['flips'])} flips",
            f"accuracy beyond it: {right['value']:+.3f} ({_interval(right)}), "
            f"{right['only_a']} cases right here alone, {right['only_b']} there alone, "
            f"McNemar p = {right['mcnemar_p']:.2g}",
            f"balanced accuracy beyond it: {balanced['value']:+.3f} ({_interval(balanced)})",
        )
    )


def _interval(figure: dict[str, Any], digits: int = 3) -> str:
    low, high = figure["interval_95"]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def add_baseline(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf baseline BACKBONE_OR_CHECKPOINT DATA [--split FILE --part PART]`."""
    parser = commands.add_parser(
        "baseline", help="a model that answers in words, beside its label scores"
    )
    parser.add_argument(
        "model",
        metavar="BACKBONE_OR_CHECKPOINT",
        help="Hugging Face directory of Llama 3.2 Vision, checkpoint, or smol-135m",
    )
    parser.add_argument("data", help="folder with labels.csv, or synthetic:COUNT:SEED")
    parser.add_argument(
        "--labels", type=names, metavar="A,B,...", help="label set; Acquired,Inherited if left out"
    )
    parser.add_argument(
        "--split", type=Path, metavar="FILE", help="read a part of it alone (see mdf split)"
    )
    parser.add_argument("--part", help="the part; test if left out")
    add_json(parser)
    parser.set_defaults(run=run_baseline)


def run_baseline(args: argparse.Namespace) -> int:
    """Let the model answer, and print how often it named the right label."""
    from mdf_training.data.folder import open_data

    if args.part and not args.split:
        raise InputError(f"--part {args.part}: found no --split, expected the file of its parts.")
    part = {"split": args.split, "part": args.part or "test"} if args.split else {}
    free_text = import_extra("mdf_training.evaluation.free_text", "training")
    speaker = free_text.open_speaker(args.model, args.labels)
    data = open_data(args.data, speaker.labels, **part)
    report = free_text.measure_baseline(speaker, data)
    print(format_baseline(report))
    if args.json:
        print(json.dumps({"model": args.model, "data": args.data, **report}))
    return 0


def format_baseline(report: dict[str, Any]) -> str:
    """Lay `measure_baseline`'s result out as a table for people."""
    rows = [
        ("free text, correct", report["free_text"]["accuracy"]),
        ("free text, None", report["none"]),
        ("label set, correct", report["label_set"]["accuracy"]),
        ("read-out gap", report["read_out_gap"]),
    ]
    lines = [f"{report['n']} cases".ljust(20) + "     share   95 % interval"]
    for name, figure in rows:
        low, high = figure["interval_95"]
        lines.append(f"{name:20s}   {figure['value']:7.3f}   {low:.3f} to {high:.3f}")
    return "\n".join(lines)


def add_card(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf card CHECKPOINT [--report FILE ...] [--out CARD.md]`."""
    parser = commands.add_parser("card", help="write a checkpoint's model card")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="what `mdf evaluate CHECKPOINT DATA --json` printed",
    )
    parser.add_argument(
        "--out", type=Path, metavar="CARD.md", help="new file; printed when left out"
    )
    add_json(parser)
    parser.set_defaults(run=run_card)


def run_card(args: argparse.Namespace) -> int:
    """Write or print the card."""
    if args.out and args.out.exists():  # its publisher may have filled it in by hand
        raise InputError(f"{args.out}: found it there, expected a new file. Name another --out.")
    card = import_extra("mdf_training.evaluation.model_card", "training").build_card(
        args.checkpoint, args.report
    )
    if args.out:
        try:
            args.out.write_text(card, encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"{args.out}: {error.strerror}; expected a file that can be written"
            ) from None
        print(f"{args.out}: fill in the licenses of the data before you publish it")
    else:
        print(card)
    if args.json:
        print(json.dumps({"checkpoint": str(args.checkpoint), "card": card}))
    return 0

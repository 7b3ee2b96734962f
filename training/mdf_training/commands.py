"""`mdf train` and `mdf evaluate`: command lines in, a checkpoint or a report out."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdf_sdk.errors import InputError
from mdf_sdk.extras import import_extra

if TYPE_CHECKING:  # `mdf --help` starts without them
    import numpy as np
    import numpy.typing as npt

    from mdf_training.cases import DataSet


def add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf train --preset P --data DATA --out CHECKPOINT [--labels A,B] [--epochs N]`."""
    parser = commands.add_parser("train", help="train a fused model")
    parser.add_argument("--preset", required=True, help="nano, smol-135m or llama-3.2-11b")
    parser.add_argument(
        "--data", required=True, help="folder with labels.csv, or synthetic:COUNT:SEED"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="CHECKPOINT", help="new directory"
    )
    parser.add_argument(
        "--labels", type=_names, metavar="A,B,...", help="label set; Acquired,Inherited if left out"
    )
    parser.add_argument(
        "--mask-kinds",
        type=_names,
        metavar="A,B,...",
        help="kinds of mask to segment; vessel,lesion,disc if left out",
    )
    parser.add_argument(
        "--unet-weights",
        type=Path,
        metavar="FILE",
        help="ImageNet weights of the U-Net encoder: a state dict, .safetensors or .pth",
    )
    parser.add_argument(
        "--backbone",
        type=Path,
        metavar="DIR",
        help="your copy of Llama-3.2-11B-Vision or -Instruct: a Hugging Face directory",
    )
    parser.add_argument("--epochs", type=int, help="the preset's own number when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--split", type=Path, metavar="FILE", help="train on its part train (see mdf split)"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out pictures that cannot be read"
    )
    parser.add_argument(
        "--allow-label-words", action="store_true", help="train on texts that name the label"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Train; the first process says where the checkpoint is."""
    from mdf_training.config import load_preset
    from mdf_training.recipes import RECIPES

    recipe = dataclasses.replace(RECIPES[load_preset(args.preset).preset], seed=args.seed)
    if args.epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=args.epochs)
    processes = import_extra("mdf_training.distributed", "training").Processes.join()
    train = import_extra("mdf_training.trainer", "training").train
    provenance = train(
        args.preset,
        args.data,
        args.out,
        recipe=recipe,
        resume=args.resume,
        labels=args.labels,
        mask_kinds=args.mask_kinds,
        unet_weights=args.unet_weights,
        backbone=args.backbone,
        split=args.split,
        skip_broken=args.skip_broken,
        allow_label_words=args.allow_label_words,
    )
    processes.leave()
    if not processes.is_main:
        return 0
    print(f"{args.out}: {args.preset}, {recipe.epochs} epochs. {provenance['notice']}")
    print(f"Next: mdf evaluate {args.out} DATA; mdf export {args.out} ENGINE --precision int4")
    if args.json:
        print(json.dumps({"checkpoint": str(args.out), **provenance}))
    return 0


def _names(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


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
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    from mdf_training.data import drop_broken, open_data
    from mdf_training.evaluation import compare_scores, evaluate_cases, open_scorer
    from mdf_training.predictions import save_predictions

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
    from mdf_training.evaluation import check_same_labels, open_scorer, score_cases
    from mdf_training.predictions import read_predictions

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

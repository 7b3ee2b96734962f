"""`mdf train` and `mdf evaluate`: command lines in, a checkpoint or a report out."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from mdf_sdk.extras import import_extra


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
    parser.add_argument("--epochs", type=int, help="the preset's own number when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Train and say where the checkpoint is."""
    from mdf_training.config import load_preset
    from mdf_training.recipes import RECIPES

    recipe = dataclasses.replace(RECIPES[load_preset(args.preset).preset], seed=args.seed)
    if args.epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=args.epochs)
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
    )
    print(f"{args.out}: {args.preset}, {recipe.epochs} epochs. {provenance['notice']}")
    print(f"Next: mdf evaluate {args.out} DATA; mdf export {args.out} ENGINE --precision int4")
    if args.json:
        print(json.dumps({"checkpoint": str(args.out), **provenance}))
    return 0


def _names(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf evaluate CHECKPOINT_OR_ENGINE DATA`."""
    parser = commands.add_parser("evaluate", help="accuracy with intervals and controls")
    parser.add_argument("model", type=Path, metavar="CHECKPOINT_OR_ENGINE")
    parser.add_argument("data", help="folder with labels.csv, or synthetic:COUNT:SEED")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="CHECKPOINT", help="also count the same decisions"
    )
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    from mdf_training.data import open_data
    from mdf_training.evaluation import compare_decisions, evaluate, open_scorer

    scorer = open_scorer(args.model)
    data = open_data(args.data, scorer.labels)
    reference = open_scorer(args.reference) if args.reference else None
    report = evaluate(scorer, data)
    print(format_report(report))
    if reference:
        report |= compare_decisions(scorer, reference, data)
        low, high = report["agreement"]["interval_95"]
        print(
            f"same label as {args.reference}: {report['agreement']['value']:.4f} "
            f"({low:.4f} to {high:.4f}), {len(report['flips'])} flips"
        )
    if args.json:
        print(json.dumps({"model": str(args.model), "data": args.data, **report}))
    return 0


def format_report(report: dict[str, Any]) -> str:
    """Lay `evaluate`'s result out as a table for people."""
    rows = [("accuracy", report["accuracy"])]
    rows += [(f"  {label}", p) for label, p in report["per_class"].items()]
    rows += [(name.replace("_", " "), p) for name, p in report["controls"].items()]
    lines = [f"{report['n']} cases".ljust(20) + "   correct   95 % interval"]
    for name, p in rows:
        low, high = p["interval_95"]
        lines.append(f"{name:20s}   {p['value']:7.3f}   {low:.3f} to {high:.3f}")
    if (shift := report["swap_margin_shift"]) is not None:
        lines.append(f"swapping the image moves the score margin by {shift:.2f} on average")
    return "\n".join(lines)

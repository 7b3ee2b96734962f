"""`mdf baseline` and `mdf card`: a model in, its answers in words or its model card out."""

import argparse
import json
from pathlib import Path
from typing import Any

from mdf_sdk.errors import InputError, StorageError
from mdf_sdk.extras import import_extra


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
        "--labels", type=_names, metavar="A,B,...", help="label set; Acquired,Inherited if left out"
    )
    parser.add_argument(
        "--split", type=Path, metavar="FILE", help="read a part of it alone (see mdf split)"
    )
    parser.add_argument("--part", help="the part; test if left out")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_baseline)


def run_baseline(args: argparse.Namespace) -> int:
    """Let the model answer, and print how often it named the right label."""
    from mdf_training.data import open_data

    if args.part and not args.split:
        raise InputError(f"--part {args.part}: found no --split, expected the file of its parts.")
    part = {"split": args.split, "part": args.part or "test"} if args.split else {}
    free_text = import_extra("mdf_training.free_text", "training")
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
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_card)


def run_card(args: argparse.Namespace) -> int:
    """Write or print the card."""
    if args.out and args.out.exists():  # its publisher may have filled it in by hand
        raise InputError(f"{args.out}: found it there, expected a new file. Name another --out.")
    card = import_extra("mdf_training.model_card", "training").build_card(
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


def _names(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))

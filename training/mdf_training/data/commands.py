"""`mdf import-data`, `mdf check-data` and `mdf split`: other people's data in, a study's out."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from mdf_training.arguments import add_json, names

DATA_HELP = "folder with labels.csv, or synthetic:COUNT:SEED"


def add_import_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf import-data LAYOUT SOURCE OUT`."""
    parser = commands.add_parser("import-data", help="make a data set folder of a public set")
    parser.add_argument("layout", help="fives, hrf, idrid, odir-5k or table")
    parser.add_argument("source", type=Path, help="its folder; of a table, the CSV or .xlsx file")
    parser.add_argument("out", type=Path, help="new directory")
    parser.add_argument(
        "--also",
        nargs=2,
        action="append",
        default=[],
        metavar=("LAYOUT", "SOURCE"),
        help="another source of the same data set; may be repeated",
    )
    parser.add_argument(
        "--diseases",
        type=Path,
        metavar="MAP.csv",
        help="disease,label; Acquired and Inherited when left out",
    )
    parser.add_argument(
        "--columns",
        type=_assignments,
        metavar="image=A,diagnosis=B,...",
        help="of a table: its columns for image, diagnosis, text, patient_id, source, mask",
    )
    parser.add_argument(
        "--allow-label-words", action="store_true", help="import texts that name the diagnosis"
    )
    add_json(parser)
    parser.set_defaults(run=run_import_data)


def run_import_data(args: argparse.Namespace) -> int:
    """Import and say what came in and what was left out."""
    from mdf_training.data.layouts import import_data

    report = import_data(
        [(args.layout, args.source), *((layout, Path(path)) for layout, path in args.also)],
        args.out,
        diseases=args.diseases,
        columns=args.columns,
        allow_label_words=args.allow_label_words,
    )
    print(f"{args.out}: {report['cases']} cases: {_listed(report['labels'])}")
    if report["left_out"]:
        count = sum(report["left_out"].values())
        print(f"left out: {count} cases: {_listed(report['left_out'])}")
    _print_all("warning", report["warnings"])
    print(f"Next: mdf check-data {args.out}")
    if args.json:
        print(json.dumps({"data": str(args.out), **report}))
    return 0


def add_check_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf check-data DATA [--split FILE] [--labels A,B]`."""
    parser = commands.add_parser("check-data", help="read all of a data set and look for traps")
    parser.add_argument("data", help=DATA_HELP)
    parser.add_argument("--split", type=Path, metavar="FILE", help="a file that mdf split wrote")
    parser.add_argument(
        "--labels",
        type=names,
        metavar="A,B,...",
        help="the labels that may occur; any if left out",
    )
    add_json(parser)
    parser.set_defaults(run=run_check_data)


def run_check_data(args: argparse.Namespace) -> int:
    """Inspect and print; 1 where something must be mended."""
    from mdf_training.data.folder import open_data
    from mdf_training.data.inspection import inspect_data
    from mdf_training.data.splits import load_split

    data = open_data(args.data, args.labels)
    parts = load_split(args.split, data.rows) if args.split else None
    report = inspect_data(data, args.labels or data.labels, parts)
    print(f"{args.data}: {report['n']} cases of {report['patients']} patients")
    for title in ("labels", "parts"):
        for name, counts in report[title].items():
            print(f"  {name}: {sum(counts.values())} ({_listed(counts)})")
    print(f"  sizes in px: {_listed(dict(list(report['sizes'].items())[:5]))}")
    for kind, facts in report["masks"].items():
        print(
            f"  mask {kind}: {facts['annotated']} cases, {facts['empty']} of them empty,"
            f" {facts['mean_area']:.2%} of the picture on average"
        )
    print(f"  near duplicates: {len(report['duplicates'])} pairs")
    _print_all("warning", report["warnings"])
    _print_all("error", report["errors"])
    if args.json:
        print(json.dumps({"data": args.data, **report}))
    return 1 if report["errors"] else 0


def add_split(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf split DATA --out FILE [--parts A=X,B=Y] [--leave-source-out NAME]`."""
    parser = commands.add_parser("split", help="draw train, validation and test by patient")
    parser.add_argument("data", help=DATA_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new CSV file")
    parser.add_argument(
        "--parts",
        type=_shares,
        metavar="A=X,...",
        help="share of each part; train=0.6,validation=0.1,test=0.3 when left out,"
        " train=0.9,validation=0.1 with --leave-source-out",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--leave-source-out",
        type=names,
        metavar="A,B,...",
        help="test on these sources alone; their patients are nowhere else",
    )
    add_json(parser)
    parser.set_defaults(run=run_split)


def run_split(args: argparse.Namespace) -> int:
    """Split, save and print the parts."""
    from mdf_training.data.folder import open_data
    from mdf_training.data.inspection import duplicate_pairs
    from mdf_training.data.splits import (
        TEST,
        TRAIN,
        VALIDATION,
        check_shares,
        leave_sources_out,
        make_split,
        save_split,
    )

    sources = args.leave_source_out
    shares = args.parts or (
        {TRAIN: 0.9, VALIDATION: 0.1} if sources else {TRAIN: 0.6, VALIDATION: 0.1, TEST: 0.3}
    )
    check_shares(shares)
    data = open_data(args.data)
    pairs = duplicate_pairs(data)
    if sources:
        parts = leave_sources_out(data.rows, sources, shares, args.seed, pairs)
    else:
        parts = make_split(data.rows, shares, args.seed, pairs)
    save_split(args.out, data.rows, parts)
    counts = {
        part: Counter(row.label for row, p in zip(data.rows, parts, strict=True) if p == part)
        for part in dict.fromkeys(parts)
    }
    print(f"{args.out}: {len(data)} cases, {len(pairs)} pairs of near duplicates kept together")
    for part, labels in counts.items():
        print(f"  {part}: {labels.total()} ({_listed(labels)})")
    print(f"Next: mdf train --data {args.data} --split {args.out} ...")
    if args.json:
        document = {"split": str(args.out), "seed": args.seed, "parts": counts, "pairs": len(pairs)}
        print(json.dumps(document))
    return 0


def _listed(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _print_all(kind: str, messages: list[str]) -> None:
    for message in messages:
        print(f"{kind}: {message}")


def _assignments(words: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in names(words)]
    if any(not (name and equals and value) for name, equals, value in pairs):
        raise argparse.ArgumentTypeError(f"found {words!r}, expected NAME=VALUE,NAME=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _shares(words: str) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in _assignments(words).items()}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {words!r}, expected shares such as train=0.6,validation=0.1,test=0.3"
        ) from None

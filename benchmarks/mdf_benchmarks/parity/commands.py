"""`mdf parity`: engine and checkpoint in, a certificate out; a certificate in, yes or no out."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mdf_sdk.errors import InputError, StorageError
from mdf_sdk.extras import import_extra


def add_parity(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf parity ENGINE --reference CHECKPOINT --data DATA`, and its `--check CERT`."""
    parser = commands.add_parser(
        "parity", help="prove an engine against its checkpoint in PyTorch, and certify it"
    )
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--reference", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--data", help="labelled, unseen cases: folder with labels.csv, or synthetic:COUNT:SEED"
    )
    parser.add_argument(
        "--split", type=Path, metavar="FILE", help="read a part of DATA (see mdf split)"
    )
    parser.add_argument("--part", help="the part; test if left out")
    parser.add_argument(
        "--cases", type=int, metavar="N", help="as many, spread over DATA; all when left out"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.02,
        help="by how much the engine's accuracy may be lower; default 0.02",
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="one-sided, of the proof; default 0.95"
    )
    parser.add_argument("--out", type=Path, metavar="CERT.json", help="write the certificate")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report to look at")
    parser.add_argument(
        "--key", type=Path, metavar="PRIVATE", help="sign it with this Ed25519 key (PEM)"
    )
    parser.add_argument("--device", default="auto", help="of the engine")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="CERT.json",
        help="measure nothing: does this certificate speak of ENGINE? Needs no PyTorch",
    )
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="PUBLIC",
        help="with --check: refuse a certificate that this Ed25519 key (PEM) has not signed",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_parity)


def run_parity(args: argparse.Namespace) -> int:
    """Measure and certify, or check a certificate; 1 is a failing verdict."""
    _check_words(args)
    if args.check is not None:
        return _check(args)
    _check_targets(args)
    decisions = import_extra("mdf_benchmarks.parity.decisions", "all")
    compare = import_extra("mdf_benchmarks.parity.compare", "all")
    page = import_extra("mdf_benchmarks.parity.page", "all")
    from mdf_benchmarks.parity.certificate import save_certificate, seal
    from mdf_benchmarks.parity.text import format_parity

    parity = compare.prove_parity(
        args.engine,
        args.reference,
        args.data,
        decisions.Thresholds(args.margin, args.confidence),
        cases=args.cases,
        split=args.split,
        part=args.part,
        device=args.device,
    )
    document = seal(parity.to_dict(), args.key)
    print(format_parity(document))
    if args.out is not None:
        save_certificate(document, args.out)
        print(f"certificate {args.out}")
    if args.html is not None:
        page.save_page(parity, document, args.html)
        print(f"report {args.html}: it shows photographs")
    if args.json:
        print(json.dumps(document, allow_nan=False))
    return 0 if parity.ok else 1


def _check(args: argparse.Namespace) -> int:
    from mdf_benchmarks.parity.certificate import check_certificate

    report = check_certificate(args.check, args.engine, args.public_key)
    print(report)
    if args.json:
        print(json.dumps(report.to_dict(), allow_nan=False))
    return 0 if report.ok else 1


def _check_words(args: argparse.Namespace) -> None:
    """Raise InputError for words that do not go together."""
    given: dict[str, Any] = {
        f"--{name.replace('_', '-')}": getattr(args, name) is not None
        for name in ("reference", "data", "split", "part", "cases", "out", "html", "key")
    }
    if args.check is not None:
        for name, there in given.items():
            if there:
                raise InputError(f"{name}: found it beside --check, which measures nothing")
        return
    for name in ("--reference", "--data"):
        if not given[name]:
            raise InputError(
                f"{name}: found none, expected it. Measure with: mdf parity ENGINE --reference "
                "CHECKPOINT --data DATA; check with: mdf parity --check CERT.json ENGINE"
            )
    if args.public_key is not None:
        raise InputError("--public-key: found it without --check. To sign, pass --key PRIVATE.pem")
    if given["--part"] and not given["--split"]:
        raise InputError(f"--part {args.part}: found no --split, expected the file of its parts")


def _check_targets(args: argparse.Namespace) -> None:
    """Tell before the measurement what could not be written or signed after it."""
    for option in ("out", "html"):
        path = getattr(args, option)
        if path is not None and not os.access(path.parent, os.W_OK):
            raise StorageError(
                f"--{option} {path}: found no folder {path.parent} that can be written to, "
                f"expected one. Make it: mkdir -p {path.parent}"
            )
    if args.key is not None:
        import_extra("mdf_sdk.signature", "sign").sign_bytes(b"", args.key)

"""`mdf ladder` and `mdf sensitivity`: command lines in, a directory with a report out."""

import argparse
import json
import shlex
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mdf_sdk.extras import import_extra
from mdf_sdk.machine import machine_card
from mdf_sdk.staging import staged_directory

PACKAGES = ("mdf-mllm", "torch", "transformers", "onnx", "onnxruntime", "numpy")
PRINTED_LINEARS = 20


def add_ladder(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf ladder CHECKPOINT ENGINE [ENGINE ...] --data DATA --out DIR`."""
    parser = commands.add_parser(
        "ladder", help="what each engine loses against its checkpoint, and where"
    )
    parser.add_argument("checkpoint", type=Path, help="the reference, in PyTorch float32")
    parser.add_argument(
        "engines", type=Path, nargs="+", metavar="ENGINE", help="in the order of the steps"
    )
    parser.add_argument(
        "--cases", type=int, metavar="N", help="as many, spread over DATA; all when left out"
    )
    _add_common(parser)
    parser.set_defaults(run=run_ladder)


def run_ladder(args: argparse.Namespace) -> int:
    """Climb the ladder, write the report and print it."""
    climb = import_extra("mdf_export.proof.ladder", "all").climb
    report = import_extra("mdf_export.proof.report", "all")
    words = [str(args.checkpoint), *map(str, args.engines), "--data", args.data]
    if args.cases is not None:
        words += ["--cases", str(args.cases)]
    with staged_directory(args.out) as folder:
        start = time.monotonic()
        ladder = climb(args.checkpoint, args.engines, args.data, args.cases)
        document = _document(args, words, start) | ladder.to_dict()
        text: str = report.format_ladder(ladder)
        _write(folder, "ladder", document, text)
        report.plot_layers(ladder, folder / "ladder.png")
    print(text, end="")
    _print_end(args, document)
    return 0


def add_sensitivity(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf sensitivity CHECKPOINT --data DATA --precision int4 --out DIR`."""
    parser = commands.add_parser(
        "sensitivity", help="the damage that rounding each linear alone does to the labels"
    )
    parser.add_argument("checkpoint", type=Path, help="directory written by mdf train")
    parser.add_argument(
        "--cases", type=int, default=16, metavar="N", help="default 16, spread over DATA"
    )
    parser.add_argument("--precision", required=True, choices=("int4", "int8"))
    parser.add_argument(
        "--block-size", type=int, default=32, choices=(32, 64, 128), help="default 32"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    _add_common(parser)
    parser.set_defaults(run=run_sensitivity)


def run_sensitivity(args: argparse.Namespace) -> int:
    """Measure, write the report and print the most damaging linears."""
    measure = import_extra("mdf_export.proof.sensitivity", "all").measure_sensitivity
    report = import_extra("mdf_export.proof.report", "all")
    words = [str(args.checkpoint), "--data", args.data, "--cases", str(args.cases)]
    words += ["--precision", args.precision, "--block-size", str(args.block_size)]
    words += ["--device", args.device]
    with staged_directory(args.out) as folder:
        start = time.monotonic()
        sensitivity = measure(
            args.checkpoint,
            args.data,
            cases=args.cases,
            precision=args.precision,
            block_size=args.block_size,
            device=args.device,
        )
        document = _document(args, words, start) | sensitivity.to_dict()
        text = report.format_sensitivity(sensitivity)
        _write(folder, "sensitivity", document, text)
        report.plot_sensitivity(sensitivity, folder / "sensitivity.png")
    print(report.format_sensitivity(sensitivity, PRINTED_LINEARS), end="")
    _print_end(args, document)
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, help="unseen cases: folder with labels.csv, or synthetic:N:SEED"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )


def _document(args: argparse.Namespace, words: list[str], start: float) -> dict[str, Any]:
    """Say what was run, where, when and for how long."""
    return {
        "command": shlex.join(["mdf", args.command, *words, "--out", str(args.out)]),
        "data": args.data,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "machine": machine_card(PACKAGES),
    }


def _write(folder: Path, name: str, document: Mapping[str, Any], text: str) -> None:
    """Write {name}.json and {name}.md, which shows {name}.png."""
    content = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    machine = document["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    ran = (
        f"\n![plot]({name}.png)\n\n    {document['command']}\n\n{document['seconds']} s on "
        f"{machine['cores']} cores of {machine['cpu']}, {document['date'][:10]}; {versions}.\n"
    )
    (folder / f"{name}.md").write_text(text + ran, encoding="utf-8")


def _print_end(args: argparse.Namespace, document: Mapping[str, Any]) -> None:
    print(f"written to {args.out}")
    if args.json:
        print(json.dumps(document, allow_nan=False))

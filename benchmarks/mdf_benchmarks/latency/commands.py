"""`mdf benchmark`: command line in; a table, JSON and an HTML report out."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mdf_benchmarks.options import add_run_options
from mdf_sdk import InputError, StorageError
from mdf_sdk.extras import import_extra


def add_benchmark(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf benchmark ENGINE`, `--preset PRESET --random` and `--compare A B`."""
    parser = commands.add_parser(
        "benchmark", help="measure latency and memory, and set them beside rivals and the limit"
    )
    parser.add_argument("engine", type=Path, nargs="?", metavar="ENGINE")
    parser.add_argument("--quick", action="store_true", help="50 queries of each kind, not 1,024")
    parser.add_argument(
        "--against",
        default="",
        metavar="PEER,...",
        help="transformers, transformers-1tile, transformers-compile, bnb-nf4, torchao-int4, "
        "pytorch-cpu: each is asked the same, in a process of its own",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="CHECKPOINT",
        help="what the engine was exported from: asks the peer pytorch-cpu",
    )
    parser.add_argument(
        "--text-tokens", type=int, metavar="N", help="ask with clinical texts of so many tokens"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as one HTML page")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measure nothing: set two reports side by side",
    )
    parser.add_argument(
        "--from",
        dest="report",
        type=Path,
        metavar="FILE",
        help="measure nothing: print a report, and write its page with --html",
    )
    random = parser.add_argument_group("random weights, for the latency of a shape")
    random.add_argument("--preset", help="llama-3.2-11b, smol-135m or nano; needs --random")
    random.add_argument("--random", action="store_true", help="make checkpoint and engine")
    random.add_argument(
        "--precision",
        default="int4",
        metavar="P,...",
        help="of the engines; more than one gives a report each, FILE-P (default int4)",
    )
    random.add_argument(
        "--work", type=Path, metavar="DIR", help="where checkpoint and engines are made, and kept"
    )
    random.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: a stand-in)"
    )
    add_run_options(parser)
    parser.set_defaults(run=run_benchmark)


def run_benchmark(args: argparse.Namespace) -> int:
    """Measure, or compare, and print."""
    _check_files(args)
    if args.compare:
        return _compare(args)
    from mdf_benchmarks.latency.text import format_report

    reports = _load(args) if args.report else _measure(args)
    for report in reports:
        print(format_report(report))
    for path in (args.out, args.html):
        for report in reports if path else ():
            print(f"written: {_name(path, report, args)}")
    if args.json:
        print(_to_json(reports[0] if len(reports) == 1 else reports))
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Find out before minutes of measuring whether the result can be written."""
    for path in (args.out, args.html):
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise InputError(
                f"{path}: found a directory, or none to write it in, expected a file's name. Make "
                f"the directory: mkdir -p {path.parent}"
            )
    given = [path for path in (*(args.compare or ()), args.report) if path]
    if given and (args.engine or args.random or args.preset or (args.compare and args.report)):
        raise InputError(
            "mdf benchmark: found --from or --compare beside each other or something to measure, "
            "expected one of: mdf benchmark --from FILE, mdf benchmark --compare A.json B.json, "
            "mdf benchmark ENGINE"
        )
    if args.html and args.compare:
        raise InputError("mdf benchmark --compare: found --html, expected --out FILE, or neither")
    taken = {path.resolve() for path in given}
    for path in (args.out, args.html):
        if path and path.resolve() in taken:
            raise InputError(
                f"{path}: found it twice on the command line, expected a file of its own for what "
                "is written. Name another --out or --html"
            )
        if path:
            taken.add(path.resolve())
    if args.threads is not None and args.threads < 1:  # before the minutes of a cold start
        raise InputError(f"threads: found {args.threads}, expected at least 1. Leave --threads out")
    if args.html:
        import_extra("matplotlib.figure", "training")


def _load(args: argparse.Namespace) -> list[dict[str, Any]]:
    from mdf_benchmarks.latency.compare import expect_whole, load_report
    from mdf_benchmarks.latency.text import format_report

    report = load_report(args.report)
    with expect_whole(args.report):
        format_report(report)  # what it cannot print is not written either
        _save(args, [report])
    return [report]


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    from mdf_benchmarks.latency.peer_process import NEEDS_CHECKPOINT
    from mdf_benchmarks.latency.run import Request, benchmark_engine, benchmark_random

    names = [name for name in args.against.split(",") if name]
    if args.reference and NEEDS_CHECKPOINT not in names:
        names.append(NEEDS_CHECKPOINT)
    request = Request(args.quick, args.device, args.threads, tuple(names), args.text_tokens)
    save = partial(_save, args)
    if not args.random and args.preset is None:
        if args.engine is None:
            raise InputError(
                "mdf benchmark: found no engine, expected one: mdf benchmark ENGINE. Without "
                "weights: mdf benchmark --preset llama-3.2-11b --random --work DIR"
            )
        return benchmark_engine(args.engine, args.reference, request, save)
    if not args.random or not args.preset or not args.work or args.engine or args.reference:
        raise InputError(
            "mdf benchmark: found some of --preset, --random and --work without the others, or "
            "with an engine or a reference, expected all three alone: "
            "mdf benchmark --preset llama-3.2-11b --random --work DIR"
        )
    return benchmark_random(
        args.preset,
        args.precision.split(","),
        args.work,
        args.tokenizer,
        request,
        save,
        lambda line: print(line, flush=True),
    )


def _compare(args: argparse.Namespace) -> int:
    from mdf_benchmarks.latency.compare import (
        compare_reports,
        expect_whole,
        format_comparison,
        load_report,
    )

    a, b = (load_report(path) for path in args.compare)
    with expect_whole(*args.compare):
        comparison = compare_reports(a, b)
        text = format_comparison(comparison)
    print(text)
    if args.out:
        _write(args.out, _to_json(comparison) + "\n")
    if args.json:
        print(_to_json(comparison))
    return 0


def _save(args: argparse.Namespace, reports: Sequence[dict[str, Any]]) -> None:
    """Write what there is: a run that is ended later has lost nothing."""
    from mdf_benchmarks.latency.page import format_page

    for report in reports:
        page = format_page(report) if args.html else ""  # if it fails, nothing is written
        if args.out:
            _write(_name(args.out, report, args), _to_json(report) + "\n")
        if args.html:
            _write(_name(args.html, report, args), page)


def _name(path: Path, report: dict[str, Any], args: argparse.Namespace) -> Path:
    """FILE, or FILE-PRECISION where several are asked for."""
    several = args.random and "," in args.precision
    return path.with_stem(f"{path.stem}-{report['precision']}") if several else path


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror}, expected to be able to write. Name another file"
        ) from error


def _to_json(document: Any) -> str:
    return json.dumps(document, allow_nan=False)

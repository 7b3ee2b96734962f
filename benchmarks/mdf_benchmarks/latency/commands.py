"""`mdf benchmark`: command line in; a table, JSON and an HTML report out."""

import argparse
import json
from pathlib import Path
from typing import Any

from mdf_benchmarks.options import add_run_options
from mdf_sdk import InputError
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
    reports = _measure_random(args) if args.random or args.preset else [_measure_engine(args)]
    from mdf_benchmarks.latency.text import format_report

    for report in reports:
        print(format_report(report))
        suffix = f"-{report['precision']}" if len(reports) > 1 else ""
        _write(args, report, suffix)
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
    if args.html and args.compare:
        raise InputError("mdf benchmark --compare: found --html, expected --out FILE, or neither")
    if args.html:
        import_extra("matplotlib.figure", "training")


def _measure_engine(args: argparse.Namespace) -> dict[str, Any]:
    from mdf_benchmarks.latency.measure import FULL, QUICK, measure

    if args.engine is None:
        raise InputError(
            "mdf benchmark: found no engine, expected one: mdf benchmark ENGINE. Without weights: "
            "mdf benchmark --preset llama-3.2-11b --random --work DIR"
        )
    return measure(
        args.engine,
        QUICK if args.quick else FULL,
        device=args.device,
        threads=args.threads,
        against=_peers(args),
        checkpoint=args.reference,
        text_tokens=args.text_tokens,
    )


def _measure_random(args: argparse.Namespace) -> list[dict[str, Any]]:
    from mdf_benchmarks.latency.random_engine import measure_random

    if not args.random or not args.preset or not args.work or args.engine or args.reference:
        raise InputError(
            "mdf benchmark: found some of --preset, --random and --work without the others, or "
            "with an engine or a reference, expected all three alone: "
            "mdf benchmark --preset llama-3.2-11b --random --work DIR"
        )
    return measure_random(
        args.preset,
        args.precision.split(","),
        args.work,
        tokenizer=args.tokenizer,
        device=args.device,
        against=_peers(args),
        options=_options(args),
        progress=lambda line: print(line, flush=True),
    )


def _peers(args: argparse.Namespace) -> list[str]:
    from mdf_benchmarks.latency.peer_process import NEEDS_CHECKPOINT

    names = [name for name in args.against.split(",") if name]
    return names + [NEEDS_CHECKPOINT] * (bool(args.reference) and NEEDS_CHECKPOINT not in names)


def _options(args: argparse.Namespace) -> list[str]:
    """What each engine's own `mdf benchmark` is given."""
    options = ["--device", args.device]
    if args.quick:
        options.append("--quick")
    for name in ("threads", "text_tokens"):
        if (value := getattr(args, name)) is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options


def _compare(args: argparse.Namespace) -> int:
    from mdf_benchmarks.latency.compare import compare_reports, format_comparison, load_report

    comparison = compare_reports(*(load_report(path) for path in args.compare))
    print(format_comparison(comparison))
    if args.out:
        args.out.write_text(_to_json(comparison) + "\n", encoding="utf-8")
    if args.json:
        print(_to_json(comparison))
    return 0


def _write(args: argparse.Namespace, report: dict[str, Any], suffix: str) -> None:
    if args.out:
        path = args.out.with_stem(args.out.stem + suffix)
        path.write_text(_to_json(report) + "\n", encoding="utf-8")
        print(f"JSON: {path}")
    if args.html:
        from mdf_benchmarks.latency.page import format_page

        path = args.html.with_stem(args.html.stem + suffix)
        path.write_text(format_page(report), encoding="utf-8")
        print(f"HTML: {path}")


def _to_json(document: Any) -> str:
    return json.dumps(document, allow_nan=False)

"""`mdf soak`: command line in, a table and a JSON line out."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mdf_benchmarks.memory import keep_heaps_small
from mdf_benchmarks.options import add_run_options

if TYPE_CHECKING:
    from mdf_benchmarks.soak.soak import MemoryCourse, SoakReport


def add_soak(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf soak ENGINE [--minutes M] [--callers N] [--json]`."""
    parser = commands.add_parser(
        "soak", help="call an engine from many threads for minutes, and account for every call"
    )
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="M")
    parser.add_argument(
        "--callers", type=int, default=8, metavar="N", help="threads that call at the same time"
    )
    add_run_options(parser)
    parser.set_defaults(run=run_soak)


def run_soak(args: argparse.Namespace) -> int:
    """Soak and print; 1 where anything broke."""
    from mdf_benchmarks.soak.soak import soak

    keep_heaps_small()
    report = soak(
        args.engine,
        minutes=args.minutes,
        callers=args.callers,
        device=args.device,
        threads=args.threads,
        progress=lambda line: print(line, flush=True),
    )
    print("\n".join(_lines(report)))
    if args.json:
        print(json.dumps(report.to_dict()))
    return 1 if report.broken else 0


def _lines(report: "SoakReport") -> list[str]:
    lines = [
        f"{report.card}, {report.backend} on {report.device}, {report.model} {report.precision}",
        f"{report.minutes:g} minutes, {report.callers} callers, {report.asked} calls",
        "",
    ]
    outcomes = ("right", "refused", "busy", "closed", "wrong", "unexpected", "lost")
    lines += [f"{name:24s}{getattr(report, name):9d}" for name in outcomes]
    lines[3] += f", {report.kept} of them on kept photographs"
    lines += ["", f"{'ms':24s}{'p50':>9s}{'p99':>9s}{'n':>9s}"]
    lines += [
        f"{kind:24s}{times['p50_ms']:9.1f}{times['p99_ms']:9.1f}{times['n']:9.0f}"
        for kind, times in report.latency.items()
    ]
    lines += ["", f"host memory {_memory(report.host_memory)}"]
    if report.device != "cpu":
        lines.append(f"device memory {_memory(report.device_memory)}")
    if report.close_ms is not None:
        lines.append(f"closed under the callers in {report.close_ms:.0f} ms")
    lines += [f"BROKEN: {found}" for found in report.broken]
    return [*lines, *(f"  {fault}" for fault in report.faults)]


def _memory(course: "MemoryCourse | None") -> str:
    if course is None:
        return "not told by this system"
    return (
        f"by tenths {' '.join(f'{tenth / 1e6:.1f}' for tenth in course.tenths_bytes)} MB, from the "
        f"second to the last {course.growth_share:+.2%}, peak {course.peak_bytes / 1e6:.1f} MB, "
        f"closed {course.closed_bytes / 1e6:.1f} MB"
    )

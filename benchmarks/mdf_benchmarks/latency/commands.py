"""`mdf benchmark`: command line in, a table and a JSON line out."""

import argparse
import json
from pathlib import Path
from typing import Any

from mdf_benchmarks.options import add_run_options


def add_benchmark(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf benchmark ENGINE [--reference CHECKPOINT] [--quick] [--json]`."""
    parser = commands.add_parser(
        "benchmark", help="measure latency, cold start and memory on this machine"
    )
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="CHECKPOINT",
        help="time PyTorch in float32 on the same questions, in turn with the engine",
    )
    parser.add_argument(
        "--text-tokens", type=int, metavar="N", help="ask with clinical texts of so many tokens"
    )
    parser.add_argument("--quick", action="store_true", help="50 queries of each kind, not 1,024")
    add_run_options(parser)
    parser.set_defaults(run=run_benchmark)


def run_benchmark(args: argparse.Namespace) -> int:
    """Measure and print."""
    from mdf_benchmarks.latency.measure import measure

    report = measure(
        args.engine,
        queries=50 if args.quick else 1024,
        device=args.device,
        threads=args.threads,
        reference=args.reference,
        text_tokens=args.text_tokens,
    )
    print("\n".join(_lines(report)))
    if args.json:
        print(json.dumps(report))
    return 0


def _lines(report: dict[str, Any]) -> list[str]:
    machine, cold = report["machine"], report["cold_start"]
    lines = [
        f"{report['card']}, {machine['cores']} cores, {report['backend']} on {report['device']}",
        f"{report['model']} {report['precision']}, {report['size_bytes'] / 1e6:.1f} MB, "
        f"loaded in {report['load_ms']:.0f} ms; prompts of {report['prompt_tokens']} tokens, "
        f"{report['text_tokens']} of them clinical text",
        f"cold start {cold['total_ms']:.0f} ms: "
        f"python {cold['python_ms']:.0f}, imports {cold['imports_ms']:.0f}, "
        f"load and checks {cold['load_ms']:.0f}, "
        f"first prediction {cold['first_prediction_ms']:.0f}",
        "",
        f"{'ms':24s}{'p50':>9s}{'p90':>9s}{'p99':>9s}{'n':>7s}",
    ]
    for kind, times in report["latency"].items():
        lines.append(_row(kind, times))
        lines += [
            f"  {stage:22s}{times['p50_ms']:9.2f}{'':9s}{times['p99_ms']:9.2f}"
            for stage, times in report["stages"][kind].items()
            if times["p99_ms"] > 0
        ]
    decoding = report["decode_and_square"]
    lines.append(_row(f"JPEG of {decoding['side_px']} px, squared", decoding))
    lines += ["", f"peak host memory {_mb(report['peak_host_bytes'])}"]
    lines[-1] += f", after batches of 8 {_mb(report['peak_host_bytes_batch_8'])}"
    if report["peak_device_bytes"] is not None:
        lines.append(f"peak device memory {_mb(report['peak_device_bytes'])}")
    if report["reference"] is not None:
        lines += ["", *_reference_lines(report["reference"])]
    return lines


def _reference_lines(reference: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in reference["versions"].items())
    lines = [f"{reference['model']}, {reference['threads']} threads, {versions}"]
    for kind, times in reference["latency"].items():
        lines.append(
            f"{kind:24s}{times['reference_p50_ms']:9.2f} ms, the engine in turn "
            f"{times['engine_p50_ms']:.2f}: {times['ratio_median']:.2f} times as long "
            f"({times['ratio_least']:.2f} to {times['ratio_most']:.2f}); processor time "
            f"{times['reference_cpu_p50_ms']:.0f} and {times['engine_cpu_p50_ms']:.0f} ms"
        )
    memory = f"peak host memory {_mb(reference['peak_host_bytes'])}"
    if reference["memory_share"] is not None:
        memory += (
            f", the engine {_mb(reference['engine_peak_host_bytes'])}: "
            f"{reference['memory_share']:.0%} of it"
        )
    return [*lines, memory]


def _row(name: str, times: dict[str, float]) -> str:
    return (
        f"{name:24s}{times['p50_ms']:9.2f}{times['p90_ms']:9.2f}{times['p99_ms']:9.2f}"
        f"{times['n']:7d}"
    )


def _mb(size_bytes: int | None) -> str:
    return "not told by this system" if size_bytes is None else f"{size_bytes / 1e6:.0f} MB"

"""`mdf benchmark`: command line in, a table and a JSON line out."""

import argparse
import json
from pathlib import Path


def add_benchmark(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf benchmark ENGINE [--quick] [--json]`."""
    parser = commands.add_parser("benchmark", help="measure latency and memory on this machine")
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--quick", action="store_true", help="50 queries of each kind, not 1,024")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--threads", type=int, help="CPU threads; the runtime's choice when left out"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_benchmark)


def run_benchmark(args: argparse.Namespace) -> int:
    """Measure and print."""
    from mdf_benchmarks.latency import measure

    queries = 50 if args.quick else 1024
    report = measure(args.engine, queries=queries, device=args.device, threads=args.threads)
    machine = report["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, {report['backend']} on {report['device']}")
    print(
        f"{report['model']} {report['precision']}, {report['size_bytes'] / 1e6:.1f} MB, "
        f"loaded in {report['load_ms']:.0f} ms"
    )
    for kind, times in report["latency"].items():
        print(
            f"{kind:24s} p50 {times['p50_ms']:8.2f} ms   "
            f"p99 {times['p99_ms']:8.2f} ms   n {times['n']}"
        )
    for stage, ms in report["stages_p50_ms"]["new_image"].items():
        print(f"  {stage:22s} p50 {ms:8.2f} ms")
    print(f"peak host memory {report['peak_host_bytes'] / 1e6:.0f} MB")
    if args.json:
        print(json.dumps(report))
    return 0

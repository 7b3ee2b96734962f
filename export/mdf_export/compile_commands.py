"""`mdf compile`: command line in, an engine's plans and a line about each out."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from mdf_sdk.extras import import_extra
from mdf_sdk.manifest import SIGNATURE_NAME

if TYPE_CHECKING:
    from mdf_sdk.manifest import PlanSpec


def add_compile(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf compile ENGINE [...]`."""
    parser = commands.add_parser("compile", help="compile an engine's graphs with TensorRT")
    parser.add_argument("engine", type=Path, help="an engine directory; its plans are replaced")
    parser.add_argument(
        "--package",
        default="tensorrt_rtx",
        choices=("tensorrt_rtx", "tensorrt"),
        help="tensorrt_rtx (default) needs no card; tensorrt compiles for this machine's",
    )
    parser.add_argument(
        "--compute-capability",
        nargs="+",
        metavar="C",
        help="of the cards to compile for (default for tensorrt_rtx: 8.6 8.9 12.0)",
    )
    parser.add_argument(
        "--layers-per-plan",
        type=int,
        metavar="N",
        help="cut the decoder up to save memory (default: 1 GB of weights a plan)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_compile)


def run_compile(args: argparse.Namespace) -> int:
    """Compile the engine and say what was made."""
    compile_engine = import_extra("mdf_export.tensorrt", "tensorrt-rtx").compile_engine
    signed = (args.engine / SIGNATURE_NAME).exists()
    manifest = compile_engine(
        args.engine,
        package=args.package,
        compute_capabilities=args.compute_capability,
        layers_per_plan=args.layers_per_plan,
        progress=print_plan,
    )
    plans = [plan for plan in manifest.plans if plan.builder.split()[0] == args.package]
    sizes = [manifest.files[plan.file].bytes for plan in plans]
    seconds = sum(plan.build_s for plan in plans)
    builder, capabilities = plans[0].builder, plans[0].compute_capabilities
    print(
        f"{args.engine}: {len(plans)} plans for {', '.join(capabilities)} by {builder}, "
        f"{sum(sizes) / 1e6:.1f} MB, {seconds:.1f} s"
    )
    if signed:
        print(
            f"  {SIGNATURE_NAME} was of the old manifest, so it is gone. Sign the new one: mdf sign"
        )
    if args.json:
        result = {
            "engine": str(args.engine),
            "builder": builder,
            "compute_capabilities": capabilities,
            "plans": [
                {**dataclasses.asdict(plan), "size_bytes": size}
                for plan, size in zip(plans, sizes, strict=True)
            ],
            "size_bytes": sum(sizes),
            "build_s": round(seconds, 1),
        }
        print(json.dumps(result))
    return 0


def print_plan(plan: "PlanSpec", size_bytes: int) -> None:
    """Print a plan's name, size and time as soon as it is made."""
    name = Path(plan.file).name.rsplit(".", 2)[0]
    print(f"  {name:14s} {size_bytes / 1e6:8.1f} MB {plan.build_s:6.1f} s", flush=True)

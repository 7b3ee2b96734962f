"""`mdf export`: command line in, an engine directory and a line about it out."""

import argparse
import json
from pathlib import Path

from mdf_sdk.extras import import_extra


def add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf export CHECKPOINT ENGINE --precision P [--json]`."""
    parser = commands.add_parser("export", help="build an engine directory from a checkpoint")
    parser.add_argument("checkpoint", type=Path, help="directory written by mdf train")
    parser.add_argument("engine", type=Path, help="new directory")
    parser.add_argument("--precision", choices=("int4", "fp16", "fp32"), required=True)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Build the engine and say what was made."""
    build_engine = import_extra("mdf_export.engine", "export").build_engine
    manifest = build_engine(args.checkpoint, args.engine, args.precision)
    size = sum(entry.bytes for entry in manifest.files.values())
    print(f"{args.engine}: {manifest.model}, {args.precision}, {size / 1e6:.1f} MB")
    print(f"Prove it on any machine: mdf verify {args.engine}")
    if args.json:
        result = {
            "engine": str(args.engine),
            "model": manifest.model,
            "precision": manifest.precision,
            "size_bytes": size,
            "checkpoint": manifest.checkpoint,
            "blocks": {name: block.precision for name, block in manifest.blocks.items()},
        }
        print(json.dumps(result))
    return 0

"""`mdf export`: command line in, an engine directory and a line about it out."""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mdf_sdk.errors import InputError
from mdf_sdk.extras import import_extra

if TYPE_CHECKING:
    from mdf_export.planning import EnginePlan
    from mdf_export.recipe import ExportRecipe


def add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf export CHECKPOINT ENGINE --precision P [...]`."""
    parser = commands.add_parser("export", help="build an engine directory from a checkpoint")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="directory written by mdf train")
    parser.add_argument("engine", type=Path, nargs="?", help="new directory")
    parser.add_argument(
        "--precision",
        required=True,
        choices=("int4", "int8", "fp16", "fp32", "w8a8"),
        help="of the language model and the fusion; w8a8: of the vision tower too, for processors",
    )
    parser.add_argument(
        "--vision-precision",
        choices=("fp16", "int8", "fp8"),
        help="of the vision tower: default int8 with int4, else fp16; fp8 is for cards from 8.9 on",
    )
    parser.add_argument("--method", choices=("gptq", "rtn"), help="default gptq")
    parser.add_argument("--block-size", type=int, choices=(32, 64, 128), help="default 32")
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="GPTQ's cases: folder with labels.csv, or synthetic:COUNT:SEED",
    )
    parser.add_argument("--calibration-cases", type=int, help="default 64, spread over DATA")
    parser.add_argument(
        "--gptq-checkpoint",
        type=Path,
        metavar="DIR",
        help="language weights that GPTQ has quantized already (auto-gptq, GPTQModel, Optimum)",
    )
    parser.add_argument(
        "--sensitivity",
        type=Path,
        metavar="DIR",
        help="what mdf sensitivity wrote: some linears stay int8 or fp16, by one of the next two",
    )
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument(
        "--max-bytes", type=parse_bytes, metavar="N", help="of all weights, such as 90MB or 6.5GB"
    )
    bound.add_argument(
        "--max-flips", type=float, metavar="F", help="share of the labels that may change: 0.01"
    )
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where GPTQ computes"
    )
    parser.add_argument(
        "--target",
        default="onnx",
        metavar="T,...",
        help="onnx is always made; tensorrt-rtx, tensorrt: compile plans as well",
    )
    parser.add_argument(
        "--plan-only", action="store_true", help="print the bytes of each block; needs no weights"
    )
    parser.add_argument("--preset", help="with --plan-only, in place of a checkpoint")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Build the engine, or only plan it, and say what was made."""
    import_extra("mdf_export.engine", "export")
    from mdf_export.recipe import ExportRecipe

    options = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(ExportRecipe)
        if getattr(args, field.name, None) is not None
    }
    recipe = ExportRecipe(**options)
    if args.sensitivity or args.max_bytes is not None or args.max_flips is not None:
        recipe = _mix(args, recipe)
    return _plan(args, recipe) if args.plan_only else _export(args, recipe)


def parse_bytes(words: str) -> int:
    """Read a size in bytes, kB, MB or GB (powers of 1000)."""
    match = re.fullmatch(r"(\d+\.?\d*) ?([kMG]?)B?", words, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"found {words!r}, expected a size such as 90MB or 6.5GB")
    return round(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]])


def _mix(args: argparse.Namespace, recipe: "ExportRecipe") -> "ExportRecipe":
    """Keep in a better precision what the sensitivity and a bound say, and print how much."""
    from mdf_export.proof.sensitivity import mixed_recipe

    bounds = (args.max_bytes, args.max_flips)
    if not args.sensitivity or not args.checkpoint or bounds == (None, None):
        raise InputError(
            "mdf export: found one of --sensitivity and its bound alone, or no checkpoint, "
            "expected all: mdf export CHECKPOINT ENGINE --sensitivity DIR --max-bytes N"
        )
    if args.gptq_checkpoint:
        raise InputError(
            "mdf export: found --sensitivity with --gptq-checkpoint, expected one of them: what "
            "GPTQ has quantized already keeps its precision."
        )
    recipe, flips = mixed_recipe(
        recipe,
        args.checkpoint,
        args.sensitivity,
        max_bytes=args.max_bytes,
        max_flips=args.max_flips,
        device=args.device,
    )
    kept = list(recipe.kept.values())
    print(f"{kept.count('int8')} linears stay int8, {kept.count('fp16')} fp16")
    if flips:
        low, high = flips.interval()
        print(
            f"rounded to nearest, {flips.correct} labels of {flips.n} change "
            f"(95 % interval {low:.2%} to {high:.2%})"
        )
    return recipe


def _export(args: argparse.Namespace, recipe: "ExportRecipe") -> int:
    from mdf_export.engine import build_engine

    if args.engine is None or args.preset:
        raise InputError(
            "mdf export: found no engine directory, or a preset, expected CHECKPOINT and ENGINE. "
            "Without weights there is only a plan: mdf export --plan-only --preset PRESET"
        )
    manifest = build_engine(
        args.checkpoint,
        args.engine,
        recipe,
        gptq_checkpoint=args.gptq_checkpoint,
        device=args.device,
        targets=args.target.split(","),
    )
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
            "quantization": dataclasses.asdict(manifest.quantization),
            "blocks": {name: block.precision for name, block in manifest.blocks.items()},
        }
        print(json.dumps(result))
    return 0


def _plan(args: argparse.Namespace, recipe: "ExportRecipe") -> int:
    from mdf_export.planning import plan_checkpoint, plan_preset, plan_specs
    from mdf_sdk.manifest import PROCESSORS_ALONE
    from mdf_sdk.memory import plan_memory

    if (args.preset is None) == (args.checkpoint is None):
        raise InputError(
            "mdf export --plan-only: expected either a CHECKPOINT or --preset PRESET. Example: "
            "mdf export --plan-only --preset llama-3.2-11b --precision int4"
        )
    name = args.preset or str(args.checkpoint)
    plan = plan_preset(name, recipe) if args.preset else plan_checkpoint(args.checkpoint, recipe)
    print(format_plan(name, recipe, plan))
    specs = plan_specs(plan)
    devices = ("cpu",) if recipe.precision in PROCESSORS_ALONE else ("cpu", "cuda")
    needs = {device: plan_memory(specs, plan.blocks, device) for device in devices}
    for need in needs.values():
        print(need)
    if args.json:
        result = {
            "model": name,
            "recipe": recipe.to_dict(),
            "blocks_bytes": dict(plan.blocks),
            "device_bytes": plan.device_bytes,
            "embeddings_bytes": plan.embeddings,
            "needed_bytes": {device: need.total_bytes for device, need in needs.items()},
        }
        print(json.dumps(result))
    return 0


def format_plan(name: str, recipe: "ExportRecipe", plan: "EnginePlan") -> str:
    """Lay a plan out as a table for people."""
    lines = [f"{name}, {recipe.precision}: weights of each block"]
    for block, size in plan.blocks.items():
        precision = recipe.block_precision(block)
        lines.append(f"  {block:14s} {precision:>5s} {size / 1e6:10.1f} MB")
    lines.append(f"  {'on the device':20s} {plan.device_bytes / 1e6:10.1f} MB")
    lines.append(f"  {'embeddings, on host':20s} {plan.embeddings / 1e6:10.1f} MB")
    return "\n".join(lines)

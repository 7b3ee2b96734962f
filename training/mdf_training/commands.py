"""`mdf train`: a command line in, a checkpoint out."""

import argparse
import json
from pathlib import Path

from mdf_sdk.extras import import_extra
from mdf_training.arguments import add_json, add_recipe, names, read_fusion, read_recipe


def add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf train --preset P --data DATA --out CHECKPOINT [--labels A,B] [--epochs N]`."""
    parser = commands.add_parser("train", help="train a fused model")
    parser.add_argument("--preset", required=True, help="nano, smol-135m or llama-3.2-11b")
    parser.add_argument(
        "--data", required=True, help="folder with labels.csv, or synthetic:COUNT:SEED"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="CHECKPOINT", help="new directory"
    )
    parser.add_argument(
        "--labels", type=names, metavar="A,B,...", help="label set; Acquired,Inherited if left out"
    )
    parser.add_argument(
        "--mask-kinds",
        type=names,
        metavar="A,B,...",
        help="kinds of mask to segment; vessel,lesion,disc if left out",
    )
    parser.add_argument(
        "--unet-weights",
        type=Path,
        metavar="FILE",
        help="ImageNet weights of the U-Net encoder: a state dict, .safetensors or .pth",
    )
    parser.add_argument(
        "--backbone",
        type=Path,
        metavar="DIR",
        help="your copy of Llama-3.2-11B-Vision or -Instruct: a Hugging Face directory",
    )
    add_recipe(parser)
    parser.add_argument(
        "--frozen",
        type=names,
        metavar="PART,...",
        help="of unet, fusion, vision, language: parts that stay as they start",
    )
    parser.add_argument(
        "--policy",
        help="joint, stop_parts or in_step: what to do when parts learn at different speeds",
    )
    parser.add_argument(
        "--query",
        help="vision or skip: whose tokens ask in the fusing cross-attention; the preset's own "
        "when left out",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--split", type=Path, metavar="FILE", help="train on its part train (see mdf split)"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out pictures that cannot be read"
    )
    parser.add_argument(
        "--allow-label-words", action="store_true", help="train on texts that name the label"
    )
    add_json(parser)
    parser.set_defaults(run=run_train)


def run_train(args: argparse.Namespace) -> int:
    """Train; the first process says where the checkpoint is."""
    recipe = read_recipe(args)
    processes = import_extra("mdf_training.distributed", "training").Processes.join()
    train = import_extra("mdf_training.trainer", "training").train
    provenance = train(
        args.preset,
        args.data,
        args.out,
        recipe=recipe,
        fusion=read_fusion(args),
        resume=args.resume,
        labels=args.labels,
        mask_kinds=args.mask_kinds,
        unet_weights=args.unet_weights,
        backbone=args.backbone,
        split=args.split,
        skip_broken=args.skip_broken,
        allow_label_words=args.allow_label_words,
    )
    processes.leave()
    if not processes.is_main:
        return 0
    print(f"{args.out}: {args.preset}, {recipe.epochs} epochs. {provenance['notice']}")
    print(f"Next: mdf evaluate {args.out} DATA; mdf export {args.out} ENGINE --precision int4")
    if args.json:
        print(json.dumps({"checkpoint": str(args.out), **provenance}))
    return 0

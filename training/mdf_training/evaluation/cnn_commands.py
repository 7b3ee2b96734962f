"""`mdf train-cnn`: a command line in, the checkpoint of the image-only baseline out."""

import argparse
import json
from pathlib import Path

from mdf_sdk.extras import import_extra
from mdf_training.arguments import add_json, add_recipe, names, read_recipe


def add_train_cnn(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf train-cnn --preset P --data DATA --out CHECKPOINT [--split FILE]`."""
    parser = commands.add_parser("train-cnn", help="train the image-only baseline")
    parser.add_argument(
        "--preset", required=True, help="whose picture size and recipe: nano, smol-135m, ..."
    )
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
        "--split", type=Path, metavar="FILE", help="train on its part train (see mdf split)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="ImageNet weights of EfficientNet-Lite0"
    )
    add_recipe(parser)
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out pictures that cannot be read"
    )
    add_json(parser)
    parser.set_defaults(run=run_train_cnn)


def run_train_cnn(args: argparse.Namespace) -> int:
    """Train and say where the checkpoint is, and what it leaves unread."""
    recipe = read_recipe(args)
    cnn = import_extra("mdf_training.evaluation.cnn", "training")
    provenance = cnn.train_cnn(
        args.preset,
        args.data,
        args.out,
        recipe=recipe,
        labels=args.labels,
        split=args.split,
        unet_weights=args.weights,
        skip_broken=args.skip_broken,
    )
    print(
        f"{args.out}: {recipe.epochs} epochs. Reads {provenance['reads']}, no text. "
        f"{provenance['notice']}"
    )
    print(f"Next: mdf evaluate CHECKPOINT DATA --reference {args.out}")
    if args.json:
        print(json.dumps({"checkpoint": str(args.out), **provenance}))
    return 0

"""What several commands read from their command lines."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `mdf --help` starts without it
    from mdf_training.recipes import Recipe


def names(words: str) -> tuple[str, ...]:
    """Read "A,B" as ("A", "B")."""
    return tuple(word.strip() for word in words.split(","))


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add what changes a preset's recipe (see `read_recipe`)."""
    parser.add_argument("--epochs", type=int, help="the preset's own number when left out")
    parser.add_argument("--seed", type=int, default=0)


def read_recipe(args: argparse.Namespace) -> "Recipe":
    """Return the recipe of `--preset`, with `--epochs` and `--seed`."""
    from mdf_training.config import load_preset
    from mdf_training.recipes import RECIPES

    recipe = dataclasses.replace(RECIPES[load_preset(args.preset).preset], seed=args.seed)
    return recipe if args.epochs is None else dataclasses.replace(recipe, epochs=args.epochs)

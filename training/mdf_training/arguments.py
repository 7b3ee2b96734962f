"""What several commands read from their command lines."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `mdf --help` starts without it
    from mdf_training.config import FusionConfig
    from mdf_training.recipes import Recipe


def names(words: str) -> tuple[str, ...]:
    """Read "A,B" as ("A", "B")."""
    return tuple(word.strip() for word in words.split(","))


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )


RECIPE_FIELDS = ("epochs", "seed", "augment", "frozen", "policy")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add what changes a preset's recipe (see `read_recipe`)."""
    parser.add_argument("--epochs", type=int, help="the preset's own number when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--augment",
        type=float,
        metavar="STRENGTH",
        help="0 to 1: how far a training picture is from its own camera's; the preset's own when "
        "left out",
    )


def read_recipe(args: argparse.Namespace) -> "Recipe":
    """Return the recipe of `--preset`, changed by those of RECIPE_FIELDS that were given."""
    from mdf_training.config import load_preset
    from mdf_training.recipes import RECIPES

    recipe = RECIPES[load_preset(args.preset).preset]
    given = {name: getattr(args, name, None) for name in RECIPE_FIELDS}
    return dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})


def read_fusion(args: argparse.Namespace) -> "FusionConfig":
    """Return the fusion of `--preset`, with the `--query` that was given."""
    from mdf_training.config import load_preset

    fusion = load_preset(args.preset).fusion
    return fusion if args.query is None else dataclasses.replace(fusion, query=args.query)

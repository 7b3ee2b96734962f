"""mdf_training.recipes: a recipe that no run can use is refused, and JSON gives the same one."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from mdf_sdk.errors import InputError
from mdf_training.recipes import RECIPES, Recipe, Schedule


@pytest.mark.parametrize(
    "field",
    [
        {"policy": "stop"},
        {"patience": 0},
        {"augment": 1.1},
        {"augment": float("nan")},
        {"warmup": 1.0},
        {"frozen": ("unet", "head")},
        {"frozen": "unet"},
        {"frozen": ("unet", "fusion", "vision", "language")},
        {"schedules": {"head": Schedule()}},
    ],
    ids=str,
)
def test_a_recipe_that_no_run_can_use_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(field))}: found .*, expected"):
        Recipe(**field)


@pytest.mark.parametrize(("warmup", "end"), [(-0.1, 1.0), (0.5, 0.5), (0.0, 1.5)])
def test_a_schedule_that_never_trains_is_refused(warmup: float, end: float) -> None:
    with pytest.raises(InputError, match="schedule: found warmup"):
        Schedule(warmup, end)


def test_a_part_without_a_schedule_of_its_own_has_the_recipes() -> None:
    recipe = Recipe(warmup=0.2, schedules={"unet": Schedule(0.1, 0.5)})
    assert recipe.schedule("unet") == Schedule(0.1, 0.5)
    assert recipe.schedule("language") == Schedule(0.2)


@pytest.mark.parametrize(
    "recipe",
    [*RECIPES.values(), Recipe(frozen=("unet",), schedules={"fusion": Schedule(0.1, 0.5)})],
    ids=[*RECIPES, "every field"],
)
def test_json_gives_the_same_recipe(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(asdict(recipe)))) == recipe

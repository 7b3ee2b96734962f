"""mdf_training.optimizer: which parameter learns, and how fast."""

import pytest

from mdf_sdk.errors import InputError
from mdf_training.model import build_model
from mdf_training.optimizer import build_optimizer
from mdf_training.recipes import RECIPES, Recipe
from mdf_training.schedule import freeze


def test_a_recipe_that_leaves_nothing_to_train_is_refused() -> None:
    model = build_model("nano")
    for part in ("unet", "vision", "language", "fusion"):
        freeze(model.parts()[part])
    with pytest.raises(InputError, match="no parameter to train beside the frozen unet"):
        build_optimizer(model, Recipe(frozen=("unet",)))


def test_grafted_layers_learn_at_their_own_rate() -> None:
    model = build_model("nano")
    optimizer = build_optimizer(model, Recipe(backbone_lr=0.5, grafted_lr=0.25))
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.backbone.named_parameters():
        grafted = "vision_model" in name or "projector" in name or "cross_attn" in name
        language = "self_attn" in name or "embed_tokens" in name or "lm_head" in name
        if "vision_model" not in name and language:
            assert rates[id(parameter)] == 0.5, name
        elif grafted:
            assert rates[id(parameter)] == 0.25, name


def test_every_parameter_is_trained_and_none_twice() -> None:
    model = build_model("nano")
    optimizer = build_optimizer(model, RECIPES["nano"])
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    vectors = [g for g in optimizer.param_groups if g["weight_decay"] == 0]
    assert all(p.ndim <= 1 for g in vectors for p in g["params"])

"""A model and a recipe in, AdamW by part out; its state to disk and back."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mdf_sdk.errors import InputError
from mdf_training.checkpoint import TensorFiles
from mdf_training.model import MDFModel
from mdf_training.recipes import Recipe

OPTIMIZER = "optimizer"


def build_optimizer(
    model: MDFModel, recipe: Recipe, *, pretrained_encoder: bool = False
) -> torch.optim.AdamW:
    """AdamW with learning rates by part, and no decay on vectors and gates.

    Raises:
        InputError: nothing is left to train.
    """
    backbone = model.backbone.model
    text = backbone.language_model
    cross = [text.layers[i] for i in text.cross_attention_layers]
    grafted_lr = recipe.backbone_lr if recipe.grafted_lr is None else recipe.grafted_lr
    encoder_lr = recipe.encoder_lr if pretrained_encoder else recipe.unet_lr
    rates: list[tuple[str, str, float, list[nn.Module]]] = [
        ("unet_encoder", "unet", encoder_lr, [model.unet.encoder]),
        ("unet_decoder", "unet", recipe.unet_lr, [model.unet]),
        ("fusion", "fusion", recipe.fusion_lr, model.parts()["fusion"]),
        ("vision", "vision", grafted_lr, model.parts()["vision"]),
        ("cross_attention", "language", grafted_lr, cross),
        ("language", "language", recipe.backbone_lr, model.parts()["language"]),
    ]
    groups, taken = [], set[Tensor]()
    for name, part, lr, modules in rates:
        parameters = [
            parameter
            for module in modules
            for parameter in module.parameters()
            if parameter not in taken and parameter.requires_grad
        ]
        taken.update(parameters)
        for decay, chosen in (
            (recipe.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            if chosen:
                group = {"name": name, "part": part, "lr": lr, "peak_lr": lr}
                groups.append({**group, "params": chosen, "weight_decay": decay})
    if not groups:
        raise InputError(
            f"recipe: found no parameter to train beside the frozen {', '.join(recipe.frozen)}, "
            "expected some. Freeze less, or train with a fusion"
        )
    return torch.optim.AdamW(groups, fused=next(model.parameters()).is_cuda or None)


def optimizer_tensors(model: MDFModel, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return AdamW's state by the parameter's name and its own, such as "fusion.0.gate.exp_avg"."""
    return {
        f"{name}.{kind}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: MDFModel, optimizer: torch.optim.AdamW, folder: Path) -> None:
    """Give AdamW the state that a checkpoint has; each process reads its own rows."""
    files = TensorFiles(folder, OPTIMIZER)
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    chosen = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(chosen):
        step, *moments = (f"{names[parameter]}.{k}" for k in ("step", "exp_avg", "exp_avg_sq"))
        if step not in files.shapes:  # no gradient has reached it yet
            continue
        state[index] = {"step": files[step]}
        for key in moments:
            moment = torch.zeros_like(parameter)
            files.read_into(moment, key)
            state[index][key.rpartition(".")[2]] = moment
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})

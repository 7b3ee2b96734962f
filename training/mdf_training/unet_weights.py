"""A file of ImageNet weights in, a U-Net encoder that starts from them out."""

import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mdf_sdk.errors import CheckpointError
from mdf_training.weight_files import is_finite, join_problems

# What follows the last feature map a U-Net reads, as timm and torchvision name it.
_HEAD = re.compile(r"(classifier|fc|conv_head|bn2)\.")
# efficientnet_pytorch's names outside the blocks -> timm's.
_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# efficientnet_pytorch's names of a block's layers -> timm's, without and with an expansion.
_PLAIN_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_EXPANDED_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def describe_weights(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return a weights file's name and SHA-256, for the provenance.

    Raises:
        CheckpointError: no such file.
    """
    path = Path(path)
    try:
        return {"file": path.name, "sha256": sha256(path.read_bytes()).hexdigest()}
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; expected a file of ImageNet weights. "
            "Leave --unet-weights out to train the U-Net from scratch."
        ) from None


def load_unet_weights(encoder: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a classifier's weights into a U-Net encoder, every tensor by name.

    Args:
        encoder: of the U-Net, as segmentation-models-pytorch builds it.
        path: state dict of the same network as timm, torchvision or efficientnet_pytorch (its
            EfficientNets) name it, .safetensors or PyTorch's own; its classifier head is left out.

    Raises:
        CheckpointError: no state dict, or not this encoder's: a tensor is missing, unknown, of
            another shape or not finite.
    """
    path = Path(path)
    state = _read_state(path)
    expected = encoder.state_dict()
    found = _rename(state, expected)
    # A counter that batch normalization keeps and never reads here; older files lack it.
    wanted = [name for name in expected if not name.endswith(".num_batches_tracked")]
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in expected]
    problems += [
        f"{name}: found shape {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != expected[name].shape
    ]
    problems += [f"{name}: NaN or infinity" for name, t in found.items() if not is_finite(t)]
    if problems:
        raise CheckpointError(
            f"{path}: the weights do not fit the U-Net encoder: {join_problems(problems)}. "
            "Pass the file of the network that the preset names."
        )
    encoder.load_state_dict({**expected, **found})


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle ends in whatever its last instruction ran into
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: {reason}; expected a state dict, .safetensors or .pth. "
            "Save it by safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(
            f"{path}: found {type(state).__name__}, expected a state dict: names and tensors. "
            "Save it by safetensors.torch.save_file(model.state_dict(), FILE)"
        )
    return dict(state)


def _rename(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a file's tensors the encoder's names; drop what of the head it does not have."""
    # smp wraps a timm network in one more module, and takes torchvision's as it is.
    prefix = "model." if all(name.startswith("model.") for name in expected) else ""
    if "_conv_stem.weight" in state:
        blocks = list(dict.fromkeys(re.findall(r"\bblocks\.\d+\.\d+", "\n".join(expected))))
        state = {_timm_name(name, state, blocks): tensor for name, tensor in state.items()}
    return {
        prefix + name: tensor
        for name, tensor in state.items()
        if prefix + name in expected or not _HEAD.match(name)
    }


def _timm_name(name: str, state: Mapping[str, Tensor], blocks: list[str]) -> str:
    """Translate one name of efficientnet_pytorch, which counts all blocks in one row."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        layer, _, rest = name.partition(".")
        return f"{_OUTER.get(layer, layer)}.{rest}"
    number, layer, rest = match.groups()
    expanded = f"_blocks.{number}._expand_conv.weight" in state
    layer = (_EXPANDED_BLOCK if expanded else _PLAIN_BLOCK).get(layer, layer)
    block = blocks[int(number)] if int(number) < len(blocks) else f"blocks.{number}"
    return f"{block}.{layer}.{rest}"

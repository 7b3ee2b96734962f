"""mdf_training.unet_weights: a classifier's tensors reach the U-Net encoder, every one by name."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import resnet50

from mdf_sdk.errors import CheckpointError
from mdf_training.config import PRESETS
from mdf_training.unet_weights import describe_weights, load_unet_weights

LITE0, RESNET50 = PRESETS["smol-135m"].unet.encoder, PRESETS["llama-3.2-11b"].unet.encoder


@pytest.fixture(scope="module")
def lite0() -> dict[str, Tensor]:
    """timm's whole classifier, its running statistics and gains told apart."""
    torch.manual_seed(0)
    return distinct(timm.create_model("tf_efficientnet_lite0").state_dict())


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t + torch.rand(t.shape) if t.is_floating_point() else t for n, t in state.items()}


def encoder_of(name: str) -> nn.Module:
    encoder: nn.Module = smp.Unet(name, encoder_weights=None).encoder
    return encoder.eval()


def as_efficientnet_pytorch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write timm's names as that package does: same order, blocks in one row, other layer names."""
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    expanded = {
        "conv_pw": "_expand_conv",
        "bn1": "_bn0",
        "conv_dw": "_depthwise_conv",
        "bn2": "_bn1",
        "conv_pwl": "_project_conv",
        "bn3": "_bn2",
    }
    outside = {
        "conv_stem": "_conv_stem",
        "bn1": "_bn0",
        "conv_head": "_conv_head",
        "bn2": "_bn1",
        "classifier": "_fc",
    }
    blocks: list[str] = []
    renamed = {}
    for name, tensor in state.items():
        *block, layer, rest = name.rsplit(".", 2)
        if not block:
            renamed[f"{outside[layer]}.{rest}"] = tensor
            continue
        if block[0] not in blocks:
            blocks.append(block[0])
        layers = expanded if f"{block[0]}.conv_pwl.weight" in state else plain
        renamed[f"_blocks.{len(blocks) - 1}.{layers[layer]}.{rest}"] = tensor
    return renamed


@pytest.mark.parametrize("naming", ["timm", "efficientnet_pytorch"])
def test_efficientnet_lite0_gives_timms_own_features(
    lite0: dict[str, Tensor], naming: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(lite0 if naming == "timm" else as_efficientnet_pytorch(lite0), path)
    encoder = encoder_of(LITE0)
    load_unet_weights(encoder, path)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(lite0)
    picture = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = encoder(picture)[1:]
        expected = network.forward_intermediates(picture, intermediates_only=True)
    assert len(found) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("naming", ["timm", "efficientnet_pytorch"])
def test_a_network_with_a_head_gets_all_of_it_but_the_classes(
    lite0: dict[str, Tensor], naming: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(lite0 if naming == "timm" else as_efficientnet_pytorch(lite0), path)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    load_unet_weights(network, path)
    assert "conv_head.weight" in network.state_dict()
    assert all(torch.equal(t, lite0[name]) for name, t in network.state_dict().items())


def test_torchvisions_resnet50_reaches_every_tensor_of_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = distinct(resnet50().state_dict())
    save_file(state, tmp_path / "weights.safetensors")
    encoder = encoder_of(RESNET50)
    load_unet_weights(encoder, tmp_path / "weights.safetensors")
    assert all(torch.equal(t, state[name]) for name, t in encoder.state_dict().items())


def test_counters_that_older_files_lack_are_not_missed(
    lite0: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({n: t for n, t in lite0.items() if not n.endswith("num_batches_tracked")}, path)
    load_unet_weights(encoder_of(LITE0), path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"blocks.1.0.conv_dw.weight": None}, r"missing model\.blocks\.1\.0\.conv_dw\.weight"),
        ({"blocks.9.0.bn1.bias": torch.zeros(8)}, r"unknown model\.blocks\.9\.0\.bn1\.bias"),
        ({"bn1.bias": torch.zeros(8)}, r"model\.bn1\.bias: found shape \[8\], expected \[32\]"),
        ({"bn1.bias": torch.full((32,), torch.nan)}, r"model\.bn1\.bias: NaN or infinity"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    lite0: dict[str, Tensor], change: dict[str, Tensor | None], problem: str, tmp_path: Path
) -> None:
    changed = {name: t for name, t in {**lite0, **change}.items() if t is not None}
    torch.save(changed, tmp_path / "weights.pth")
    encoder = encoder_of(LITE0)
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=problem):
        load_unet_weights(encoder, tmp_path / "weights.pth")
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())


def test_another_networks_file_is_refused(lite0: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(lite0, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"do not fit .* and \d+ more"):
        load_unet_weights(encoder_of(RESNET50), tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02."])
def test_a_file_that_is_no_state_dict_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="expected a state dict"):
        load_unet_weights(encoder_of(LITE0), tmp_path / name)


def test_a_pickled_list_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="found list, expected a state dict"):
        load_unet_weights(encoder_of(LITE0), tmp_path / "weights.pth")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": Path("anything")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        load_unet_weights(encoder_of(LITE0), tmp_path / "weights.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth: No such file"):
        describe_weights(tmp_path / "none.pth")

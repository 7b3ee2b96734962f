"""mdf_export.gptq_checkpoint, on checkpoints that GPTQModel 7.7 wrote (data/README.md)."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdf_export.gptq_checkpoint import GptqCheckpoint
from mdf_sdk.errors import CheckpointError

DATA = Path(__file__).parent / "data"
WRITTEN = ("v1", "v1_act_order", "v2", "v2_act_order", "v1_8bit")
LAYER = "model.language_model.layers.0"
OUR_LAYER = "backbone.model.language_model.layers.0"
RECORDED = ("self_attn.k_proj", "mlp.down_proj")
K_PROJ = f"{OUR_LAYER}.self_attn.k_proj"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the whole v1 checkpoint, to damage."""
    return Path(shutil.copytree(DATA / "gptq_v1", tmp_path / "checkpoint"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def replace(folder: Path, part: str, value: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of k_proj."""
    name = f"{LAYER}.self_attn.k_proj.{part}"
    rewrite(folder, lambda tensors: tensors.update({name: value(tensors[name]).contiguous()}))


def reconfigure(folder: Path, **changes: object) -> None:
    path = folder / "quantize_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder: Path) -> None:
    """Spread the tensors over two files with an index, as large checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def dequantized(folder: Path) -> Mapping[str, Tensor]:
    found = GptqCheckpoint(folder)
    return {name: found[name].dequantize() for name in found}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("linear", RECORDED)
def test_the_values_are_exactly_those_that_gptqmodel_dequantizes(name: str, linear: str) -> None:
    weight = GptqCheckpoint(DATA / f"gptq_{name}")[f"{OUR_LAYER}.{linear}"].dequantize()
    with np.load(DATA / "gptq_dequantized.npz") as recorded:
        expected = torch.from_numpy(recorded[f"{name}/{LAYER.removeprefix('model.')}.{linear}"])
    assert torch.equal(weight.T.half(), expected)  # it multiplies in float16


@pytest.mark.parametrize("name", WRITTEN)
def test_only_act_order_needs_an_order(name: str) -> None:
    quantized = GptqCheckpoint(DATA / f"gptq_{name}")[K_PROJ]
    assert (quantized.order is not None) == name.endswith("act_order")
    assert quantized.bits == (8 if name.endswith("8bit") else 4)
    assert quantized.block_size == (64 if name.endswith("8bit") else 32)
    assert int(quantized.codes.min()) == -(2 ** (quantized.bits - 1))


def test_an_ordered_input_gives_the_output_of_the_original() -> None:
    quantized = GptqCheckpoint(DATA / "gptq_v1_act_order")[K_PROJ]
    assert quantized.order is not None
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = quantized.codes * quantized.scales.repeat_interleave(32, dim=0)
    expected = x @ quantized.dequantize().T.double()
    torch.testing.assert_close(x[:, quantized.order] @ rows.double(), expected)


def test_dense_linears_are_not_in_it() -> None:
    linears = ("self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
    linears += ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
    found = GptqCheckpoint(DATA / "gptq_v1")
    assert set(found) == {f"{OUR_LAYER}.{linear}" for linear in linears}
    assert len(found) == 7
    assert f"{OUR_LAYER}.self_attn.k_proj" in found
    assert "backbone.model.language_model.layers.1.cross_attn.k_proj" not in found
    with pytest.raises(KeyError):
        found["backbone.model.language_model.layers.1.cross_attn.k_proj"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")],
)
def test_the_names_of_transformers_4_are_read_too(checkpoint: Path, old: str, new: str) -> None:
    expected = dequantized(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(renamed, checkpoint / "model.safetensors")
    found = dequantized(checkpoint)
    assert found.keys() == expected.keys()
    assert torch.equal(found[K_PROJ], expected[K_PROJ])


def test_a_quantized_head_has_its_name(checkpoint: Path) -> None:
    def quantize_head(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"lm_head.{part}"] = tensors[f"{LAYER}.self_attn.k_proj.{part}"].clone()

    rewrite(checkpoint, quantize_head)
    found = dequantized(checkpoint)
    assert torch.equal(found["backbone.lm_head"], found[K_PROJ])


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_read_as_one(checkpoint: Path, with_index: bool) -> None:
    expected = dequantized(checkpoint)
    shard(checkpoint)
    if not with_index:
        (checkpoint / "model.safetensors.index.json").unlink()
    found = dequantized(checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_settings_may_stand_in_config_json_alone(checkpoint: Path) -> None:
    expected = dequantized(checkpoint)
    (checkpoint / "quantize_config.json").unlink()
    assert torch.equal(dequantized(checkpoint)[K_PROJ], expected[K_PROJ])


def test_settings_without_a_checkpoint_format_are_auto_gptqs(checkpoint: Path) -> None:
    expected = dequantized(checkpoint)
    path = checkpoint / "quantize_config.json"
    settings = json.loads(path.read_text())
    kept = ("bits", "group_size", "desc_act", "sym")
    path.write_text(json.dumps({key: settings[key] for key in kept}))
    assert torch.equal(dequantized(checkpoint)[K_PROJ], expected[K_PROJ])


def test_a_layer_may_differ_where_the_settings_have_rules_by_layer(checkpoint: Path) -> None:
    other = load_file(DATA / "gptq_v1_8bit" / "model.safetensors")
    linear = f"{LAYER}.self_attn.k_proj"
    rewrite(
        checkpoint, lambda tensors: tensors.update({n: t for n, t in other.items() if linear in n})
    )
    with pytest.raises(CheckpointError, match=r"k_proj.*expected"):
        GptqCheckpoint(checkpoint)[K_PROJ]
    reconfigure(checkpoint, dynamic={"+:.*k_proj": {"bits": 8, "group_size": -1}})
    found = GptqCheckpoint(checkpoint)
    expected = GptqCheckpoint(DATA / "gptq_v1_8bit")[K_PROJ]
    assert torch.equal(found[K_PROJ].dequantize(), expected.dequantize())
    assert found[f"{OUR_LAYER}.mlp.down_proj"].bits == 4


def test_a_bias_of_zeros_is_none(checkpoint: Path) -> None:
    name = f"{LAYER}.self_attn.k_proj.bias"
    rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(32).half()}))
    assert GptqCheckpoint(checkpoint)[K_PROJ].bits == 4


def at(index: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


DAMAGES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "asymmetric": ("qzeros", at((1, 2), 0x77776777), "from 6 to 7, expected 7 in all.*sym=True"),
    "zeros_of_v2": ("qzeros", lambda t: t + 0x11111111, "zero points 8, as 'gptq_v2'.*set"),
    "zeros_shape": ("qzeros", lambda t: t[:1], r"\[1, 4\], expected torch.int32 \[2, 4\]"),
    "zeros_dtype": ("qzeros", lambda t: t.long(), "int64.*expected torch.int32"),
    "negative_scale": ("scales", at((0, 5), -0.25), "found -0.25, expected positive"),
    "scale_of_zero": ("scales", at((0, 5), 0.0), "found 0.0, expected positive"),
    "infinite_scale": ("scales", at((0, 5), float("inf")), "found inf"),
    "nan_scale": ("scales", at((0, 5), float("nan")), "found nan"),
    "scales_dtype": ("scales", lambda t: t.float(), "float32.*expected torch.float16"),
    "scales_rank": ("scales", lambda t: t[0], r"\[32\]"),
    "no_scales": ("scales", lambda t: t[:0], r"\[0, 32\]"),
    "weight_shape": ("qweight", lambda t: t[:, :24], r"\[8, 24\], expected torch.int32 \[8, 32\]"),
    "weight_bits": ("qweight", lambda t: t.repeat(2, 1), r"\[16, 32\], expected .*\[8, 32\]"),
    "weight_dtype": ("qweight", lambda t: t.float(), "float32.*expected torch.int32"),
    "uneven_groups": ("g_idx", at((0,), 1), "other groups, expected 2 groups of 32"),
    "unknown_group": ("g_idx", at((63,), 2), "other groups"),
    "negative_group": ("g_idx", at((0,), -1), "other groups"),
    "short_g_idx": ("g_idx", lambda t: t[:48], "48 features, expected a multiple"),
    "bias": ("bias", lambda t: t + 1, "found one that is not zero"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_linear_is_an_error_that_names_file_and_tensor(
    checkpoint: Path, damage: str
) -> None:
    part, change, message = DAMAGES[damage]
    if part == "bias":
        name = f"{LAYER}.self_attn.k_proj.bias"
        rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(32).half()}))
    replace(checkpoint, part, change)
    found = GptqCheckpoint(checkpoint)
    with pytest.raises(CheckpointError, match=message) as error:
        found[K_PROJ]
    assert f"model.safetensors, {LAYER}.self_attn.k_proj.{part}: found" in str(error.value)
    assert found[f"{OUR_LAYER}.mlp.down_proj"].bits == 4  # the others can be read


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
def test_a_missing_tensor_is_an_error(checkpoint: Path, part: str) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop(f"{LAYER}.self_attn.k_proj.{part}"))
    with pytest.raises(CheckpointError, match=rf"no tensor .*k_proj\.{part}"):
        GptqCheckpoint(checkpoint)[K_PROJ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_format": "gptq_v2"}, "zero points 7, as 'gptq'.*expected 8"),
        ({"bits": 3}, "found 3 bits, expected 4 or 8"),
        ({"bits": 8}, r"qweight: found torch.int32 \[8, 32\]"),
        ({"bits": "four"}, "found four bits"),
        ({"group_size": 16}, r"qzeros: found torch.int32 \[2, 4\], expected torch.int32 \[4, 4\]"),
        ({"group_size": 0}, "multiple of group_size 0"),
        ({"group_size": None}, "multiple of group_size None"),
    ],
)
def test_settings_that_the_tensors_contradict_are_an_error(
    checkpoint: Path, changes: dict[str, object], message: str
) -> None:
    reconfigure(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message):
        GptqCheckpoint(checkpoint)[K_PROJ]


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "awq"},
        {"checkpoint_format": "marlin"},
        {"checkpoint_format": "gptq_p"},
        {"is_marlin_format": True},
    ],
)
def test_another_layout_is_an_error(checkpoint: Path, changes: dict[str, object]) -> None:
    reconfigure(checkpoint, **changes)
    with pytest.raises(CheckpointError, match="expected 'gptq' and one of 'gptq', 'gptq_v2'"):
        GptqCheckpoint(checkpoint)


def test_no_settings_are_an_error(checkpoint: Path) -> None:
    (checkpoint / "quantize_config.json").unlink()
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no quantize_config\.json and no"):
        GptqCheckpoint(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_settings_that_are_no_object_are_an_error(checkpoint: Path, text: str) -> None:
    (checkpoint / "quantize_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"quantize_config\.json"):
        GptqCheckpoint(checkpoint)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        GptqCheckpoint(tmp_path / "nowhere")


def test_pickled_weights_are_an_error(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        GptqCheckpoint(checkpoint)


def test_a_truncated_file_is_an_error(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        GptqCheckpoint(checkpoint)


def test_a_file_that_vanishes_later_is_an_error(checkpoint: Path) -> None:
    found = GptqCheckpoint(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors, .*k_proj\.qweight"):
        found[K_PROJ]


def test_a_missing_shard_is_an_error(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected it in model-00002-of-00002\.safetensors"):
        GptqCheckpoint(checkpoint)


def test_an_index_without_a_weight_map_is_an_error(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        GptqCheckpoint(checkpoint)


def test_a_tensor_in_two_files_is_an_error(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "old.safetensors")
    with pytest.raises(CheckpointError, match=r"old\.safetensors: found .* holds too"):
        GptqCheckpoint(checkpoint)


def test_a_dense_checkpoint_is_an_error(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if n.endswith(".weight")},
        checkpoint / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"no tensor \*\.qweight"):
        GptqCheckpoint(checkpoint)


def test_another_model_is_an_error(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    renamed = {name.replace("language_model.", ""): tensor for name, tensor in tensors.items()}
    save_file(renamed, checkpoint / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"linear model\.layers\.0.* expected those of Mllama"
    ):
        GptqCheckpoint(checkpoint)

"""mdf_training.llama_weights: a Hugging Face directory of Llama 3.2 Vision becomes the backbone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration

from mdf_sdk.cli import main
from mdf_sdk.errors import CheckpointError
from mdf_sdk.prompt import PromptEncoder
from mdf_training.backbone import TILE_TABLES, build_backbone
from mdf_training.checkpoint import load_checkpoint
from mdf_training.config import PRESETS, load_preset
from mdf_training.distributed import fill
from mdf_training.llama_weights import (
    describe_backbone,
    find_preset,
    fit_tile,
    read_backbone,
)
from mdf_training.model import MDFModel
from mdf_training.recipes import Recipe
from mdf_training.tokenizer import load_tokenizer
from mdf_training.trainer import train

from .llama_directory import (
    NANO,
    build_directory,
    build_hollow_directory,
    four_tile_config,
    published_name,
    write_configs,
    write_index,
    write_json,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory at nano size, for tests that leave it as it is."""
    return build_directory(tmp_path_factory.mktemp("llama") / "Llama-nano", NANO)


@pytest.fixture
def directory(shared: Path, tmp_path: Path) -> Path:
    """One to break."""
    return shutil.copytree(shared, tmp_path / "Llama-nano")


def restrict_to_one_tile(model: MllamaForConditionalGeneration) -> None:
    """Let transformers' own model compute one tile: the tables seen as (ratio, tile, rest)."""
    vision = model.model.vision_model
    tiles = vision.max_num_tiles
    vision.config.max_num_tiles = vision.max_num_tiles = 1
    for part in (
        vision.gated_positional_embedding,
        vision.pre_tile_positional_embedding,
        vision.post_tile_positional_embedding,
    ):
        embedding = getattr(part, "tile_embedding", None) or part.embedding
        rows = embedding.weight.view(embedding.num_embeddings, tiles, -1)[:, 0]
        embedding.weight = nn.Parameter(rows.clone())
        part.max_num_tiles = 1


def logits_of(model: MllamaForConditionalGeneration, pixels: Tensor, ids: Tensor) -> Tensor:
    one = torch.ones(len(pixels), 1, dtype=torch.long)
    with torch.no_grad():
        output = model(
            input_ids=ids,
            pixel_values=pixels[:, None, None],
            aspect_ratio_ids=one,
            aspect_ratio_mask=one[:, :, None],
            # Without a mask transformers' SDPA path takes its own cross-attention for causal.
            cross_attention_mask=torch.ones(*ids.shape, 1, 1, dtype=torch.long),
            use_cache=False,
        )
    logits: Tensor = output.logits
    return logits


def saved_by_transformers(folder: Path) -> Path:
    torch.manual_seed(3)
    model = MllamaForConditionalGeneration(four_tile_config(NANO)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.save_pretrained(folder, max_shard_size="2MB")
    config = (folder / "config.json").read_text()
    write_configs(folder, NANO)
    (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize("layout", ["published", "transformers 5", "save_pretrained"])
def test_the_loaded_backbone_is_transformers_own_model_restricted_to_one_tile(
    layout: str, tmp_path: Path
) -> None:
    if layout == "save_pretrained":
        folder = saved_by_transformers(tmp_path / "saved")
    else:
        folder = build_directory(tmp_path / "built", NANO, published=layout == "published")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    stock = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    restrict_to_one_tile(stock)
    ours = build_backbone(NANO).eval()
    fill(ours, read_backbone(folder, NANO))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 48, 48, generator=generator)
    ids = torch.randint(0, 640, (2, 9), generator=generator)
    expected = logits_of(stock, pixels, ids)
    assert torch.equal(logits_of(ours, pixels, ids), expected)
    assert not torch.allclose(logits_of(ours, -pixels, ids), expected)  # the picture counts


def test_every_parameter_of_the_backbone_is_given_once_in_its_order(shared: Path) -> None:
    read = dict(read_backbone(shared, NANO))
    expected = build_backbone(NANO).state_dict()
    assert list(read) == list(expected)
    assert {n: t.shape for n, t in read.items()} == {n: t.shape for n, t in expected.items()}
    assert {t.dtype for t in read.values()} == {torch.bfloat16}


def test_a_model_on_the_meta_device_is_filled_parameter_by_parameter(shared: Path) -> None:
    with torch.device("meta"):
        model = MDFModel(NANO)
    for name, tensor in read_backbone(shared, NANO):
        owner, _, leaf = name.rpartition(".")
        setattr(model.backbone.get_submodule(owner), leaf, nn.Parameter(tensor.float()))
    assert not any(p.is_meta for p in model.backbone.parameters())


def test_one_file_without_an_index_is_read_too(shared: Path, tmp_path: Path) -> None:
    shards = [load_file(path) for path in sorted(shared.glob("*.safetensors"))]
    save_file(shards[0] | shards[1], tmp_path / "model.safetensors")
    write_configs(tmp_path, NANO)
    one, two = dict(read_backbone(tmp_path, NANO)), dict(read_backbone(shared, NANO))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert describe_backbone(tmp_path)["index_sha256"] != describe_backbone(shared)["index_sha256"]


def test_a_directory_of_the_full_size_has_the_published_shapes() -> None:
    """What build_directory writes at 11B: the base model's tile is 448 px, Instruct's 560."""
    with torch.device("meta"):
        mllama = four_tile_config(load_preset("llama-3.2-11b"))
        state = MllamaForConditionalGeneration(mllama).state_dict()
    found = {published_name(name): list(tensor.shape) for name, tensor in state.items()}
    assert len(found) == 906
    assert sum(t.numel() for t in state.values()) == 10_670_220_835  # as the published weights
    for name, shape in {
        "language_model.model.embed_tokens.weight": [128264, 4096],
        "language_model.lm_head.weight": [128256, 4096],
        "language_model.model.layers.38.cross_attn.k_norm.weight": [128],
        "language_model.model.layers.38.cross_attn_attn_gate": [1],
        "vision_model.gated_positional_embedding.tile_embedding.weight": [9, 4 * 1601 * 1280],
        "vision_model.global_transformer.layers.7.gate_ffn": [1],
        "vision_model.patch_embedding.weight": [1280, 3, 14, 14],
        "multi_modal_projector.weight": [4096, 7680],
    }.items():
        assert found[name] == shape


def test_the_small_files_of_a_directory_of_the_full_size_are_accepted(tmp_path: Path) -> None:
    """128,256 tokens and the image token behind them; the weights are missing."""
    config = load_preset("llama-3.2-11b")
    write_configs(tmp_path, config)
    encoder = PromptEncoder(load_tokenizer(config, tmp_path), config.prompt, config.labels)
    assert encoder.image_id == 128256
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: No such file"):
        read_backbone(tmp_path, config)


def test_every_tensor_of_the_full_size_is_accounted_for(tmp_path: Path) -> None:
    """21.3 GB in five shards, of which the disk holds the headers alone: all else is a hole."""
    config = load_preset("llama-3.2-11b")
    index = build_hollow_directory(tmp_path, config, shards=5)
    read_backbone(tmp_path, config)  # checks every name, shape and type; reads no weight yet
    index["another.weight"] = index.popitem()[1]
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError, match=r"another\.weight: not in model-00005-of-00005"):
        read_backbone(tmp_path, config)


@pytest.mark.parametrize("preset", ["nano", "smol-135m", "llama-3.2-11b"])
def test_a_directory_is_found_to_be_of_its_preset(preset: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", four_tile_config(PRESETS[preset]).to_dict())
    assert find_preset(tmp_path) == PRESETS[preset]


def test_a_directory_of_no_preset_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    config = four_tile_config(load_preset("llama-3.2-11b")).to_dict()
    config["text_config"]["hidden_size"] = 8192
    config["text_config"]["rope_parameters"]["factor"] = 16.0
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match=r"hidden_size: found 8192, .*rope_parameters: found"):
        find_preset(tmp_path)


def test_the_base_models_smaller_tile_becomes_the_models(tmp_path: Path) -> None:
    config = four_tile_config(load_preset("llama-3.2-11b")).to_dict()
    config["vision_config"]["image_size"] = 448
    write_json(tmp_path / "config.json", config)
    fitted = find_preset(tmp_path)
    assert (fitted.vision["image_size"], fitted.image.tower_px) == (448, 448)
    assert fitted.preset == "llama-3.2-11b"


def edit_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        write_json(folder / name, value)

    return edit


def edit_shard(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """Change the second shard's tensors, and leave the index as it is."""

    def edit(folder: Path) -> None:
        path = folder / "model-00002-of-00002.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def lie_at(file: str) -> Callable[[Path], None]:
    return edit_json(
        "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"multi_modal_projector.bias": file}),
    )


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BIAS, HEAD = "multi_modal_projector.bias", "language_model.lm_head.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_shard(lambda t: t.pop(BIAS)), f"{BIAS}: not in model-00002-of-00002"),
        (
            edit_shard(lambda t: t.update({"adapter.weight": torch.zeros(1)})),
            r"adapter\.weight: in model-00002.*, not in model.*index.*unknown adapter\.weight",
        ),
        (
            edit_shard(lambda t: t.update({BIAS: torch.zeros(7)})),
            rf"{BIAS}: found shape \[7\], expected \[128\]",
        ),
        (
            edit_shard(lambda t: t.update({BIAS: torch.zeros(128, dtype=torch.int8)})),
            f"{BIAS}: found I8, expected one of BF16, F16, F32",
        ),
        (
            edit_shard(lambda t: t.update({"lm_head.weight": t[HEAD].clone()})),
            f"lm_head.weight: there twice, also as {HEAD}",
        ),
        (
            edit_json("model.safetensors.index.json", lambda i: i["weight_map"].pop(BIAS)),
            f"{BIAS}: in model-00002-of-00002.safetensors, not in model.safetensors.index.json",
        ),
        (remove("model-00002-of-00002.safetensors"), "names model-00002-of-00002.safetensors, not"),
        (remove("model.safetensors.index.json"), "index.json: No such file"),
        (lie_at("../model-00002-of-00002.safetensors"), "expected the name of a file in this dir"),
        (lie_at("/model.safetensors"), "expected the name of a file in this directory"),
        (lie_at(r"..\model.safetensors"), "expected the name of a file in this directory"),
        (lie_at(".."), "expected the name of a file in this directory|not found there"),
        (edit_json("model.safetensors.index.json", dict.clear), "found no weight_map"),
        (cut, "model-00002-of-00002.safetensors: .*expected a safetensors file"),
        (remove("config.json"), "config.json: No such file"),
        (
            edit_json("config.json", lambda c: c.update(model_type="llava")),
            "found the model type 'l",
        ),
        (
            edit_json("config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-6)),
            "text_config.rms_norm_eps: found 1e-06, expected 1e-05",
        ),
        (
            edit_json("config.json", lambda c: c["text_config"].update(rope_theta=5e5)),
            "text_config.rope_parameters: found .*500000.0.*, expected .*10000.0",
        ),
        (
            edit_json("config.json", lambda c: c["vision_config"].update(hidden_act="relu")),
            "vision_config.hidden_act: found 'relu', expected 'gelu'",
        ),
        (
            edit_json(
                "config.json",
                lambda c: c["vision_config"].update(supported_aspect_ratios=[[1, 2], [1, 1]]),
            ),
            r"found the aspect ratios \[\[1, 2\], \[1, 1\]\], expected \[1, 1\] first",
        ),
        (edit_json("config.json", lambda c: c.update(text_config=7)), "config.json: "),
        (
            edit_json("preprocessor_config.json", lambda p: p.update(resample=3)),
            "resample: found 3, expected 2",
        ),
        (
            edit_json("preprocessor_config.json", lambda p: p.update(image_mean=[0.5, 0.5, 0.5])),
            r"image_mean: found \[0.5, 0.5, 0.5\]",
        ),
        (
            edit_json("preprocessor_config.json", lambda p: p["size"].update(height=560)),
            "size: found {'height': 560, 'width': 48}",
        ),
        (remove("preprocessor_config.json"), "preprocessor_config.json: No such file"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: .*expected JSON"),
        (lambda f: (f / "config.json").write_bytes(b"[]"), "found list, expected a JSON object"),
    ],
)
def test_a_broken_directory_is_refused_before_a_weight_is_read(
    directory: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        read_backbone(directory, NANO)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(directory: Path, value: float) -> None:
    edit_shard(lambda tensors: tensors[BIAS].__setitem__(5, value))(directory)
    with pytest.raises(CheckpointError, match=f"found NaN or infinity in {BIAS}"):
        dict(read_backbone(directory, NANO))


def test_another_preset_names_what_differs_and_how_much_is_left_out(shared: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not the preset smol-135m.*hidden_size.*more"):
        read_backbone(shared, load_preset("smol-135m"))


def test_the_preprocessor_may_stand_where_transformers_5_writes_it(directory: Path) -> None:
    value = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    write_json(directory / "processor_config.json", {"image_processor": value})
    assert len(dict(read_backbone(directory, NANO))) == len(build_backbone(NANO).state_dict())


def test_the_tables_cut_are_those_whose_shapes_depend_on_the_tiles() -> None:
    with torch.device("meta"):
        four = MllamaForConditionalGeneration(four_tile_config(NANO)).state_dict()
        one = build_backbone(NANO).state_dict()
    assert {name for name in one if one[name].shape != four[name].shape} == set(TILE_TABLES)


def test_a_directory_is_described_by_its_name_and_hashes_of_its_small_files(
    shared: Path, directory: Path
) -> None:
    described = describe_backbone(shared)
    assert described["directory"] == "Llama-nano"
    assert described == describe_backbone(directory)
    edit_json("config.json", lambda c: c.update(note="changed"))(directory)
    changed = describe_backbone(directory)
    assert changed["config_sha256"] != described["config_sha256"]
    assert changed["index_sha256"] == described["index_sha256"]


@pytest.fixture(scope="module")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch from the directory in which nothing is learned."""
    out = tmp_path_factory.mktemp("trained") / "checkpoint"
    rates = dict.fromkeys(("unet_lr", "fusion_lr", "backbone_lr"), 0.0)
    recipe = Recipe(epochs=1, batch_size=8, gates=0.3, **rates)
    train("nano", "synthetic:40:1", out, recipe=recipe, backbone=shared)
    return out


def test_training_starts_from_the_directorys_weights_gates_and_tokenizer(
    trained: Path, shared: Path
) -> None:
    checkpoint = load_checkpoint(trained)
    state = checkpoint.model.backbone.state_dict()
    for name, tensor in read_backbone(shared, NANO):
        assert torch.equal(state[name], tensor.float()), name
    assert checkpoint.tokenizer_json == (shared / "tokenizer.json").read_text(encoding="utf-8")


def test_the_provenance_names_the_directory_and_says_built_with_llama(
    trained: Path, shared: Path
) -> None:
    provenance = load_checkpoint(trained).provenance
    assert provenance["backbone"] == describe_backbone(shared)
    assert provenance["notice"] == "Not for clinical use. Built with Llama."


def test_a_run_from_another_directory_does_not_go_on(
    trained: Path, directory: Path, tmp_path: Path
) -> None:
    edit_json("config.json", lambda c: c.update(note="changed"))(directory)
    run = json.loads((trained / "provenance.json").read_text())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=r"other settings \(.*backbone"):
        train("nano", "synthetic:40:1", tmp_path / "out", backbone=directory, resume=True)


def test_the_commands_option_reaches_the_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--preset", "nano", "--data", "synthetic:40:1", "--out"]
    assert main([*words, str(tmp_path / "out"), "--backbone", str(tmp_path / "none")]) == 2
    assert "config.json: No such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_directory_of_weights_is_not_described(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        describe_backbone(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        fit_tile(NANO, tmp_path)

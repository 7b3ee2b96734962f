"""A preset in, a directory like that of Llama-3.2-11B-Vision-Instruct out, with random weights."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from transformers import MllamaConfig, MllamaForConditionalGeneration

from mdf_training.config import ModelConfig, load_preset
from mdf_training.tokenizer import load_tokenizer

NANO = load_preset("nano")
PUBLISHED = {  # transformers' names -> those of the published files
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]


def four_tile_config(config: ModelConfig) -> MllamaConfig:
    return MllamaConfig(
        text_config=dict(config.text),
        vision_config={**config.vision, "max_num_tiles": 4, "supported_aspect_ratios": RATIOS},
        image_token_index=config.text["vocab_size"],
    )


def published_name(name: str) -> str:
    for ours, theirs in PUBLISHED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def build_directory(
    folder: Path,
    config: ModelConfig,
    *,
    shards: int = 2,
    published: bool = True,
) -> Path:
    """Write a directory like that of Llama-3.2-11B-Vision-Instruct, random weights in bfloat16.

    Every file, name, shape and index of the published one, scaled to a preset. At the 11B preset
    it is 21.4 GB, and memory holds one shard.
    """
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    index = {}
    for file, shapes in cut_into_shards(config, shards):
        tensors = {
            published_name(name) if published else name: torch.empty(
                shape, dtype=torch.bfloat16
            ).normal_(0, 0.1, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    write_index(folder, index)
    write_configs(folder, config)
    return folder


def build_hollow_directory(folder: Path, config: ModelConfig, shards: int) -> dict[str, str]:
    """Write the same, of which the disk holds the headers alone; return the file of each tensor."""
    index = {}
    for file, shapes in cut_into_shards(config, shards):
        header, size = {}, 0
        for name, shape in shapes.items():
            end = size + 2 * shape.numel()
            tensor = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, end]}
            header[published_name(name)], size = tensor, end
        content = json.dumps(header).encode()
        with (folder / file).open("wb") as shard:
            shard.write(len(content).to_bytes(8, "little") + content)
            shard.truncate(shard.tell() + size)
        index |= dict.fromkeys(header, file)
    write_index(folder, index)
    write_configs(folder, config)
    return index


def cut_into_shards(
    config: ModelConfig, shards: int
) -> Iterator[tuple[str, dict[str, torch.Size]]]:
    """Yield each file's name, and its tensors' shapes by transformers' names."""
    with torch.device("meta"):
        state = MllamaForConditionalGeneration(four_tile_config(config)).state_dict()
    names = list(state)
    for number in range(shards):
        own = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        yield file, {name: state[name].shape for name in own}


def write_index(folder: Path, index: Mapping[str, str]) -> None:
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def write_configs(folder: Path, config: ModelConfig) -> None:
    """The JSON files as published: the theta outside of rope_scaling, among other things."""
    mllama = four_tile_config(config).to_dict()
    rope = dict(mllama["text_config"].pop("rope_parameters"))
    mllama["text_config"]["rope_theta"] = rope.pop("rope_theta")
    mllama["text_config"]["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    write_json(folder / "config.json", mllama)
    side = config.image.tower_px
    preprocessor = {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": config.image.tower_mean,
        "image_std": config.image.tower_std,
        "max_image_tiles": 4,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": side, "width": side},
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    (folder / "tokenizer.json").write_text(build_tokenizer(config), encoding="utf-8")


def build_tokenizer(config: ModelConfig) -> str:
    """The nano tokenizer, filled up with reserved tokens to another preset's vocabulary."""
    tokenizer = Tokenizer.from_str(load_tokenizer(NANO))
    if config.preset == "nano":
        return str(tokenizer.to_str())
    content = json.loads(tokenizer.to_str())
    size = NANO.text["vocab_size"]
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < size]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    special = ["<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>"]
    count = config.text["vocab_size"] - size - len(special)
    special += [f"<|reserved_{i}|>" for i in range(count)]
    tokens = [AddedToken(t, special=True) for t in [*special, config.prompt.image_token]]
    tokenizer.add_special_tokens(tokens)
    return str(tokenizer.to_str())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")

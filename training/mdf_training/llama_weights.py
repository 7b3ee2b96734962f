"""A Hugging Face directory of Llama 3.2 Vision in, the backbone's weights by name out."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from math import isclose
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from transformers import MllamaConfig

from mdf_sdk.errors import CheckpointError
from mdf_training.backbone import TILE_TABLES, build_backbone, slice_tile_table, to_mllama_config
from mdf_training.config import ONE_TILE, PRESETS, ModelConfig
from mdf_training.weight_files import is_finite, join_problems, open_shard

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# transformers 5 writes the second, with the picture's part inside.
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
COPY_AGAIN = "Copy the directory of Llama-3.2-11B-Vision or -Instruct again."

# The published files' names begin otherwise than those of transformers' model.
_RENAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_model.": "model.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
# Which tokens begin, end and pad a text is the tokenizer's business; a preset's tables have one
# tile, and its tile may have another size.
_NOT_COMPARED = {"bos_token_id", "eos_token_id", "pad_token_id", "image_size", *ONE_TILE}
_ALSO_COMPARED = {
    "text_config": ("hidden_act", "tie_word_embeddings"),
    "vision_config": ("hidden_act", "num_channels", "norm_eps"),
}
_BILINEAR = 2  # Pillow's number; how the SDK resizes
_FLOATS = ("BF16", "F16", "F32")


def read_backbone(
    folder: str | os.PathLike[str], config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Check a directory, then read it one tensor at a time.

    Args:
        folder: config.json, preprocessor_config.json and model.safetensors, or its shards with
            their index; tensors named as in the published files or as in transformers' model.
        config: the preset's, of the directory's tile size (see `fit_tile`).

    Returns:
        (name, tensor) for each entry of the backbone's state, in its order: names as in
        `MDFModel.backbone`, tensors on the CPU as they are stored, position tables cut to one tile.

    Raises:
        CheckpointError: before anything is read: the directory is of another architecture or
            another preprocessing, a file is missing or broken, a tensor is missing, unknown or of
            another shape, with their names. While reading: NaN or infinity.
    """
    folder = Path(folder)
    stored = _read_config(folder)
    check_architecture(folder, config)
    check_preprocessor(folder, config)
    with torch.device("meta"):
        shapes = {n: list(t.shape) for n, t in build_backbone(config).state_dict().items()}
    tiles = stored["vision_config"]["max_num_tiles"]
    ratios = len(stored["vision_config"]["supported_aspect_ratios"])
    expected = {
        name: [ratios + 1, tiles * shape[1]] if name in TILE_TABLES else shape
        for name, shape in shapes.items()
    }
    places = _find_tensors(folder, expected)
    return (
        (name, slice_tile_table(tensor, tiles) if name in TILE_TABLES else tensor)
        for name, tensor in ((name, _read_tensor(*places[name])) for name in shapes)
    )


def fit_tile(config: ModelConfig, folder: str | os.PathLike[str]) -> ModelConfig:
    """Return the config with the directory's tile size: 560 px for Instruct, 448 px for the base.

    Raises:
        CheckpointError: no directory of Llama 3.2 Vision.
    """
    side_px = _read_config(Path(folder))["vision_config"]["image_size"]
    return dataclasses.replace(
        config,
        vision={**config.vision, "image_size": side_px},
        image=dataclasses.replace(config.image, tower_px=side_px),
    )


def find_preset(folder: str | os.PathLike[str]) -> ModelConfig:
    """Return the preset that a directory has the architecture of, with its tile size.

    Raises:
        CheckpointError: none; says how it differs from the paper's.
    """
    for preset in PRESETS.values():
        config = fit_tile(preset, folder)
        if not _differences(Path(folder), config):
            return config
    config = fit_tile(PRESETS["llama-3.2-11b"], folder)
    check_architecture(folder, config)
    return config


def describe_backbone(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return a directory's name and the SHA-256 of its config and index, for the provenance.

    The weights are not hashed: 22 GB would be read twice. A directory without an index is known by
    the header of its one file.

    Raises:
        CheckpointError: a file is missing.
    """
    folder = Path(folder)
    try:
        config = (folder / CONFIG).read_bytes()
        if (folder / INDEX).exists():
            index = (folder / INDEX).read_bytes()
        else:
            with (folder / SINGLE).open("rb") as file:
                index = file.read(int.from_bytes(file.read(8), "little"))
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: {error.strerror}; expected a Hugging Face directory with {CONFIG} "
            f"and {INDEX}. {COPY_AGAIN}"
        ) from None
    return {
        "directory": folder.resolve().name,
        "config_sha256": sha256(config).hexdigest(),
        "index_sha256": sha256(index).hexdigest(),
    }


def check_architecture(folder: str | os.PathLike[str], config: ModelConfig) -> None:
    """Hold a directory's config.json against a preset.

    Raises:
        CheckpointError: names every field that differs.
    """
    if differences := _differences(Path(folder), config):
        raise CheckpointError(
            f"{Path(folder) / CONFIG}: is not the preset {config.preset}: "
            f"{join_problems(differences)}. "
            "Pass the directory of the model that the preset names, or another --preset."
        )


def check_preprocessor(folder: str | os.PathLike[str], config: ModelConfig) -> None:
    """Hold a directory's picture preprocessing against what the SDK does for a config.

    Raises:
        CheckpointError: names every field that differs.
    """
    folder = Path(folder)
    path = folder / PREPROCESSOR
    found = _read_json(
        path if path.exists() or not (folder / PROCESSOR).exists() else folder / PROCESSOR
    )
    found = found.get("image_processor", found)
    side = config.image.tower_px
    expected: dict[str, Any] = {
        "image_mean": list(config.image.tower_mean),
        "image_std": list(config.image.tower_std),
        "size": {"height": side, "width": side},
        "resample": _BILINEAR,
        "rescale_factor": 1 / 255,
    }
    problems = [
        f"{name}: found {found.get(name)!r}, expected {want!r}"
        for name, want in expected.items()
        if not _equal(found.get(name), want)
    ]
    if problems:
        raise CheckpointError(
            f"{path}: the pictures would be prepared otherwise: {join_problems(problems)}. "
            f"{COPY_AGAIN}"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """Let transformers read config.json: it knows the defaults of what a file leaves out."""
    values = _read_json(folder / CONFIG)
    if values.get("model_type") != "mllama":
        raise CheckpointError(
            f"{folder / CONFIG}: found the model type {values.get('model_type')!r}, expected "
            "'mllama', Llama 3.2 Vision. Pass the directory of Llama-3.2-11B-Vision or -Instruct."
        )
    try:
        config: dict[str, Any] = MllamaConfig.from_dict(values).to_dict()
        ratios = [list(ratio) for ratio in config["vision_config"]["supported_aspect_ratios"]]
    except Exception as error:  # transformers checks types by many kinds of exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder / CONFIG}: {reason}. {COPY_AGAIN}") from None
    if ratios[:1] != [[1, 1]]:
        raise CheckpointError(
            f"{folder / CONFIG}: found the aspect ratios {ratios}, expected [1, 1] first. "
            f"{COPY_AGAIN}"
        )
    return config


def _differences(folder: Path, config: ModelConfig) -> list[str]:
    stored, ours = _read_config(folder), to_mllama_config(config).to_dict()
    differences = []
    for part, preset in (("text_config", config.text), ("vision_config", config.vision)):
        for name in [*(n for n in preset if n not in _NOT_COMPARED), *_ALSO_COMPARED[part]]:
            found, want = stored[part].get(name), ours[part].get(name)
            if not _equal(found, want):
                differences.append(f"{part}.{name}: found {found!r}, expected {want!r}")
    if stored["image_token_index"] != ours["image_token_index"]:
        differences.append(
            f"image_token_index: found {stored['image_token_index']!r}, "
            f"expected {ours['image_token_index']!r}"
        )
    return differences


def _equal(found: Any, want: Any) -> bool:
    """Compare JSON values; numbers to the digits that a JSON file may have dropped."""
    if isinstance(want, Mapping):
        return (
            isinstance(found, Mapping)
            and found.keys() == want.keys()
            and all(_equal(found[key], want[key]) for key in want)
        )
    if isinstance(want, list | tuple):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(want)
            and all(_equal(a, b) for a, b in zip(found, want, strict=True))
        )
    if isinstance(want, float) and isinstance(found, int | float):
        return isclose(found, want, rel_tol=1e-6)
    return bool(found == want)


def _find_tensors(folder: Path, expected: Mapping[str, list[int]]) -> dict[str, tuple[Path, str]]:
    """Return where each parameter lies, as (file, its name there); reads headers alone."""
    index = _read_index(folder)
    places: dict[str, tuple[Path, str]] = {}
    problems = []
    for file in dict.fromkeys(index.values()) if index else [SINGLE]:
        path = folder / file
        with open_shard(path, COPY_AGAIN) as shard:
            stored = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
        if index:
            listed = {name for name, place in index.items() if place == file}
            problems += [f"{name}: not in {file}" for name in sorted(listed - stored.keys())]
            problems += [
                f"{name}: in {file}, not in {INDEX}" for name in stored if name not in listed
            ]
        for name, tensor in stored.items():
            parameter = _rename(name)
            if parameter not in expected:
                problems.append(f"unknown {name}")
            elif parameter in places:
                problems.append(f"{name}: there twice, also as {places[parameter][1]}")
            elif tensor.get_shape() != expected[parameter]:
                problems.append(
                    f"{name}: found shape {tensor.get_shape()}, expected {expected[parameter]}"
                )
            elif tensor.get_dtype() not in _FLOATS:
                problems.append(
                    f"{name}: found {tensor.get_dtype()}, expected one of {', '.join(_FLOATS)}"
                )
            places[parameter] = path, name
    problems += [f"missing {name}" for name in expected if name not in places]
    if problems:
        raise CheckpointError(
            f"{folder}: the tensors do not fit {CONFIG}: {join_problems(problems)}. {COPY_AGAIN}"
        )
    return places


def _read_index(folder: Path) -> dict[str, str]:
    """Return which file holds each tensor; empty where one file, without an index, holds all."""
    path = folder / INDEX
    if not path.exists() and (folder / SINGLE).is_file():
        return {}
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(
            f"{path}: found no weight_map, expected the file of each tensor. {COPY_AGAIN}"
        )
    for name, file in index.items():
        if not isinstance(file, str) or "\\" in file or PurePath(file).name != file:
            raise CheckpointError(
                f"{path}: found {file!r} as the file of {name}, expected the name of a file "
                f"in this directory. {COPY_AGAIN}"
            )
    missing = sorted(file for file in set(index.values()) if not (folder / file).is_file())
    if missing:
        raise CheckpointError(
            f"{path}: names {join_problems(missing)}, not found there. {COPY_AGAIN}"
        )
    return index


def _rename(name: str) -> str:
    for old, new in _RENAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _read_tensor(path: Path, name: str) -> Tensor:
    with open_shard(path, COPY_AGAIN) as shard:
        tensor: Tensor = shard.get_tensor(name)
    if not is_finite(tensor):
        raise CheckpointError(
            f"{path}: found NaN or infinity in {name}, expected finite weights. {COPY_AGAIN}"
        )
    return tensor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; expected a Hugging Face directory of Llama 3.2 Vision. "
            f"{COPY_AGAIN}"
        ) from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise CheckpointError(f"{path}: {error}; expected JSON. {COPY_AGAIN}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: found {type(value).__name__}, expected a JSON object. {COPY_AGAIN}"
        )
    return value

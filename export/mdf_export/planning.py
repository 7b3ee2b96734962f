"""A config in, the bytes of the engine that it will make out, before a weight is read."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from mdf_export.blocks import build_block, read_spec
from mdf_export.blocks.source import BlockSource
from mdf_export.recipe import QUANTIZED_BLOCKS, ExportRecipe
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.errors import StorageError
from mdf_sdk.manifest import BLOCKS, BlockSpec
from mdf_training.config import ModelConfig, load_preset


@dataclass(frozen=True)
class EnginePlan:
    """What an engine will hold, told before it is built.

    Attributes:
        source: of the blocks, without weights.
        blocks: bytes of each block's weights, which a device holds.
        embeddings: bytes of the token embeddings, which stay on the host.
    """

    source: BlockSource
    blocks: Mapping[str, int]
    embeddings: int

    @property
    def device_bytes(self) -> int:
        return sum(self.blocks.values())


@torch.no_grad()
def plan_engine(config: ModelConfig, tokenizer_json: str, recipe: ExportRecipe) -> EnginePlan:
    """Count an engine's bytes from a config; needs no weights."""
    checkpoint = StreamedCheckpoint.without_weights(config, tokenizer_json)
    source = BlockSource(checkpoint, recipe)
    rows = checkpoint.model.backbone.model.language_model.embed_tokens.weight
    itemsize = np.dtype(recipe.float_type).itemsize
    return EnginePlan(
        source,
        {name: build_block(name, source, None) for name in BLOCKS},
        rows.numel() * itemsize,
    )


def plan_checkpoint(checkpoint_dir: str | os.PathLike[str], recipe: ExportRecipe) -> EnginePlan:
    """Count the engine of a checkpoint directory; reads no weights."""
    checkpoint = StreamedCheckpoint.open(Path(checkpoint_dir))
    return plan_engine(checkpoint.config, checkpoint.tokenizer_json, recipe)


def plan_preset(preset: str, recipe: ExportRecipe) -> EnginePlan:
    """Count the engine of a preset.

    The tokenizer of llama-3.2-11b is the user's own: its tokens are counted as words here, which
    moves the decoder by less than a thousandth.
    """
    config = load_preset(preset)
    return plan_engine(config, _words_tokenizer(config), recipe)


@torch.no_grad()
def plan_specs(plan: EnginePlan) -> dict[str, BlockSpec]:
    """Build the graphs without their weights, and read off them what the manifest will say."""
    source, specs = plan.source, {}
    encoder = source.checkpoint.prompt_encoder()
    with tempfile.TemporaryDirectory() as folder:
        for name in BLOCKS:
            build_block(name, source, Path(folder))
            path = Path(folder) / f"{name}.onnx"
            specs[name] = read_spec(path, source.recipe.block_precision(name), encoder)
    return specs


def check_disk(plan: EnginePlan, recipe: ExportRecipe, engine_dir: Path) -> None:
    """Refuse before the work begins, not after an hour of it.

    Raises:
        StorageError: the disk under `engine_dir` has less free than the export needs.
    """
    graphs = plan.device_bytes + plan.embeddings
    work = sum(plan.blocks[name] for name in QUANTIZED_BLOCKS) if recipe.calibrates else 0
    needed = int(1.05 * (graphs + work)) + 2**20
    folder = next(
        path for path in (engine_dir.resolve(), *engine_dir.resolve().parents) if path.exists()
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{engine_dir}: found {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for the "
            "engine and the work on it. Free some, or name a folder on another disk."
        )


def _words_tokenizer(config: ModelConfig) -> str:
    """Return tokenizer.json of a stand-in that takes each word for a token, to count with."""
    prompt = config.prompt
    special = (prompt.image_token, prompt.end_token)
    tokenizer = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special))
    return str(tokenizer.to_str())

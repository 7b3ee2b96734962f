"""A preset in, a checkpoint directory of random weights out: its shapes take the time that trained
ones take. Needs the training extra.

As a module (`python -m mdf_benchmarks.latency.random_checkpoint PRESET FOLDER [TOKENIZER]`) it is
a process of its own: 22 GB at 11B are gone when it ends.
"""

import json
import re
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor

from mdf_benchmarks.latency.random_engine import NOTICE
from mdf_sdk.errors import CheckpointError, DeviceMemoryError, MDFError
from mdf_sdk.prompt import PromptEncoder
from mdf_sdk.sessions.host_memory import free_and_total_bytes
from mdf_training.checkpoint import Checkpoint, save_checkpoint
from mdf_training.config import ModelConfig, load_preset
from mdf_training.model import build_model
from mdf_training.tokenizer import train_tokenizer

_POOL_SIZE = 2**24
_STD = 0.02
_IMAGE_ROWS = 8  # of Mllama's embedding, past the vocabulary
_SEED = 20261127


@torch.no_grad()
def save_random_checkpoint(preset: str, folder: Path, tokenizer: Path | None) -> None:
    """Write a checkpoint in bfloat16.

    Every matrix is cut from one pool of 16.8 million normal numbers, at another place each: drawing
    10 billion would take longer than all the rest.

    Args:
        preset: its name.
        folder: new.
        tokenizer: the model's own tokenizer.json; None takes `stand_in_tokenizer`.

    Raises:
        CheckpointError: no such preset, or not its tokenizer.
        DeviceMemoryError: the host has less memory free than the weights take.
        StorageError: the disk is full.
    """
    config = load_preset(preset)
    content = read_tokenizer(tokenizer, config) if tokenizer else stand_in_tokenizer(config)
    with torch.device("meta"):
        model = build_model(config, pretrained=False).eval().bfloat16()
    _check_memory(sum(tensor.nbytes for tensor in model.state_dict().values()))
    model.to_empty(device="cpu")
    random = torch.Generator().manual_seed(_SEED)
    pool = (_STD * torch.randn(_POOL_SIZE, generator=random, dtype=torch.float32)).bfloat16()
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            _cut(tensor.view(-1), pool, int(torch.randint(_POOL_SIZE, (), generator=random)))
        else:  # norms and gates are open, biases and means are nothing
            tensor.fill_(name.endswith(("weight", "running_var", "gate")))
    provenance = {"notice": NOTICE, "history": []}
    save_checkpoint(folder, Checkpoint(model, content, provenance))


def read_tokenizer(path: Path, config: ModelConfig) -> str:
    """Return the content of a tokenizer.json that knows a preset's prompt.

    Raises:
        CheckpointError: it does not, or has more tokens than the embedding has rows.
    """
    try:
        content = path.read_text(encoding="utf-8")
        encoder = PromptEncoder(content, config.prompt, config.labels)
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(
            f"{path}: {error}; expected the tokenizer.json of {config.preset}. Leave --tokenizer "
            "out for a stand-in"
        ) from None
    rows = config.text["vocab_size"] + _IMAGE_ROWS
    if not encoder.image_id < rows:
        raise CheckpointError(
            f"{path}: found {config.prompt.image_token} at {encoder.image_id}, expected it below "
            f"{rows}. Leave --tokenizer out for a stand-in"
        )
    return content


def stand_in_tokenizer(config: ModelConfig) -> str:
    """Make a tokenizer.json for a preset whose own is not at hand.

    A byte-level BPE trained on the prompt and on synthetic cases, so that the prompt's words are
    mostly one token each, as they are in a large vocabulary.
    """
    prompt, tokenizer = config.prompt, train_tokenizer(config)
    words = prompt.prefix + prompt.suffix + prompt.image_token + prompt.end_token
    special = dict.fromkeys(re.findall(r"<\|\w+\|>", words))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return str(tokenizer.to_str())


def _check_memory(needed: int) -> None:
    memory = free_and_total_bytes()
    if memory is not None and memory[0] < needed:
        raise DeviceMemoryError(
            f"host: found {memory[0] / 1e9:.1f} GB of memory free, expected {needed / 1e9:.1f} for "
            "the checkpoint of random weights. Close what else uses it, or take a smaller preset: "
            "--preset smol-135m"
        )


def _cut(target: Tensor, pool: Tensor, start: int) -> None:
    """Fill a flat tensor from a place in the pool on, and from its beginning again."""
    filled = 0
    while filled < len(target):
        piece = pool[start : start + len(target) - filled]
        target[filled : filled + len(piece)] = piece
        filled, start = filled + len(piece), 0


if __name__ == "__main__":
    try:
        save_random_checkpoint(
            sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None
        )
    except MDFError as error:
        print(json.dumps({"type": type(error).__name__, "message": str(error)}))
        sys.exit(2)

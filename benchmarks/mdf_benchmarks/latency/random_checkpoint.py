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
from mdf_sdk.errors import MDFError
from mdf_training.checkpoint import Checkpoint, save_checkpoint
from mdf_training.config import ModelConfig, load_preset
from mdf_training.model import build_model
from mdf_training.tokenizer import train_tokenizer

_POOL_SIZE = 2**24
_STD = 0.02
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
    """
    config = load_preset(preset)
    content = tokenizer.read_text(encoding="utf-8") if tokenizer else stand_in_tokenizer(config)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = build_model(config, pretrained=False).eval()
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

"""A checkpoint directory <-> a fused model: JSON, safetensors shards and a tokenizer; no pickle."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdf_sdk.errors import CheckpointError
from mdf_sdk.prompt import PromptEncoder
from mdf_sdk.staging import staged_directory
from mdf_training.config import ModelConfig
from mdf_training.model import MDFModel, build_model

CONFIG, TOKENIZER, PROVENANCE = "config.json", "tokenizer.json", "provenance.json"
MAX_SHARD_SIZE = "4GB"


@dataclass(frozen=True)
class Checkpoint:
    """A model and what it is used with.

    Attributes:
        model: in eval mode.
        tokenizer_json: content of tokenizer.json.
        provenance: how it was made: data, seed, versions, metrics, notice.
    """

    model: MDFModel
    tokenizer_json: str
    provenance: Mapping[str, Any]

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def prompt_encoder(self) -> PromptEncoder:
        """Build the encoder of the checkpoint's prompt and label set."""
        return PromptEncoder(self.tokenizer_json, self.config.prompt, self.config.labels)


def save_checkpoint(
    folder: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint; one that stands in `folder` already is replaced only by a complete one.

    Args:
        folder: the checkpoint directory.
        checkpoint: what to write.
        extra: further files by name, such as the optimizer's state for a later resume.
    """
    with staged_directory(Path(folder), replace=True) as staging:
        save_torch_state_dict(checkpoint.model.state_dict(), staging, max_shard_size=MAX_SHARD_SIZE)
        _write_json(staging / CONFIG, checkpoint.config.to_dict())
        _write_json(staging / PROVENANCE, checkpoint.provenance)
        (staging / TOKENIZER).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        for name, content in (extra or {}).items():
            (staging / name).write_bytes(content)


def load_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint into a float32 model on the CPU, in eval mode.

    Raises:
        CheckpointError: no checkpoint there, or its tensors are not the model's, with their names.
    """
    folder = Path(folder)
    config = ModelConfig.from_dict(_read_json(folder / CONFIG))
    try:
        model = build_model(config, pretrained=False)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: describes no model that can be built ({error!r}), expected what "
            "`mdf train` wrote. Copy the checkpoint again."
        ) from error
    model.load_state_dict(_read_tensors(folder, model.state_dict()))
    return Checkpoint(model.eval(), _read_text(folder / TOKENIZER), _read_json(folder / PROVENANCE))


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over config.json and the tensor files by name: the model's identity."""
    total = sha256()
    for path in [folder / CONFIG, *sorted(folder.glob("model*.safetensors"))]:
        total.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


def _read_tensors(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: {error}; expected a safetensors file. Copy the checkpoint again."
            ) from None
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in expected]
    problems += [
        f"{name}: found shape {list(tensors[name].shape)}, expected {list(want.shape)}"
        for name, want in expected.items()
        if name in tensors and tensors[name].shape != want.shape
    ]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{folder}: the tensors do not fit config.json: {'; '.join(problems[:10])}{more}. "
            "Copy the checkpoint again, or train it with `mdf train`."
        )
    broken = [
        n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()
    ]
    if broken:
        raise CheckpointError(f"{folder}: found NaN or infinity in {', '.join(broken[:10])}")
    return tensors


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise CheckpointError(
            f"{path}: {reason}; expected a checkpoint directory. "
            "`mdf train --preset nano --data synthetic:6000:1 --out CHECKPOINT` makes one."
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}: {error}; expected JSON. Copy the checkpoint again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A checkpoint directory <-> a fused model: JSON, safetensors shards and a tokenizer; no pickle."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mdf_sdk.errors import CheckpointError, StorageError
from mdf_sdk.prompt import PromptEncoder
from mdf_sdk.staging import staged_directory
from mdf_training.config import ModelConfig
from mdf_training.distributed import local_rows, whole
from mdf_training.model import MDFModel, build_model
from mdf_training.weight_files import is_finite, join_problems, open_shard

CONFIG, TOKENIZER, PROVENANCE = "config.json", "tokenizer.json", "provenance.json"
MAX_SHARD_SIZE = "4GB"
COPY_AGAIN = "Copy the checkpoint again."


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
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint; one that stands in `folder` already is replaced only by a complete one.

    Of a sharded model, every process calls it and the first one writes: the same files, whatever
    the number of processes, with MAX_SHARD_SIZE and one tensor more in memory at a time.

    Args:
        folder: the checkpoint directory.
        checkpoint: what to write.
        extra: further files by name, such as the run's settings for a later resume.
        tensors: further tensors by the stem of their files, such as the optimizer's state.

    Raises:
        StorageError: the disk is full, or cannot be written to.
    """
    stems = {"model": checkpoint.model.state_dict(), **(tensors or {})}
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        for stem, named in stems.items():
            for names in _plan_files(stem, named).filename_to_tensors.values():
                for name in names:
                    whole(named[name])
        return
    folder = Path(folder)
    try:
        with staged_directory(folder, replace=True) as staging:
            for stem, named in stems.items():
                _write_tensors(staging, stem, named)
            _write_json(staging / CONFIG, checkpoint.config.to_dict())
            _write_json(staging / PROVENANCE, checkpoint.provenance)
            (staging / TOKENIZER).write_text(checkpoint.tokenizer_json, encoding="utf-8")
            for name, content in (extra or {}).items():
                (staging / name).write_bytes(content)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder}: could not be written ({error}), expected room for a whole checkpoint "
            "beside the last one. That one is kept: make room, then mdf train ... --resume"
        ) from error


def load_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint into a float32 model on the CPU, in eval mode.

    Raises:
        CheckpointError: no checkpoint there, or its tensors are not the model's, with their names.
    """
    folder = Path(folder)
    model = build_configured_model(folder)
    load_weights(model, folder)
    return Checkpoint(model.eval(), read_tokenizer(folder), read_provenance(folder))


@torch.no_grad()
def load_weights(model: MDFModel, folder: Path) -> None:
    """Read a checkpoint's tensors into its model; into a sharded one, each process its own rows.

    Raises:
        CheckpointError: its tensors are not the model's, with their names.
    """
    expected = model.state_dict()
    tensors = CheckpointTensors(folder, expected)
    for name, tensor in expected.items():
        tensors.read_into(tensor, name)


def recover_checkpoint(folder: Path) -> None:
    """Clear away what a run that was killed while it saved has left beside its checkpoint.

    Saving renames the last checkpoint, then the new one; between the two, neither has its name.
    """
    for old in folder.parent.glob(f".{folder.name}.*.old/{folder.name}"):
        if not folder.exists():
            old.replace(folder)
        shutil.rmtree(old.parent)
    for partial in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(partial)


def build_configured_model(folder: Path) -> MDFModel:
    """Build the model of a checkpoint's config.json on the current default device, no weight read.

    Raises:
        CheckpointError: no checkpoint there, or no model can be built from its config.
    """
    config = ModelConfig.from_dict(_read_json(folder / CONFIG))
    try:
        return build_model(config, pretrained=False).eval()
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: describes no model that can be built ({error!r}), expected what "
            "`mdf train` wrote. Copy the checkpoint again."
        ) from error


class TensorFiles:
    """The tensors of the files `STEM*.safetensors` by name, each read when it is asked for.

    Attributes:
        shapes: by name.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        """Find every tensor; reads the files' headers alone.

        Raises:
            CheckpointError: one is no safetensors file.
        """
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        for path in sorted(folder.glob(f"{stem}*.safetensors")):
            with open_shard(path, COPY_AGAIN) as shard:
                for name in shard.keys():  # noqa: SIM118
                    self._files[name] = path
                    self.shapes[name] = shard.get_slice(name).get_shape()

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor as it is stored.

        Raises:
            CheckpointError: it holds NaN or infinity, or cannot be read.
        """
        return self._read(name, None)

    @torch.no_grad()
    def read_into(self, target: Tensor, name: str) -> None:
        """Fill a tensor of the stored one's shape: of a sharded one, this process's rows alone.

        Raises:
            CheckpointError: as `tensors[name]` does.
        """
        local, rows = local_rows(target)
        if local.numel():
            local.copy_(self._read(name, None if local is target else rows))

    def _read(self, name: str, rows: slice | None) -> Tensor:
        path = self._files[name]
        with open_shard(path, COPY_AGAIN) as shard:
            tensor: Tensor = shard.get_tensor(name) if rows is None else shard.get_slice(name)[rows]
        if not is_finite(tensor):
            raise CheckpointError(
                f"{path}: found NaN or infinity in {name}, expected finite weights. Copy the "
                "checkpoint again, or go back to an earlier one."
            )
        return tensor


class CheckpointTensors(TensorFiles):
    """A checkpoint's model tensors, which are a model's own by name and shape."""

    def __init__(self, folder: Path, expected: Mapping[str, Tensor]) -> None:
        """Find every tensor; reads the shards' headers alone.

        Args:
            folder: the checkpoint directory.
            expected: the model's own state, "meta" included.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape, with its name; or a
                shard is no safetensors file.
        """
        super().__init__(folder, "model")
        shapes = self.shapes
        problems = [f"missing {name}" for name in expected if name not in shapes]
        problems += [f"unknown {name}" for name in shapes if name not in expected]
        problems += [
            f"{name}: found shape {shapes[name]}, expected {list(want.shape)}"
            for name, want in expected.items()
            if name in shapes and shapes[name] != list(want.shape)
        ]
        if problems:
            raise CheckpointError(
                f"{folder}: the tensors do not fit config.json: {join_problems(problems)}. "
                "Copy the checkpoint again, or train it with `mdf train`."
            )


def read_tokenizer(folder: Path) -> str:
    """Return the content of a checkpoint's tokenizer.json."""
    return _read_text(folder / TOKENIZER)


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's provenance.json."""
    return _read_json(folder / PROVENANCE)


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over config.json and the tensor files by name: the model's identity."""
    total = sha256()
    for path in [folder / CONFIG, *sorted(folder.glob("model*.safetensors"))]:
        total.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()


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


def _plan_files(stem: str, tensors: Mapping[str, Tensor]) -> StateDictSplit:
    """Say which file holds which tensors: `STEM.safetensors`, or shards of MAX_SHARD_SIZE."""
    shapes = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}
    return split_torch_state_dict_into_shards(
        shapes, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=MAX_SHARD_SIZE
    )


def _write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    plan = _plan_files(stem, tensors)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: whole(tensors[name]).cpu().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / f"{stem}.safetensors.index.json", index)

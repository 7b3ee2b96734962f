"""A checkpoint directory in, its model out, whose weights stay on disk until they are needed."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdf_sdk.prompt import PromptEncoder
from mdf_training.checkpoint import (
    CheckpointTensors,
    build_configured_model,
    read_provenance,
    read_tokenizer,
)
from mdf_training.config import ModelConfig
from mdf_training.model import MDFModel, build_model


class StreamedCheckpoint:
    """A model that holds no weight; one module at a time takes its own from disk.

    So 11B parameters pass through a few GB of memory.

    Attributes:
        model: the fused model, in eval mode.
        device: of weights that are loaded. They become float32; integers keep their dtype.
        tokenizer_json, provenance: as in Checkpoint.
    """

    def __init__(
        self,
        model: MDFModel,
        tensors: CheckpointTensors | Mapping[str, Tensor],
        device: torch.device | str,
        tokenizer_json: str,
        provenance: Mapping[str, Any],
    ) -> None:
        """Args:
        model: on the meta device.
        tensors: its weights by name.
        """
        self.model, self.device = model, torch.device(device)
        self.tokenizer_json, self.provenance = tokenizer_json, provenance
        # Its frequencies are computed, not stored: on the meta device they would be lost.
        text: Any = model.backbone.model.language_model
        text.rotary_emb = type(text.rotary_emb)(text.config).to(self.device)
        self._tensors = tensors
        self._names = {module: name for name, module in model.named_modules()}
        for module in self._names:
            self._unload(module)

    @classmethod
    def open(cls, folder: Path, device: torch.device | str = "cpu") -> "StreamedCheckpoint":
        """Read a checkpoint's config and headers, and no weight yet.

        Raises:
            CheckpointError: no checkpoint there, or its tensors are not the model's.
        """
        with torch.device("meta"):
            model = build_configured_model(folder)
        tensors = CheckpointTensors(folder, model.state_dict())
        return cls(model, tensors, device, read_tokenizer(folder), read_provenance(folder))

    @classmethod
    def without_weights(cls, config: ModelConfig, tokenizer_json: str) -> "StreamedCheckpoint":
        """Build one whose weights are all on the meta device, to count what an engine will hold."""
        with torch.device("meta"):
            model = build_model(config, pretrained=False).eval()
        return cls(model, model.state_dict(), "meta", tokenizer_json, {})

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def prompt_encoder(self) -> PromptEncoder:
        """Build the encoder of the checkpoint's prompt and label set."""
        return PromptEncoder(self.tokenizer_json, self.config.prompt, self.config.labels)

    def name_of(self, module: nn.Module) -> str:
        """Return the module's name in the model, e.g. "fusion.0.q_proj"."""
        return self._names[module]

    @contextmanager
    def loaded(self, *modules: nn.Module) -> Iterator[None]:
        """Give modules, and all below them, their weights for the time of the block.

        Raises:
            CheckpointError: a weight cannot be read, or is not finite.
        """
        with ExitStack() as stack:
            for module in modules:
                for part in module.modules():
                    self._load(part)
                    stack.callback(self._unload, part)
            yield

    def read(self, module: nn.Module, name: str) -> Tensor:
        """Return one weight of a module, in the device and dtype of weights that are loaded.

        Raises:
            CheckpointError: it cannot be read, or is not finite.
        """
        stored = self._tensors[f"{self._names[module]}.{name}"]
        return stored.to(self.device, torch.float32 if stored.is_floating_point() else stored.dtype)

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Let the model run as it is: each module loads its own weights for its own forward."""
        with ExitStack() as stack:
            for module in self._names:
                if _direct_tensors(module):
                    hooks = (
                        module.register_forward_pre_hook(lambda m, _: self._load(m)),
                        module.register_forward_hook(
                            lambda m, *_: self._unload(m), always_call=True
                        ),
                    )
                    for hook in hooks:
                        stack.callback(hook.remove)
            yield

    def _load(self, module: nn.Module) -> None:
        for name in _direct_tensors(module):
            _replace(module, name, self.read(module, name))

    def _unload(self, module: nn.Module) -> None:
        """Put one NaN, seen through the weight's shape, in its place: device and dtype can still be
        asked for, and a use of a weight that is not loaded shows."""
        for name, tensor in _direct_tensors(module).items():
            nothing = torch.tensor(0, dtype=tensor.dtype, device=self.device)
            if tensor.is_floating_point():
                nothing = torch.tensor(torch.nan, device=self.device)
            _replace(module, name, nothing.expand(tensor.shape))


def _direct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and stored buffers, without those of the modules below it."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if "." not in name}


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value

"""The rivals, each as one value that reads a photograph and scores a text: what a user would run
who has PyTorch and no engine. Nothing here is imported by the process that runs the engine."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor

from mdf_benchmarks.latency.peer_process import NotAvailableError, PeerOptions
from mdf_sdk import load_manifest
from mdf_sdk.manifest import TOKENIZER_NAME
from mdf_sdk.preprocessing import to_pixels
from mdf_sdk.prompt import PromptEncoder
from mdf_training.checkpoint import load_checkpoint
from mdf_training.config import CLIP_MEAN, CLIP_STD, load_preset
from mdf_training.model import PromptTensors

Picture = npt.NDArray[np.uint8]
Replacement = Callable[[nn.Linear], nn.Module]

STOCK_TILES = 4
_GROUP_SIZE = 128  # torchao's default
_STD = 0.02


class OnTorch:
    """What all have in common: threads, and the card."""

    def __init__(self, options: PeerOptions) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise NotAvailableError("found no card that PyTorch can use, expected one")
        self.device = torch.device(options.device)

    def forget_peak(self) -> None:
        """Count the card's memory from now on."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_device_bytes(self) -> int | None:
        """What PyTorch's allocator held at most, without CUDA's own."""
        return torch.cuda.max_memory_reserved() if self.device.type == "cuda" else None


class Fused(OnTorch):
    """The fused model of a checkpoint in float32, eager, on the processor."""

    model = "the checkpoint in PyTorch, float32, eager"

    def __init__(self, options: PeerOptions) -> None:
        super().__init__(dataclasses.replace(options, device="cpu"))
        if options.checkpoint is None:
            raise NotAvailableError("found no checkpoint, expected one: --reference CHECKPOINT")
        checkpoint = load_checkpoint(options.checkpoint)
        self._model, self._encoder = checkpoint.model, checkpoint.prompt_encoder()
        self.features: Any = None

    def prepare(self, picture: Picture) -> tuple[Tensor, Tensor]:
        """Return pixels of the vision tower and of the U-Net, each a batch of one."""
        tower, unet = (
            torch.from_numpy(pixels)[None]
            for pixels in to_pixels(picture, self._model.config.image)
        )
        return tower, unet

    @torch.inference_mode()
    def look(self, pixels: tuple[Tensor, Tensor]) -> None:
        """Compute what depends on the photograph alone, and keep it, as the engine does."""
        self.features = self._model.encode_image(*pixels)

    @torch.inference_mode()
    def answer(self, text: str) -> None:
        """Score the labels."""
        packed = self._encoder.pack([self._encoder.encode(text)])
        prompt = PromptTensors.from_packed(packed, self._encoder, "cpu")
        hidden, _ = self._model.decode_text(self.features.states, prompt)
        self._model.score_labels(hidden, prompt).numpy()


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What Mllama's processor makes of a photograph, on the host."""

    pixel_values: Tensor  # (1, 1, tiles, 3, S, S)
    aspect_ratio_ids: Tensor  # (1, 1)
    aspect_ratio_mask: Tensor  # (1, 1, tiles)


class Stock(OnTorch):
    """transformers' Mllama of the engine's shape in bfloat16, with random weights and no U-Net.

    One forward to the next token's logits: what scoring costs before the first label. The
    photograph goes through Mllama's own processor.
    """

    def __init__(
        self, options: PeerOptions, *, tiles: int, replace: Replacement | None = None
    ) -> None:
        super().__init__(options)
        manifest = load_manifest(options.engine)
        config = load_preset(manifest.model)
        vision = {k: v for k, v in config.vision.items() if k != "supported_aspect_ratios"}
        self.model = f"transformers Mllama, bfloat16, {tiles} tile{'s' * (tiles > 1)}"
        side = {"height": config.image.tower_px, "width": config.image.tower_px}
        self._processor = MllamaImageProcessor(
            size=side, max_image_tiles=tiles, image_mean=CLIP_MEAN, image_std=CLIP_STD
        )
        ratios = [[1, 1]] if tiles == 1 else _aspect_ratios(tiles)
        mllama = MllamaConfig(
            text_config=dict(config.text),
            vision_config={**vision, "max_num_tiles": tiles, "supported_aspect_ratios": ratios},
            image_token_index=config.text["vocab_size"],
        )
        with torch.device("meta"):
            self.mllama: Any = MllamaForConditionalGeneration(mllama).eval().bfloat16()
        model = self.mllama.model
        fill(model.vision_model, self.device)
        fill(model.multi_modal_projector, self.device)
        fill(model.language_model, self.device, replace)
        fill(self.mllama.lm_head, self.device)
        # Its frequencies are computed, not stored: on the meta device they are lost.
        rotary = model.language_model.rotary_emb
        model.language_model.rotary_emb = type(rotary)(rotary.config).to(self.device)
        tokenizer_json = (options.engine / TOKENIZER_NAME).read_text(encoding="utf-8")
        self.encoder = PromptEncoder(tokenizer_json, manifest.prompt, manifest.labels)
        self.vision: Any = self.mllama.model.vision_model
        self.language: Any = self.mllama.model.language_model
        self._states: Any = None
        self._mask: Any = None

    def prepare(self, picture: Picture) -> _Inputs:
        """Run Mllama's processor."""
        made: Any = self._processor(picture, return_tensors="pt")
        return _Inputs(made.pixel_values, made.aspect_ratio_ids, made.aspect_ratio_mask)

    def token_ids(self, text: str) -> Tensor:
        """Instruction, image token, text and question: int64 (1, T), on the host."""
        encoder = self.encoder
        body = (encoder.image_id, *encoder.encode(text).ids, *encoder.suffix_ids)
        return torch.tensor([[*encoder.prefix_ids, *body]])

    @torch.inference_mode()
    def look(self, inputs: _Inputs) -> None:
        """Vision tower and projector; keeps the states of all tiles."""
        mllama = self.mllama.model
        mask = inputs.aspect_ratio_mask.to(self.device)
        states = mllama.vision_model(
            pixel_values=inputs.pixel_values.to(self.device, torch.bfloat16),
            aspect_ratio_ids=inputs.aspect_ratio_ids.to(self.device),
            aspect_ratio_mask=mask,
        ).last_hidden_state  # (1, 1, tiles, V, vision_output_dim)
        projected = mllama.multi_modal_projector(states)
        self._states = projected.reshape(-1, projected.shape[-2], projected.shape[-1])
        self._mask = mask

    @torch.inference_mode()
    def answer(self, text: str) -> None:
        """One forward over the prompt."""
        ids = self.token_ids(text).to(self.device)
        rows = torch.arange(ids.shape[1], device=self.device)
        sees = (rows >= len(self.encoder.prefix_ids)).long()
        logits = self.mllama(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            cross_attention_mask=sees[None, :, None, None]
            * self._mask[:, None],  # (1, T, 1, tiles)
            cross_attention_states=self._states,
            use_cache=False,
            logits_to_keep=1,
        ).logits
        logits.float().cpu().numpy()


class FourTiles(Stock):
    """As users run it: the three tiles of padding are computed too."""

    def __init__(self, options: PeerOptions) -> None:
        super().__init__(options, tiles=STOCK_TILES)


class OneTile(Stock):
    """The same with one tile, as the fused model has it."""

    def __init__(self, options: PeerOptions) -> None:
        super().__init__(options, tiles=1)


class Compiled(Stock):
    """The same, vision tower and language model through torch.compile."""

    def __init__(self, options: PeerOptions) -> None:
        super().__init__(options, tiles=1)
        self.model += ", torch.compile"
        for part in (self.vision, self.language):
            part.forward = torch.compile(part.forward, dynamic=False)


class Nf4(Stock):
    """The same, the language model's linears in bitsandbytes' NF4."""

    def __init__(self, options: PeerOptions) -> None:
        bitsandbytes = _import("bitsandbytes")

        def replace(linear: nn.Linear) -> nn.Module:
            packed = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4"
            )
            return packed.to(options.device)

        super().__init__(options, tiles=1, replace=replace)
        self.model += (
            f", linears of the language model NF4 (bitsandbytes {bitsandbytes.__version__})"
        )


class Int4(Stock):
    """The same, the language model's linears in torchao's INT4, weights only."""

    def __init__(self, options: PeerOptions) -> None:
        torchao, quantization = _import("torchao"), _import("torchao.quantization")
        if options.device != "cuda":
            raise NotAvailableError("found no card, expected one: its kernel is CUDA's")
        # PyTorch's own kernel; the default packing wants a package of Meta's beside torchao.
        config = quantization.Int4WeightOnlyConfig(
            group_size=_GROUP_SIZE,
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )

        def replace(linear: nn.Linear) -> nn.Module:
            quantization.quantize_(linear, config)
            return linear

        super().__init__(options, tiles=1, replace=replace)
        self.model += f", linears of the language model INT4 (torchao {torchao.__version__})"


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise NotAvailableError(f"{package}: {error}; pip install {package}") from None


def fill(module: nn.Module, device: torch.device, replace: Replacement | None = None) -> None:
    """Give a module on the meta device random weights, one by one.

    Args:
        replace: what a linear becomes once it has its weight, so that never all are there whole.
    """
    for name, parameter in module.named_parameters(recurse=False):
        weight = torch.empty_like(parameter, device=device)
        if weight.ndim > 1:
            weight.normal_(std=_STD)
        else:
            weight.fill_(0.0 if name == "bias" else 1.0)  # norms, and gates: open
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    for name, child in module.named_children():
        fill(child, device, replace)
        if replace is not None and isinstance(child, nn.Linear):
            setattr(module, name, replace(child))


def _aspect_ratios(tiles: int) -> list[list[int]]:
    """Every arrangement of at most so many tiles, in the order of Mllama's processor."""
    sides = range(1, tiles + 1)
    return [[width, height] for width in sides for height in sides if width * height <= tiles]

"""A checkpoint held in memory and some cases in; label scores out, as often as weights change."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdf_export.engine import check_device
from mdf_export.quantize import BITS, round_to_nearest
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.errors import InputError
from mdf_sdk.manifest import Precision
from mdf_training.backbone import CrossAttentionFeed
from mdf_training.data.pixels import CasePixels, stack_pixels
from mdf_training.evaluation.evaluate import Scores
from mdf_training.model import PromptTensors

WEIGHTS_SHARE = 0.8  # of the memory; the rest is for activations


class _Prefix:
    """The instruction's keys and values, in the place of transformers' cache: never written to."""

    def __init__(self, layers: Any) -> None:
        self._layers = layers

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Join them in front: (B, heads, T, d) -> (B, heads, P + T, d)."""
        kept = self._layers[layer]
        pairs = ((kept.keys, keys), (kept.values, values))
        joined = [torch.cat([a.expand(len(b), -1, -1, -1), b], dim=2) for a, b in pairs]
        return joined[0], joined[1]


class DecoderRun:
    """Some cases through the unquantized model, remembered so that any layer can be run again.

    As in an engine, the decoder reads the fed tokens alone, and the instruction's keys and values
    are constants.

    Attributes:
        scores: (N, K), of the weights that the checkpoint had.
    """

    def __init__(
        self,
        checkpoint: StreamedCheckpoint,
        cases: Sequence[CasePixels],
        *,
        keep_streams: bool = False,
    ) -> None:
        """Args:
        checkpoint: its weights are loaded.
        cases: one batch.
        keep_streams: what `score_from` needs: memory for the stream behind every layer.
        """
        self._model: Any = checkpoint.model
        self._config, encoder = checkpoint.config, checkpoint.prompt_encoder()
        text = self._model.backbone.model.language_model
        tower, unet = (torch.from_numpy(p).to(checkpoint.device) for p in stack_pixels(cases))
        self._vision_states = self._model.encode_vision(tower)
        self._skips, _ = self._model.encode_unet(unet)
        self._states = self._model.fuse(self._vision_states, self._skips)

        packed = encoder.pack([encoder.encode(case.row.text) for case in cases])
        self._prompt = PromptTensors.from_packed(packed, encoder, checkpoint.device)
        fed = slice(packed.prefix_length, None)
        instruction = self._prompt.input_ids[:1, : packed.prefix_length]
        self._prefix = _Prefix(text(input_ids=instruction, use_cache=True).past_key_values.layers)
        embedded = text.embed_tokens(self._prompt.input_ids[:, fed])
        self._rotary = text.rotary_emb(embedded, position_ids=self._prompt.position_ids[:, fed])
        closed = torch.finfo(embedded.dtype).min
        self._mask = torch.where(self._prompt.attention_mask[:, None, fed], 0.0, closed)
        self._streams = [embedded]  # what each layer reads
        self.scores = self._decode(0, self._states, keep=keep_streams)

    def score_all(self) -> Scores:
        """Score with the weights that decoder and fusion have now."""
        return self._decode(0, self._model.fuse(self._vision_states, self._skips))

    def score_from(self, name: str) -> Scores:
        """Score where only the linear of that name has changed: runs what depends on it."""
        part, states = name.split("."), self._states
        if part[0] == "fusion":
            block = int(part[1])
            layer = self._config.fusion.layers[block]
            fused = self._model.fusion[block](self._vision_states, self._skips[block])
            states = {**states, layer: fused}
        else:
            layer = int(part[part.index("layers") + 1])
        return self._decode(layer, states)

    def _decode(self, first: int, states: Mapping[int, Tensor], *, keep: bool = False) -> Scores:
        """Run the layers from `first` on."""
        text, stream = self._model.backbone.model.language_model, self._streams[first]
        sees_image = torch.ones_like(stream[:1, :, :1])
        for index, layer in enumerate(text.layers[first:], first):
            crosses = index in text.cross_attention_layers
            stream = layer(
                stream,
                cross_attention_states=CrossAttentionFeed(states, sees_image),
                cross_attention_mask=None,
                attention_mask=self._mask,
                full_text_row_masked_out_mask=None,
                past_key_values=None if crosses else self._prefix,
                position_embeddings=self._rotary,
            )
            if keep:
                self._streams.append(stream)
        scores: Scores = self._model.score_labels(text.norm(stream), self._prompt).cpu().numpy()
        return scores


@contextmanager
def hold_checkpoint(checkpoint_dir: Path, device: str) -> Iterator[StreamedCheckpoint]:
    """Hold a whole checkpoint in memory.

    Raises:
        InputError: it does not fit.
    """
    check_device(device)
    checkpoint = StreamedCheckpoint.open(checkpoint_dir, device)
    needed, available = weight_memory(checkpoint)
    if needed > WEIGHTS_SHARE * available:
        raise InputError(
            f"{checkpoint_dir}: found {needed / 1e9:.1f} GB of float32 weights, expected at most "
            f"80 % of the {available / 1e9:.1f} GB of memory on {device}: sensitivity holds the "
            "whole model. Measure it on a larger machine, or on another device: --device"
        )
    with checkpoint.loaded(checkpoint.model):
        yield checkpoint


def weight_memory(checkpoint: StreamedCheckpoint) -> tuple[int, int]:
    """Return the bytes of all weights in float32, and those of the device's memory."""
    needed = 4 * sum(parameter.numel() for parameter in checkpoint.model.parameters())
    return needed, _memory_bytes(checkpoint.device.type)


def _memory_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if not hasattr(os, "sysconf"):  # Windows does not say
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def replaced(linear: nn.Module, weight: Tensor) -> Iterator[None]:
    """Give a linear another weight for the time of the block."""
    original = linear.weight
    linear.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        linear.weight = original


def rounded_weight(linear: nn.Module, precision: Precision, block_size: int) -> Tensor:
    """Return a linear's weight as an engine that rounds to nearest computes with it."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if precision in BITS:
        return round_to_nearest(weight, BITS[precision], block_size).dequantize()
    return weight.half().float()

"""The language model: embedded tokens, keys and values in, label scores and pooled states out."""

from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from mdf_export.blocks.layers import gated, rms_norm
from mdf_export.blocks.source import BlockSource
from mdf_export.graph import DTYPES, GraphBuilder
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.prompt import PromptEncoder
from mdf_training.model import MDFModel

_INT64_MAX = 2**63 - 1


def build_decoder(source: BlockSource, encoder: PromptEncoder, folder: Path | None) -> int:
    """Language model: embedded tokens -> label scores (B, K) and pooled states (B, F, D).

    The instruction's keys and values are constants joined in front of each self-attention's own.
    The output of layer i is the tensor /decoder/layers.i/output.
    """
    checkpoint = source.checkpoint
    config = checkpoint.config
    text: Any = checkpoint.model.backbone.model.language_model
    width, prefix = config.text["hidden_size"], len(encoder.prefix_ids)
    heads, kv_heads = config.text["num_attention_heads"], config.text["num_key_value_heads"]
    kv_width = width // heads * kv_heads
    rows = config.state_rows()
    constants = _prefix_keys_values(checkpoint, encoder)
    longest = prefix + 1 + config.prompt.max_text_tokens + len(encoder.suffix_ids)
    # ONNX Runtime wants as many rows as there are tokens, though labels share their positions.
    cos, sin = _rotary_cache(text, longest + sum(len(ids) for ids in encoder.label_ids))

    with source.builder("decoder", folder) as g:
        x = g.input("inputs_embeds", ("B", "T", width))
        position_ids = g.input("position_ids", ("B", "T"), "int64")
        mask = g.input("attention_mask", ("B", 1, "T", "S"), "bool")
        body_mask = g.input("body_mask", ("B", "T"))
        count = g.op("ReduceSum", body_mask, g.ints(1), keepdims=1)
        pool = g.op("Unsqueeze", g.op("Div", body_mask, count), g.ints(1))  # (B, 1, T)
        cos_cache, sin_cache = g.constant(cos, "cos"), g.constant(sin, "sin")
        pooled: dict[int, str] = {}
        for index, layer in enumerate(text.layers):
            last = index == len(text.layers) - 1
            with checkpoint.loaded(layer), g.scope(f"layers.{index}"):
                h = rms_norm(g, x, layer.input_layernorm)
                if index in constants:
                    with g.scope("self_attention"):
                        attention = layer.self_attn
                        q, k, v = g.linears(
                            h,
                            q_proj=attention.q_proj,
                            k_proj=attention.k_proj,
                            v_proj=attention.v_proj,
                        )
                        q, k = (
                            g.op(
                                "RotaryEmbedding",
                                t,
                                cos_cache,
                                sin_cache,
                                position_ids,
                                num_heads=n,
                            )
                            for t, n in ((q, heads), (k, kv_heads))
                        )
                        k, v = (
                            g.op(
                                "Concat",
                                g.tile_batch(g.constant(constant, "prefix"), x, (prefix, kv_width)),
                                fed,
                                axis=1,
                            )
                            for constant, fed in zip(constants[index], (k, v), strict=True)
                        )
                        h = g.attention(q, k, v, heads, kv_heads, mask)
                        h = g.linear(h, "o_proj", attention.o_proj)
                else:
                    with g.scope("cross_attention"):
                        attention = layer.cross_attn
                        norm = attention.q_norm
                        q = g.linear(h, "q_proj", attention.q_proj)
                        q = g.head_norm(q, norm.weight, norm.variance_epsilon)
                        k, v = (
                            g.input(f"cross_{kind}_{index}", ("B", rows[index], kv_width))
                            for kind in ("key", "value")
                        )
                        h = g.attention(q, k, v, heads, kv_heads)
                        h = g.linear(h, "o_proj", attention.o_proj)
                        if index in config.fusion.layers:
                            pooled[index] = g.op("MatMul", pool, h)  # (B, 1, D)
                        h = gated(g, h, layer.cross_attn_attn_gate)
                x = g.op("Add", x, h)
                if last:  # what follows works token by token, and only labels are scored
                    x = _score_rows(g, x, encoder)
                h = _text_mlp(g, x, layer)
                if index not in constants:
                    h = gated(g, h, layer.cross_attn_mlp_gate)
                x = g.name_output(g.op("Add", x, h), "output")
        with checkpoint.loaded(text.norm, checkpoint.model.backbone.lm_head):
            scores = _label_scores(g, x, checkpoint.model, encoder)
        g.output("scores", scores, ("B", len(encoder.labels)), "float32")
        joined = g.op("Concat", *(pooled[i] for i in config.fusion.layers), axis=1)
        joined = g.op("Cast", joined, to=DTYPES["float32"])  # as the U-Net reads it
        g.output("pooled", joined, ("B", len(pooled), width), "float32")
        return g.save()


def _text_mlp(g: GraphBuilder, x: str, layer: Any) -> str:
    with g.scope("mlp"):
        h = rms_norm(g, x, layer.post_attention_layernorm)
        gate, up = g.linears(h, gate_proj=layer.mlp.gate_proj, up_proj=layer.mlp.up_proj)
        h = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        return g.linear(h, "down_proj", layer.mlp.down_proj)


def _score_rows(g: GraphBuilder, x: str, encoder: PromptEncoder) -> str:
    """The last body token and the fed label tokens: the rows that predict label tokens."""
    rows = 1 + encoder.label_rows
    return g.op("Slice", x, g.ints(-rows), g.ints(_INT64_MAX), g.ints(1))


def _label_scores(g: GraphBuilder, x: str, model: MDFModel, encoder: PromptEncoder) -> str:
    """Log-probabilities (B, K) as PromptEncoder.score_pairs has them, from label rows."""
    pairs = encoder.score_pairs()
    vocabulary = list(encoder.label_vocabulary)
    x = rms_norm(g, x, model.backbone.model.language_model.norm)
    logits = g.op("MatMul", x, g.constant(model.backbone.lm_head.weight[vocabulary].T))
    log_probs = g.op("LogSoftmax", g.op("Cast", logits, to=onnx.TensorProto.FLOAT), axis=-1)
    flat = g.op("Reshape", log_probs, g.ints(0, -1))  # (B, rows * W)
    scores = []
    for label in pairs:
        picked = g.op(
            "Gather",
            flat,
            g.ints(*(row * len(vocabulary) + column for row, column in label)),
            axis=1,
        )
        scores.append(g.op("ReduceSum", picked, g.ints(1), keepdims=1))
    return g.op("Concat", *scores, axis=1)


@torch.no_grad()
def _prefix_keys_values(
    checkpoint: StreamedCheckpoint, encoder: PromptEncoder
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys (rotated) and values (1, P, kv_heads * d) of the instruction in every self-attention
    layer.

    The instruction sees no image, so its cross-attention layers add nothing; a text-only forward
    skips them.
    """
    text = checkpoint.model.backbone.model.language_model
    ids = torch.tensor([encoder.prefix_ids], device=checkpoint.device)
    with checkpoint.flowing():
        cache = text(input_ids=ids, use_cache=True).past_key_values
    return {
        index: tuple(
            t.transpose(1, 2).flatten(2)
            for t in (cache.layers[index].keys, cache.layers[index].values)
        )
        for index in range(len(text.layers))
        if index not in text.cross_attention_layers
    }


def _rotary_cache(text: Any, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, d / 2) as the model's own rotary embedding computes them."""
    positions_ = torch.arange(positions, device=text.rotary_emb.inv_freq.device)[None]
    cos, sin = text.rotary_emb(positions_.float(), positions_)
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]

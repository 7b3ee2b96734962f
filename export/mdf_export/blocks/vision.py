"""The vision tower and its projector: photographs' patches in, vision states out."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdf_export.blocks.layers import embed_patches, gated, layer_norm
from mdf_export.blocks.source import BlockSource
from mdf_export.graph import DTYPES, GraphBuilder
from mdf_export.streaming import StreamedCheckpoint


def build_vision(source: BlockSource, folder: Path | None) -> int:
    """Vision tower and projector: tower_pixels (B, 3, S, S) -> vision_states (B, V, D)."""
    model = source.checkpoint.model.backbone.model
    tower: Any = model.vision_model
    loaded = source.checkpoint.loaded
    side, width, patches = tower.image_size, tower.hidden_size, tower.num_patches
    padding = -patches % 8  # stock Mllama pads, and real patches attend to the padding
    with source.builder("vision", folder) as g:
        x = g.input("tower_pixels", ("B", 3, side, side), "float32")
        x = g.op("Cast", x, to=DTYPES[g.float_type])
        with loaded(tower.patch_embedding), g.scope("patch_embedding"):
            x = embed_patches(g, x, side, tower.patch_embedding)
        x = _add_positions(g, x, source.checkpoint)
        if padding:
            zeros = g.constant(torch.zeros(1, padding, width))
            x = g.op("Concat", x, g.tile_batch(zeros, x, (padding, width)), axis=1)
        kept = []
        for index, layer in enumerate(tower.transformer.layers):
            with loaded(layer), g.scope(f"layers.{index}"):
                x = _vision_layer(g, x, layer, patches, padding)
            if index in tower.intermediate_layers_indices:
                kept.append(g.op("Unsqueeze", x, g.ints(-1)))
        with loaded(tower.layernorm_post), g.scope("layernorm_post"):
            x = layer_norm(g, x, tower.layernorm_post)
        with loaded(tower.post_tile_positional_embedding):
            x = g.op("Add", x, g.constant(_tile_embedding(tower.post_tile_positional_embedding)))
        for index, layer in enumerate(tower.global_transformer.layers):
            with loaded(layer), g.scope(f"global_layers.{index}"):
                x = _vision_layer(g, x, layer, patches, padding)
        stacked = g.op("Reshape", g.op("Concat", *kept, axis=-1), g.ints(0, 0, -1))
        x = g.op("Concat", x, stacked, axis=-1)
        x = g.op("Slice", x, g.ints(0), g.ints(patches), g.ints(1))
        with loaded(model.multi_modal_projector):
            x = g.linear(x, "projector", model.multi_modal_projector)
        g.output("vision_states", x, ("B", patches, model.multi_modal_projector.out_features))
        return g.save()


def _tile_embedding(embedding: Any) -> Tensor:
    """Row 1 of a one-tile table is the 1 x 1 aspect ratio: (1, 1, width)."""
    return (embedding.embedding.weight[1] * embedding.gate.tanh())[None, None]


def _position_embedding(embedding: Any, patches: int) -> Tensor:
    gate = embedding.gate.tanh()
    return (
        (1 - gate) * embedding.embedding
        + gate * embedding.tile_embedding.weight[1].view(patches, -1)
    )[None]


def _add_positions(g: GraphBuilder, x: str, checkpoint: StreamedCheckpoint) -> str:
    """Tile embedding, class token, position embedding, first layer norm."""
    tower: Any = checkpoint.model.backbone.model.vision_model
    width = tower.hidden_size
    parts = (
        tower.pre_tile_positional_embedding,
        tower.gated_positional_embedding,
        tower.layernorm_pre,
    )
    with checkpoint.loaded(*parts):
        x = g.op("Add", x, g.constant(_tile_embedding(tower.pre_tile_positional_embedding)))
        class_token = g.constant(
            checkpoint.read(tower, "class_embedding").reshape(1, 1, width), "class_embedding"
        )
        x = g.op("Concat", g.tile_batch(class_token, x, (1, width)), x, axis=1)
        positions = _position_embedding(tower.gated_positional_embedding, tower.num_patches)
        x = g.op("Add", x, g.constant(positions, "positions"))
        return layer_norm(g, x, tower.layernorm_pre)


def _vision_layer(g: GraphBuilder, x: str, layer: Any, patches: int, padding: int) -> str:
    attention, mlp = layer.self_attn, layer.mlp
    h = layer_norm(g, x, layer.input_layernorm)
    q, k, v = g.linears(
        h, q_proj=attention.q_proj, k_proj=attention.k_proj, v_proj=attention.v_proj
    )
    h = _tower_attention(g, q, k, v, attention.num_heads, patches, padding)
    h = g.linear(h, "o_proj", attention.o_proj)
    x = g.op("Add", x, gated(g, h, layer.gate_attn) if layer.is_gated else h)
    h = layer_norm(g, x, layer.post_attention_layernorm)
    h = g.linear(g.op("Gelu", g.linear(h, "fc1", mlp.fc1)), "fc2", mlp.fc2)
    return g.op("Add", x, gated(g, h, layer.gate_ffn) if layer.is_gated else h)


def _tower_attention(
    g: GraphBuilder, q: str, k: str, v: str, heads: int, patches: int, padding: int
) -> str:
    """Attention in which every patch sees all, but padding patches do not see each other.

    Two attentions without a mask: a mask keeps a runtime from its fused kernel.
    """
    if not padding:
        return g.attention(q, k, v, heads, heads)

    def rows(x: str, start: int, end: int) -> str:
        return g.op("Slice", x, g.ints(start), g.ints(end), g.ints(1))

    real = g.attention(rows(q, 0, patches), k, v, heads, heads)
    with g.scope("padding"):
        padded = rows(q, patches, patches + padding)
        seen = (rows(k, 0, patches), rows(v, 0, patches))
        padded = g.attention(padded, *seen, heads, heads)
    return g.op("Concat", real, padded, axis=1)

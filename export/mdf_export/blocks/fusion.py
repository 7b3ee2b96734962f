"""U-Net skips and vision states in; keys and values of every cross-attention layer out."""

from pathlib import Path
from typing import Any

from mdf_export.blocks.layers import embed_patches, layer_norm
from mdf_export.blocks.source import BlockSource
from mdf_export.blocks.unet import SKIPS
from mdf_export.graph import DTYPES, GraphBuilder


def build_fusion(source: BlockSource, folder: Path | None) -> int:
    """Skips and vision states joined, then cross-attention keys and values (B, R, kv_width).

    R is V, or the patches of the skip where one asks.
    """
    model, loaded = source.checkpoint.model, source.checkpoint.loaded
    config, rows = model.config, model.config.state_rows()
    with source.builder("fusion", folder) as g:
        vision_states = g.input(
            "vision_states", ("B", config.vision_rows, config.text["hidden_size"])
        )
        states = dict.fromkeys(config.text["cross_attention_layers"], vision_states)
        channels = model.unet.encoder.out_channels[1:5]
        for i, (layer, block) in enumerate(zip(config.fusion.layers, model.fusion, strict=True)):
            side = config.image.unet_px >> (i + 1)
            # In the U-Net's type: on a card the tensors go from block to block as they are.
            skip = g.input(SKIPS[i], ("B", channels[i], side, side), "float32")
            if not block.alpha:
                continue
            skip = g.op("Cast", skip, to=DTYPES[g.float_type])
            with loaded(block), g.scope(f"fusion.{i}"):
                states[layer] = _fuse(g, vision_states, skip, side, block)
        for layer, value in states.items():
            attention = model.backbone.model.language_model.layers[layer].cross_attn
            with loaded(attention), g.scope(f"layers.{layer}/cross_attention"):
                norm = attention.k_norm
                # Apart: joined, they took longer on an H100.
                keys = g.linear(value, "k_proj", attention.k_proj)
                values = g.linear(value, "v_proj", attention.v_proj)
                keys = g.head_norm(keys, norm.weight, norm.variance_epsilon)
            shape = ("B", rows[layer], attention.k_proj.out_features)
            g.output(f"cross_key_{layer}", keys, shape)
            g.output(f"cross_value_{layer}", values, shape)
        return g.save()


def _fuse(g: GraphBuilder, states: str, skip: str, side: int, block: Any) -> str:
    with g.scope("patch_proj"):
        x = embed_patches(g, skip, side, block.patch_proj)
    x = g.op("Add", x, g.constant((block.position + block.patch_proj.bias)[None], "position"))
    patches, normed = layer_norm(g, x, block.patch_norm), layer_norm(g, states, block.state_norm)
    stream, asking, answering = states, normed, patches
    if block.query == "skip":
        stream, asking, answering = patches, patches, normed
    q, k, v = (
        g.linear(x, name, getattr(block, name))
        for x, name in ((asking, "q_proj"), (answering, "k_proj"), (answering, "v_proj"))
    )
    h = g.linear(g.attention(q, k, v, block.heads, block.heads), "o_proj", block.o_proj)
    return g.op("Add", stream, g.op("Mul", h, g.constant(block.alpha * block.gate.tanh())))

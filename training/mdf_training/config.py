"""A preset's name in, the one frozen config of a fused model out."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from mdf_sdk.errors import CheckpointError, InputError
from mdf_sdk.manifest import ImageSpec, PromptSpec

# CLIP's statistics, which Mllama's own processor uses, and ImageNet's, which U-Net encoders are
# trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

LABELS = ("Acquired", "Inherited")
MASK_KINDS = ("vessel", "lesion", "disc")
QUERIES = ("vision", "skip")
INSTRUCTION = "Is the retinal disease of this patient Acquired or Inherited?"
# Of the paper's two labels alone. An engine carries the instruction as constants: it costs no time.
DEFINITIONS = (
    "Acquired disease has a cause outside the genes: age, diabetes, raised eye pressure, drugs, "
    "infection or injury. It mostly begins late, and the family is healthy. Inherited disease "
    "comes from a variant of a gene: it mostly begins early, is alike in both eyes, and relatives "
    "may be affected. The two can look alike, so weigh photograph and history together.\n"
)


@dataclass(frozen=True)
class UNetConfig:
    """The segmentation-models-pytorch U-Net.

    Attributes:
        encoder: smp's encoder name; its first four feature maps are the skips, its fifth the
            bottleneck.
        encoder_args: passed on to smp, to make a timm encoder narrower.
        decoder_channels: five widths, deepest first.
    """

    encoder: str
    encoder_args: Mapping[str, Any]
    decoder_channels: tuple[int, ...]


@dataclass(frozen=True)
class FusionConfig:
    """What the paper (arXiv 2509.21358) leaves open of its fusion, with the defaults' reasons.

    Attributes:
        layers: the cross-attention layers that read fused states, one for each skip, shallow to
            deep.
        grid: every skip becomes grid x grid patches, so that all four weigh alike whatever their
            resolution.
        heads: of the scaled cross-attention; its width is the backbone's.
        alpha: fixed scale of what the blocks add. 1.0: the learned gate already scales it.
        depths: the skips that are fused, 0 the shallowest; without any, every cross-attention layer
            reads the vision states as they are.
        film: whether the language model modulates the U-Net's skips.
        query: whose tokens ask and go on: "vision", the vision states, with the skip's patches for
            keys and values; or "skip", the other way round.
    """

    layers: tuple[int, ...]
    grid: int
    heads: int
    alpha: float = 1.0
    depths: tuple[int, ...] = (0, 1, 2, 3)
    film: bool = True
    query: str = "vision"

    def __post_init__(self) -> None:
        """Raise InputError for a fusion that no model has."""
        skips = range(len(self.layers))
        for name, good, expected in (
            ("alpha", type(self.alpha) in (int, float) and isfinite(self.alpha), "a finite number"),
            (
                "depths",
                isinstance(self.depths, tuple)
                and all(type(depth) is int and depth in skips for depth in self.depths)
                and list(self.depths) == sorted(set(self.depths)),
                f"rising numbers from 0 to {len(skips) - 1}, or none",
            ),
            ("film", isinstance(self.film, bool), "true or false"),
            ("query", self.query in QUERIES, f"one of {', '.join(QUERIES)}"),
        ):
            if not good:
                found = getattr(self, name)
                raise InputError(f"fusion, {name}: found {found!r}, expected {expected}")


@dataclass(frozen=True)
class ModelConfig:
    """A fused model, whole: what `build_model` builds and config.json holds.

    Attributes:
        preset: its name.
        text, vision: keyword arguments of transformers' MllamaTextConfig and MllamaVisionConfig.
        cross_gate: where the gates of the cross-attention layers start. 0.0 leaves a pretrained
            language model as it was; a backbone trained from nothing starts open.
        temperature: of the label scores, fitted on held-out cases after training.
    """

    preset: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    unet: UNetConfig
    fusion: FusionConfig
    image: ImageSpec
    prompt: PromptSpec
    labels: tuple[str, ...] = LABELS
    mask_kinds: tuple[str, ...] = MASK_KINDS
    cross_gate: float = 0.0
    temperature: float = 1.0

    @property
    def vision_rows(self) -> int:
        """Rows of the vision states: the tower's patches and its class token."""
        side: int = self.vision["image_size"] // self.vision["patch_size"]
        return side**2 + 1

    def state_rows(self) -> dict[int, int]:
        """Return how many states each cross-attention layer reads: vision's, or a skip's."""
        rows = dict.fromkeys(self.text["cross_attention_layers"], self.vision_rows)
        fusion = self.fusion
        if fusion.query == "skip" and fusion.alpha:
            rows |= {fusion.layers[depth]: fusion.grid**2 for depth in fusion.depths}
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read config.json's content.

        Raises:
            CheckpointError: a field is missing, unknown or malformed.
        """
        try:
            if isinstance(values["labels"], str) or isinstance(values["mask_kinds"], str):
                raise TypeError("labels and mask_kinds are lists")
            nested = {
                "unet": UNetConfig(**to_tuples(values["unet"])),
                "fusion": FusionConfig(**to_tuples(values["fusion"])),
                "image": ImageSpec(**to_tuples(values["image"])),
                "prompt": PromptSpec(**values["prompt"]),
                "labels": tuple(values["labels"]),
                "mask_kinds": tuple(values["mask_kinds"]),
            }
            return cls(**{**values, **nested})
        except (AttributeError, InputError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"config.json: {error}; expected the fields of this release's ModelConfig. "
                "Train again, or install the release that wrote it."
            ) from None


def to_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config's part: JSON's lists are its tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def _image(tower_px: int, unet_px: int) -> ImageSpec:
    return ImageSpec(tower_px, unet_px, CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD)


# Mllama's own four-tile default computes three tiles of padding for a square photograph.
ONE_TILE = {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}

_LLAMA_11B = ModelConfig(
    preset="llama-3.2-11b",
    text={
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    vision={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "attention_heads": 16,
        "image_size": 560,
        "patch_size": 14,
        "vision_output_dim": 7680,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        **ONE_TILE,
    },
    unet=UNetConfig("resnet50", {}, (256, 128, 64, 32, 16)),
    fusion=FusionConfig(layers=(3, 18, 28, 38), grid=32, heads=32),
    image=_image(560, 512),
    prompt=PromptSpec(
        prefix="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{INSTRUCTION}\n{DEFINITIONS}The photograph and the clinical information follow.\n",
        suffix="\nAnswer with Acquired or Inherited.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        image_token="<|image|>",
        end_token="<|eot_id|>",
        max_text_tokens=512,
    ),
)

# SmolLM2-135M-Instruct's 30 layers, with a cross-attention layer after every fifth: 36.
_SMOL_135M = ModelConfig(
    preset="smol-135m",
    text={
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "cross_attention_layers": [3, 9, 15, 21, 27, 33],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    vision={
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_global_layers": 2,
        "attention_heads": 6,
        "image_size": 224,
        "patch_size": 14,
        "vision_output_dim": 384 * 3,
        "intermediate_layers_indices": [1, 3],
        **ONE_TILE,
    },
    unet=UNetConfig("tu-tf_efficientnet_lite0", {}, (128, 64, 48, 32, 16)),
    fusion=FusionConfig(layers=(3, 15, 21, 33), grid=12, heads=9),
    image=_image(224, 384),
    prompt=PromptSpec(
        prefix=f"<|im_start|>user\n{INSTRUCTION}\n"
        "The photograph and the clinical information follow.\n",
        suffix="\nAnswer with Acquired or Inherited.<|im_end|>\n<|im_start|>assistant\n",
        image_token="<|image|>",
        end_token="<|im_end|>",
        max_text_tokens=256,
    ),
)

# Trains on two CPU cores in minutes; every width is a multiple of 32, the INT4 block.
_NANO = ModelConfig(
    preset="nano",
    text={
        "vocab_size": 640,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "cross_attention_layers": [1, 3, 5, 7],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    },
    vision={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
        "vision_output_dim": 128,
        "intermediate_layers_indices": [0],
        **ONE_TILE,
    },
    unet=UNetConfig(
        "tu-resnet10t",
        {"stem_width": 8, "channels": [16, 32, 48, 64]},
        (48, 32, 24, 16, 8),
    ),
    fusion=FusionConfig(layers=(1, 3, 5, 7), grid=8, heads=4),
    image=_image(48, 128),
    prompt=PromptSpec(
        prefix=f"<|begin_of_text|>{INSTRUCTION}\n",
        suffix="\nAnswer:",
        image_token="<|image|>",
        end_token="<|eot_id|>",
        max_text_tokens=128,
    ),
    cross_gate=1.0,
)

PRESETS = {config.preset: config for config in (_LLAMA_11B, _SMOL_135M, _NANO)}


def load_preset(name: str) -> ModelConfig:
    """Return a preset's config.

    Raises:
        CheckpointError: no preset of that name.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise CheckpointError(
            f"preset: found {name!r}, expected one of {', '.join(PRESETS)}. Example: --preset nano"
        ) from None


def set_task(config: ModelConfig, labels: Sequence[str], mask_kinds: Sequence[str]) -> ModelConfig:
    """Return a config of another label set, which its instruction and question then name.

    Args:
        config: a preset's.
        labels: two or more, in the order of every score array.
        mask_kinds: one or more, in the order of the mask's channels.

    Raises:
        InputError: a name is empty or there twice, or there are too few.
    """
    for what, names, least in (("labels", labels, 2), ("mask_kinds", mask_kinds, 1)):
        good = all(name.strip() == name != "" and "<|" not in name for name in names)
        if isinstance(names, str) or not good or not least <= len(set(names)) == len(names):
            raise InputError(
                f"{what}: found {names!r}, expected {least} or more distinct names, none empty or "
                "with <| in it. Example: --labels 'healthy,glaucoma' --mask-kinds disc,vessel"
            )
    old, new = _one_of(config.labels), _one_of(labels)
    prefix = config.prompt.prefix
    if new != old:
        prefix = prefix.replace(DEFINITIONS, "").replace(old, new)
    prompt = dataclasses.replace(
        config.prompt,
        prefix=prefix,
        suffix=config.prompt.suffix.replace(old, new),
    )
    return dataclasses.replace(
        config, labels=tuple(labels), mask_kinds=tuple(mask_kinds), prompt=prompt
    )


def _one_of(labels: Sequence[str]) -> str:
    """Write labels as a choice: "A, B or C"."""
    return f"{', '.join(labels[:-1])} or {labels[-1]}"

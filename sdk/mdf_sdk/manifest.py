"""The engine directory's manifest: what the engine is, and a SHA-256 for every file in it.

The reader owns the format: export fills these dataclasses and calls `save_manifest` as its last act.
"""

from dataclasses import dataclass
from typing import Literal

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

Precision = Literal["fp32", "fp16", "int4"]
BLOCKS = ("vision", "unet_encoder", "fusion", "decoder", "unet_decoder")


@dataclass(frozen=True)
class ImageSpec:
    """How a squared photograph becomes the two pixel tensors.

    Attributes:
        tower_px: side of the vision tower's input.
        unet_px: side of the U-Net's input and of the masks.
        tower_mean, tower_std, unet_mean, unet_std: per RGB channel, on values in [0, 1].
    """

    tower_px: int
    unet_px: int
    tower_mean: tuple[float, float, float]
    tower_std: tuple[float, float, float]
    unet_mean: tuple[float, float, float]
    unet_std: tuple[float, float, float]


@dataclass(frozen=True)
class PromptSpec:
    """The fixed parts of the prompt, special tokens written out.

    Attributes:
        prefix: everything before the image token: the instruction.
        suffix: everything after the clinical text: the question and the turn markers.
        image_token: e.g. "<|image|>".
        end_token: closes a label, e.g. "<|eot_id|>".
        max_text_tokens: a longer clinical text is cut at its end, and the Prediction says so.
    """

    prefix: str
    suffix: str
    image_token: str
    end_token: str
    max_text_tokens: int


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of a block's input or output; a str in the shape is a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class BlockSpec:
    """One graph: its ONNX file, its weight precision, and its bindings."""

    file: str
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (64 lower-case hex digits) and size of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows of an engine.

    Attributes:
        model: the preset's name.
        precision: what `mdf export --precision` was given.
        notice: printed with every result; empty for an engine cleared for use.
        labels: the label set, in score order.
        mask_kinds: channels of the mask, e.g. ("vessel", "lesion", "disc").
        temperature: scores are divided by it before softmax (Guo et al., 2017).
        blocks: by name, one for each of BLOCKS.
        files: by POSIX path relative to the directory; every file but the manifest itself.
        created: UTC, ISO 8601.
        checkpoint: SHA-256 over the checkpoint's tensors' files and config, the model's identity.
        built_with: versions of the exporting packages.
    """

    model: str
    precision: Precision
    notice: str
    labels: tuple[str, ...]
    mask_kinds: tuple[str, ...]
    temperature: float
    image: ImageSpec
    prompt: PromptSpec
    blocks: dict[str, BlockSpec]
    files: dict[str, FileEntry]
    created: str
    checkpoint: str
    built_with: dict[str, str]

"""A checkpoint directory in, an engine directory out."""

import os
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from mdf_export.blocks import (
    build_decoder,
    build_fusion,
    build_unet_decoder,
    build_unet_encoder,
    build_vision,
)
from mdf_export.golden import save_golden
from mdf_export.graph import FloatType
from mdf_sdk.errors import CheckpointError, InputError
from mdf_sdk.manifest import (
    EMBEDDINGS_NAME,
    GOLDEN_NAME,
    TOKENIZER_NAME,
    BlockSpec,
    Manifest,
    Precision,
    digest,
    save_manifest,
)
from mdf_sdk.staging import staged_directory
from mdf_training.checkpoint import Checkpoint, checkpoint_digest, load_checkpoint

BUILT_WITH = (
    "mdf-mllm",
    "torch",
    "transformers",
    "segmentation-models-pytorch",
    "onnx",
    "onnxscript",
)


def build_engine(
    checkpoint_dir: str | os.PathLike[str],
    engine_dir: str | os.PathLike[str],
    precision: Precision,
) -> Manifest:
    """Export a checkpoint.

    Args:
        checkpoint_dir: as `mdf train` writes it.
        engine_dir: new or empty; it appears when everything is in it, or not at all.
        precision: "fp32"; "fp16"; or "int4", which quantizes the language model and the fusion
            (symmetric, round to nearest, blocks of 32 along K) and leaves the vision tower and the
            U-Net at float16.

    Raises:
        InputError: unknown precision, or `engine_dir` is taken.
        CheckpointError: `checkpoint_dir` holds no usable checkpoint.
    """
    if precision not in get_args(Precision):
        raise InputError(
            f"precision: found {precision!r}, expected one of {', '.join(get_args(Precision))}"
        )
    with staged_directory(Path(engine_dir)) as staging:
        checkpoint = load_checkpoint(checkpoint_dir)
        config = checkpoint.config
        notice = checkpoint.provenance.get("notice")
        if not isinstance(notice, str):
            raise CheckpointError(
                f"{checkpoint_dir}/provenance.json: found no notice, expected the text that is "
                'printed with every result, such as "Not for clinical use."'
            )
        blocks = build_blocks(checkpoint, staging, precision)
        np.save(staging / EMBEDDINGS_NAME, _embeddings(checkpoint, precision))
        (staging / TOKENIZER_NAME).write_text(checkpoint.tokenizer_json, encoding="utf-8")
        save_golden(checkpoint, staging / GOLDEN_NAME)
        manifest = Manifest(
            model=config.preset,
            precision=precision,
            notice=notice,
            labels=config.labels,
            mask_kinds=config.mask_kinds,
            temperature=config.temperature,
            image=config.image,
            prompt=config.prompt,
            blocks=blocks,
            files={path.name: digest(path) for path in sorted(staging.iterdir())},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            checkpoint=checkpoint_digest(Path(checkpoint_dir)),
            built_with={name: metadata.version(name) for name in BUILT_WITH},
        )
        save_manifest(manifest, staging)
    return manifest


def build_blocks(
    checkpoint: Checkpoint, folder: Path, precision: Precision
) -> dict[str, BlockSpec]:
    """Write the five graphs of a checkpoint into a folder."""
    model = checkpoint.model
    float_type: FloatType = "float32" if precision == "fp32" else "float16"
    dense: Precision = "fp32" if precision == "fp32" else "fp16"
    return {
        "vision": build_vision(model, folder, dense, float_type),
        "unet_encoder": build_unet_encoder(model, folder, dense, float_type),
        "fusion": build_fusion(model, folder, precision, float_type),
        "decoder": build_decoder(model, checkpoint.prompt_encoder(), folder, precision, float_type),
        "unet_decoder": build_unet_decoder(model, folder, dense, float_type),
    }


def _embeddings(checkpoint: Checkpoint, precision: Precision) -> npt.NDArray[np.floating]:
    weight = checkpoint.model.backbone.model.language_model.embed_tokens.weight.detach().numpy()
    return weight if precision == "fp32" else weight.astype(np.float16)

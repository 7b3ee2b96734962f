"""A checkpoint directory in, an engine directory out."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from mdf_export.blocks import build_block, read_spec
from mdf_export.blocks.source import BlockSource
from mdf_export.calibration import QuantizedStore, calibrate, calibration_digest
from mdf_export.golden import save_golden
from mdf_export.gptq_checkpoint import GptqCheckpoint
from mdf_export.planning import check_disk, plan_engine
from mdf_export.quantize import QuantizedWeight
from mdf_export.recipe import ExportRecipe
from mdf_export.resuming import RESULT, resumed_directory
from mdf_export.streaming import StreamedCheckpoint
from mdf_export.tensorrt import Package, compile_engine, import_compiler
from mdf_sdk.errors import CheckpointError, InputError, StorageError
from mdf_sdk.integrity import digest
from mdf_sdk.manifest import (
    BLOCKS,
    EMBEDDINGS_NAME,
    GOLDEN_NAME,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    BlockSpec,
    Manifest,
    Precision,
    QuantizationSpec,
    save_manifest,
)
from mdf_sdk.staging import check_free
from mdf_training.checkpoint import checkpoint_digest

Target = Literal["onnx", "tensorrt-rtx", "tensorrt"]
BUILT_WITH = (
    "mdf-mllm",
    "torch",
    "transformers",
    "segmentation-models-pytorch",
    "onnx",
    "onnxscript",
)


@torch.no_grad()
def build_engine(
    checkpoint_dir: str | os.PathLike[str],
    engine_dir: str | os.PathLike[str],
    recipe: ExportRecipe | Precision,
    *,
    gptq_checkpoint: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    targets: Sequence[Target] = ("onnx",),
) -> Manifest:
    """Export a checkpoint; an interrupted export goes on where it stopped when it is called again.

    Args:
        checkpoint_dir: as `mdf train` writes it.
        engine_dir: new or empty; it appears when everything is in it, or not at all.
        recipe: precisions and calibration; a precision alone takes the defaults of the rest.
        gptq_checkpoint: a Hugging Face directory with language weights that GPTQ has quantized
            already; what it leaves dense is quantized here.
        device: "cpu" or "cuda": where PyTorch computes.
        targets: the portable graphs, "onnx", are always in it; "tensorrt-rtx" and "tensorrt" add
            plans as `compile_engine` makes them by default.

    Raises:
        InputError: `engine_dir` is taken, or is being made by another process.
        CheckpointError: `checkpoint_dir` holds no usable checkpoint.
        DataError: the calibration set is unusable.
        StorageError: the disk is too small.
    """
    checkpoint_dir, engine_dir = Path(checkpoint_dir), Path(engine_dir)
    if isinstance(recipe, str):
        recipe = ExportRecipe(recipe)
    check_free(engine_dir)
    check_device(device)
    packages = _check_targets(targets, recipe)
    checkpoint = StreamedCheckpoint.open(checkpoint_dir, device)
    notice = checkpoint.provenance.get("notice")
    if not isinstance(notice, str):
        raise CheckpointError(
            f"{checkpoint_dir}/provenance.json: found no notice, expected the text that is printed "
            'with every result, such as "Not for clinical use."'
        )
    if gptq_checkpoint and recipe.precision == "w8a8":
        raise InputError(
            "precision: found w8a8 with a GPTQ checkpoint, whose weights have scales of their own, "
            "expected int4 or int8. Leave --gptq-checkpoint out, or choose --precision int4"
        )
    given = GptqCheckpoint(Path(gptq_checkpoint)) if gptq_checkpoint else None
    plan = plan_engine(checkpoint.config, checkpoint.tokenizer_json, recipe)
    check_disk(plan, recipe, engine_dir)
    model_digest, versions = checkpoint_digest(checkpoint_dir), _versions()
    identity = {
        "checkpoint": model_digest,
        "recipe": recipe.to_dict(),
        "gptq_checkpoint": given and given.identity(),
        "calibration": calibration_digest(recipe) if recipe.calibrates else None,
        "built_with": versions,
    }
    try:
        with resumed_directory(engine_dir, json.dumps(identity, sort_keys=True)) as work:
            source = _quantize(checkpoint, recipe, given or {}, work)
            result = work / RESULT
            blocks = _write_blocks(source, result)
            _write_rest(checkpoint, recipe, result)
            config = checkpoint.config
            manifest = Manifest(
                model=config.preset,
                precision=recipe.precision,
                notice=notice,
                labels=config.labels,
                mask_kinds=config.mask_kinds,
                temperature=config.temperature,
                image=config.image,
                prompt=config.prompt,
                quantization=_quantization(recipe),
                blocks=blocks,
                plans=(),
                files={path.name: digest(path) for path in _files(result)},
                checkpoint=model_digest,
                built_with=versions,
            )
            save_manifest(manifest, result)
            for package in packages:
                manifest = compile_engine(result, package=package)
    except OSError as error:
        raise _storage_error(engine_dir, error) from error
    return manifest


def _quantize(
    checkpoint: StreamedCheckpoint,
    recipe: ExportRecipe,
    given: Mapping[str, QuantizedWeight],
    work: Path,
) -> BlockSource:
    """Calibrate, unless that is done already: the work directory keeps each linear's result."""
    if not recipe.calibrates:
        return BlockSource(checkpoint, recipe, given=given)
    store = QuantizedStore(work / "quantized")
    done = work / "input_max.json"
    if not done.exists():
        input_max = calibrate(checkpoint, recipe, store, given)
        unfinished = done.with_suffix(".part")
        unfinished.write_text(json.dumps(input_max), encoding="utf-8")
        unfinished.replace(done)
    input_max = json.loads(done.read_text(encoding="utf-8"))
    return BlockSource(checkpoint, recipe, given, store, input_max)


def _write_blocks(source: BlockSource, folder: Path) -> dict[str, BlockSpec]:
    """Write the graphs that an earlier call has not finished: a block's .onnx file comes last."""
    specs, encoder = {}, source.checkpoint.prompt_encoder()
    for name in BLOCKS:
        path = folder / f"{name}.onnx"
        if not path.exists():
            build_block(name, source, folder)
        specs[name] = read_spec(path, source.recipe.block_precision(name), encoder)
    return specs


def _write_rest(checkpoint: StreamedCheckpoint, recipe: ExportRecipe, folder: Path) -> None:
    """Embeddings, tokenizer, golden tensors."""
    embedding = checkpoint.model.backbone.model.language_model.embed_tokens
    rows = checkpoint.read(embedding, "weight").to("cpu", getattr(torch, recipe.float_type))
    np.save(folder / EMBEDDINGS_NAME, rows.numpy())
    del rows  # 1 GB at 11B
    (folder / TOKENIZER_NAME).write_text(checkpoint.tokenizer_json, encoding="utf-8")
    save_golden(checkpoint, folder / GOLDEN_NAME)


def _files(folder: Path) -> list[Path]:
    """What the manifest lists: not itself, and no leftovers of an export that was interrupted."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return [p for p in files if p.name != MANIFEST_NAME and p.suffix != ".part"]


def _quantization(recipe: ExportRecipe) -> QuantizationSpec:
    if not recipe.quantizes:
        return QuantizationSpec("none", 0, "", {})
    calibration = f"{recipe.calibration_cases} of {recipe.calibration}"
    return QuantizationSpec(
        recipe.method,
        0 if recipe.precision == "w8a8" else recipe.block_size,
        calibration if recipe.method == "gptq" else "",
        dict(recipe.kept),
    )


def _check_targets(targets: Sequence[Target], recipe: ExportRecipe) -> list[Package]:
    """Return the compilers to call; what cannot be built is told before the work begins."""
    unknown = [target for target in targets if target not in get_args(Target)]
    if unknown:
        raise InputError(
            f"target: found {', '.join(unknown)}, expected some of {', '.join(get_args(Target))}"
        )
    packages: list[Package] = []
    for package in get_args(Package):
        if package.replace("_", "-") in targets:
            import_compiler(package)
            packages.append(package)
    if packages and recipe.float_type == "float32":
        raise InputError(
            f"precision: found {recipe.precision} with the target {', '.join(targets)}, expected "
            "fp16, int8 or int4: TensorRT has no kernel for float32 attention. Leave --target out, "
            "or choose --precision fp16"
        )
    return packages


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in BUILT_WITH}


def check_device(device: str) -> None:
    """Raise InputError for a device that PyTorch cannot compute on here."""
    if device not in ("cpu", "cuda"):
        raise InputError(f"device: found {device!r}, expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: found no CUDA device that PyTorch can use, expected one. Export on the CPU: "
            "--device cpu"
        )


def _storage_error(engine_dir: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{engine_dir}: the export stopped ({error.strerror or error}), expected to be able to "
        "write. Mend that and give the same command again: it goes on where it stopped."
    )

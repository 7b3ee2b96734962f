"""A preset and a data set in, a trained checkpoint directory out."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mdf_sdk.errors import CheckpointError, DataError, InputError
from mdf_sdk.prompt import PromptEncoder
from mdf_training.checkpoint import (
    Checkpoint,
    TensorFiles,
    load_weights,
    read_provenance,
    read_tokenizer,
    recover_checkpoint,
    save_checkpoint,
)
from mdf_training.config import FusionConfig, ModelConfig, load_preset, set_task
from mdf_training.data.cases import DataSet
from mdf_training.data.folder import drop_broken, open_data
from mdf_training.data.leaks import check_leaks
from mdf_training.data.loading import readers_for
from mdf_training.data.pixels import PixelSet
from mdf_training.data.splits import TRAIN, VALIDATION, describe_split, read_split, split_by_patient
from mdf_training.distributed import (
    Processes,
    build_hollow_model,
    fill,
    is_large,
    place_model,
    random_backbone,
)
from mdf_training.epochs import EpochRunner
from mdf_training.history_plot import plot_history
from mdf_training.llama_weights import describe_backbone, fit_tile, read_backbone
from mdf_training.losses import fit_temperature
from mdf_training.model import MDFModel, build_model
from mdf_training.optimizer import OPTIMIZER, build_optimizer, load_optimizer, optimizer_tensors
from mdf_training.recipes import RECIPES, Recipe
from mdf_training.schedule import PartPolicy, freeze
from mdf_training.tokenizer import load_tokenizer
from mdf_training.unet_weights import describe_weights, load_unet_weights

NOTICE = "Not for clinical use."
BUILT_WITH_LLAMA = "Built with Llama."  # Llama 3.2's license asks for these words
TRAINER = "trainer.json"
BEST_PARTS, PLOT = "best_parts", "history.png"
BUILT_WITH = ("mdf-mllm", "torch", "transformers", "segmentation-models-pytorch")


def train(
    preset: str,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    fusion: FusionConfig | None = None,
    resume: bool = False,
    labels: Sequence[str] | None = None,
    mask_kinds: Sequence[str] | None = None,
    unet_weights: str | os.PathLike[str] | None = None,
    backbone: str | os.PathLike[str] | None = None,
    tokenizer_json: str | None = None,
    notice: str = NOTICE,
    split: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
    allow_label_words: bool = False,
    readers: int | None = None,
) -> dict[str, Any]:
    """Train a fused model, saving the checkpoint after every epoch.

    Args:
        preset: "nano", "smol-135m" or "llama-3.2-11b".
        data: a folder with labels.csv, or "synthetic:COUNT:SEED".
        out: checkpoint directory; new, unless `resume`.
        recipe: the preset's own when left out.
        fusion: how U-Net and language model are joined; as the preset has it when left out.
        resume: go on after the last epoch saved in `out`; same settings.
        labels, mask_kinds: what the model tells apart and what it segments; the preset's own when
            left out.
        unet_weights: file of ImageNet weights that the U-Net encoder starts from (see
            `load_unet_weights`).
        backbone: Hugging Face directory of Llama-3.2-11B-Vision or -Instruct, whose weights,
            tokenizer and tile size the model starts from (see `read_backbone`).
        tokenizer_json: for a preset whose tokenizer no package carries.
        notice: goes with the checkpoint and every engine made of it; "Built with Llama." is added
            where a `backbone` is used.
        split: a file that `mdf split` wrote: trains on its part train and reports on its part
            validation, or on patients of train where it has none. No other case is read.
        skip_broken: leave out cases whose picture or masks cannot be read, and say which.
        allow_label_words: train although texts give the label away (see `check_leaks`).
        readers: processes that prepare pictures while the model trains; what the device wants when
            left out. They change nothing but the time.

    Returns:
        The provenance written beside the weights: data, recipe, versions, and each epoch's losses.

    Raises:
        DataError, CheckpointError: what was given cannot be used.
    """
    out = Path(out)
    if not resume:
        _check_new(out)
    config = load_preset(preset)
    if fusion:
        config = dataclasses.replace(config, fusion=fusion)
    config = set_task(
        config,
        config.labels if labels is None else labels,
        config.mask_kinds if mask_kinds is None else mask_kinds,
    )
    if backbone:
        config = fit_tile(config, backbone)
        notice = f"{notice} {BUILT_WITH_LLAMA}"
    recipe = recipe or RECIPES[config.preset]
    cases = open_data(data, config.labels, split=split, part=(TRAIN, VALIDATION) if split else None)
    cases, skipped = drop_broken(cases, skip=skip_broken)
    leaks = check_leaks(cases.rows, config.labels, allow=allow_label_words)
    train_on, held_out = split_cases(cases, config, recipe, split)
    rows = sha256(repr(list(cases.rows)).encode()).hexdigest()
    run = {
        "preset": config.preset,
        "labels": config.labels,
        "mask_kinds": config.mask_kinds,
        "fusion": asdict(config.fusion),
        "data": str(data),
        "rows": rows,
        "split": describe_split(split) if split else None,
        "unet_weights": describe_weights(unet_weights) if unet_weights else None,
        "backbone": describe_backbone(backbone) if backbone else None,
        "recipe": asdict(recipe),
    }
    processes = Processes.join()
    if resume and processes.is_main:
        recover_checkpoint(out)
    processes.wait()
    if resume:
        _check_same(out, run)

    torch.manual_seed(recipe.seed)
    history: list[dict[str, Any]] = []
    tokenizer = (
        read_tokenizer(out) if resume else tokenizer_json or load_tokenizer(config, backbone)
    )
    model = _make_model(
        config,
        recipe,
        processes,
        resume=out if resume else None,
        backbone=backbone,
        unet_weights=unet_weights,
    )
    parts = model.parts()
    optimizer = build_optimizer(model, recipe, pretrained_encoder=bool(unet_weights))
    policy = PartPolicy(parts, recipe, len(config.labels))
    if resume:
        history += read_provenance(out)["history"]
        load_optimizer(model, optimizer, out)
        policy.resume(history, TensorFiles(out, BEST_PARTS))
    encoder = PromptEncoder(tokenizer, config.prompt, config.labels)
    pixels = PixelSet(cases, config.image, config.mask_kinds)
    readers = readers_for(processes.device) if readers is None else readers
    runner = EpochRunner(model, encoder, pixels, recipe, optimizer, processes, readers)

    provenance = {
        **run,
        "skipped": skipped,
        "leaks": leaks.to_dict(),
        "notice": notice,
        "training_cases": len(train_on),
        "validation_cases": len(held_out),
        "history": history,
        "built_with": {name: metadata.version(name) for name in BUILT_WITH},
    }
    finished = False
    while not finished:
        runner.factors = policy.factors(history)
        label_loss, mask_loss = runner.run_epoch(len(history), train_on)
        measured, scores, truth = runner.measure(held_out)
        epoch = {"epoch": len(history) + 1, "label_loss": label_loss, "mask_loss": mask_loss}
        history.append(epoch | measured | {"learning_rates": runner.learning_rates()})
        policy.end_epoch(history)
        for parameter in [p for p in optimizer.state if not p.requires_grad]:  # just stopped
            del optimizer.state[parameter]
        if processes.is_main:
            tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in history[-1].items() if _is_number(v)))
        provenance["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        finished = len(history) == recipe.epochs or policy.finished(history)
        if not finished:
            extra = {TRAINER: json.dumps(run).encode()}
            tensors = {OPTIMIZER: optimizer_tensors(model, optimizer)}
            if recipe.policy == "stop_parts":
                tensors[BEST_PARTS] = policy.best()
        else:  # a finished run needs no optimizer, and has its last word on the temperature
            if processes.sum(torch.tensor(policy.finish(), dtype=torch.int64)):
                measured, scores, truth = runner.measure(held_out)
            provenance["final"] = measured
            model.config = dataclasses.replace(config, temperature=fit_temperature(scores, truth))
            picture = BytesIO()
            plot_history(history, picture)
            extra, tensors = {PLOT: picture.getvalue()}, {}
        save_checkpoint(out, Checkpoint(model, tokenizer, provenance), extra=extra, tensors=tensors)
    return provenance


@torch.no_grad()
def open_gates(model: MDFModel, value: float) -> None:
    """Set where the gates of cross-attention layers and fusion blocks start, in place."""
    for name, parameter in model.named_parameters():
        if (name.startswith("fusion.") and name.endswith(".gate")) or ".cross_attn_" in name:
            parameter.fill_(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _check_new(out: Path) -> None:
    """Refuse a directory that is taken, before a picture is read."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out}: found something there, expected a new directory. "
            "Go on with it by --resume, or choose another name."
        )


def _check_same(out: Path, run: Mapping[str, Any]) -> None:
    """Refuse to resume what is no unfinished run of these settings."""
    try:
        saved = json.loads((out / TRAINER).read_text(encoding="utf-8"))
        different = [key for key in run if json.loads(json.dumps(run[key])) != saved.get(key)]
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(
            f"{out}: found no unfinished run, expected {TRAINER}. Start one without --resume."
        ) from None
    if different:
        started = {key: saved.get(key) for key in different}
        raise CheckpointError(
            f"{out}: found a run with other settings ({', '.join(different)}), expected the same. "
            f"It was started with {json.dumps(started)}. Give that again with --resume, or "
            "choose another --out without it."
        )


def split_cases(
    cases: DataSet, config: ModelConfig, recipe: Recipe, split: str | os.PathLike[str] | None
) -> tuple[list[int], list[int]]:
    """Split by patient; refuse what would train or hold out a part of the task alone."""
    unknown = [kind for kind in cases.mask_kinds if kind not in config.mask_kinds]
    if unknown:
        raise DataError(
            f"data, column mask: found the kinds {', '.join(unknown)}, expected only "
            f"{', '.join(config.mask_kinds)}. Name the kinds by --mask-kinds, or leave the column "
            "empty."
        )
    part_of = read_split(split) if split else {}
    if VALIDATION in part_of.values():
        held_out = [i for i, row in enumerate(cases.rows) if part_of[row.file] == VALIDATION]
        parts = sorted(set(range(len(cases))).difference(held_out)), held_out
    else:
        parts = split_by_patient(cases, recipe.validation, recipe.seed)
    for name, indices in zip(("train on", "hold out"), parts, strict=True):
        found = {cases.rows[i].label for i in indices}
        missing = [label for label in config.labels if label not in found]
        if missing:
            raise DataError(
                f"data: found no patient of {', '.join(missing)} to {name}, expected two patients "
                "or more of each label. Add cases, or try --data synthetic:1000:1"
            )
    return parts


def _make_model(
    config: ModelConfig,
    recipe: Recipe,
    processes: Processes,
    *,
    resume: Path | None,
    backbone: str | os.PathLike[str] | None,
    unet_weights: str | os.PathLike[str] | None,
) -> MDFModel:
    """Build a run's model where it trains, with the weights that it starts or goes on from."""
    hollow = processes.shards(recipe.compute) and (resume is not None or is_large(config))
    if hollow:
        model = build_hollow_model(config)
    else:
        model = build_model(config, pretrained=not (backbone or resume))
    if unet_weights and not resume:
        load_unet_weights(model.unet.encoder, unet_weights)
    for part in recipe.frozen:
        freeze(model.parts()[part])
    place_model(model, processes, recipe.compute, recompute=recipe.recompute)
    if resume:
        load_weights(model, resume)
        return model
    if backbone:  # whose gates are trained
        fill(model.backbone, read_backbone(backbone, config))
        return model
    if hollow:
        fill(model, random_backbone(model, recipe.seed, processes.device))
    if recipe.gates is not None:
        open_gates(model, recipe.gates)
    return model

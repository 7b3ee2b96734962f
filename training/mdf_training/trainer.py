"""A preset and a data set in, a trained checkpoint directory out."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
from mdf_training.data.augmentation import Camera
from mdf_training.data.cases import DataSet
from mdf_training.data.folder import drop_broken, open_data
from mdf_training.data.leaks import check_leaks
from mdf_training.data.loading import prepare_ahead, readers_for
from mdf_training.data.pixels import PixelSet, batches, blank_pixels, stack_pixels
from mdf_training.data.splits import TRAIN, VALIDATION, describe_split, read_split, split_by_patient
from mdf_training.data.synthetic import NEUTRAL_TEXT
from mdf_training.distributed import (
    Processes,
    build_hollow_model,
    fill,
    is_large,
    place_model,
    random_backbone,
    reshard,
    set_counting,
)
from mdf_training.evaluation.evaluate import BATCH_SIZE
from mdf_training.history_plot import plot_history
from mdf_training.llama_weights import describe_backbone, fit_tile, read_backbone
from mdf_training.model import MDFModel, ModelOutput, PromptTensors, build_model
from mdf_training.recipes import RECIPES, Recipe
from mdf_training.schedule import PartPolicy, freeze, set_training, step_factor
from mdf_training.tokenizer import load_tokenizer
from mdf_training.unet_weights import describe_weights, load_unet_weights

NOTICE = "Not for clinical use."
BUILT_WITH_LLAMA = "Built with Llama."  # Llama 3.2's license asks for these words
OPTIMIZER, TRAINER = "optimizer", "trainer.json"
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
        _load_optimizer(model, optimizer, out)
        policy.resume(history, TensorFiles(out, BEST_PARTS))
    encoder = PromptEncoder(tokenizer, config.prompt, config.labels)
    pixels = PixelSet(cases, config.image, config.mask_kinds)
    readers = readers_for(processes.device) if readers is None else readers
    trainer = _Trainer(model, encoder, pixels, recipe, optimizer, processes, readers)

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
        trainer.factors = policy.factors(history)
        label_loss, mask_loss = trainer.run_epoch(len(history), train_on)
        measured, scores, truth = trainer.measure(held_out)
        epoch = {"epoch": len(history) + 1, "label_loss": label_loss, "mask_loss": mask_loss}
        history.append(epoch | measured | {"learning_rates": trainer.learning_rates()})
        policy.end_epoch(history)
        for parameter in [p for p in optimizer.state if not p.requires_grad]:  # just stopped
            del optimizer.state[parameter]
        if processes.is_main:
            tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in history[-1].items() if _is_number(v)))
        provenance["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        finished = len(history) == recipe.epochs or policy.finished(history)
        if not finished:
            extra = {TRAINER: json.dumps(run).encode()}
            tensors = {OPTIMIZER: _optimizer_tensors(model, optimizer)}
            if recipe.policy == "stop_parts":
                tensors[BEST_PARTS] = policy.best()
        else:  # a finished run needs no optimizer, and has its last word on the temperature
            if processes.sum(torch.tensor(policy.finish(), dtype=torch.int64)):
                measured, scores, truth = trainer.measure(held_out)
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


def build_optimizer(
    model: MDFModel, recipe: Recipe, *, pretrained_encoder: bool = False
) -> torch.optim.AdamW:
    """AdamW with learning rates by part, and no decay on vectors and gates.

    Raises:
        InputError: nothing is left to train.
    """
    backbone = model.backbone.model
    text = backbone.language_model
    cross = [text.layers[i] for i in text.cross_attention_layers]
    grafted_lr = recipe.backbone_lr if recipe.grafted_lr is None else recipe.grafted_lr
    encoder_lr = recipe.encoder_lr if pretrained_encoder else recipe.unet_lr
    rates: list[tuple[str, str, float, list[nn.Module]]] = [
        ("unet_encoder", "unet", encoder_lr, [model.unet.encoder]),
        ("unet_decoder", "unet", recipe.unet_lr, [model.unet]),
        ("fusion", "fusion", recipe.fusion_lr, model.parts()["fusion"]),
        ("vision", "vision", grafted_lr, model.parts()["vision"]),
        ("cross_attention", "language", grafted_lr, cross),
        ("language", "language", recipe.backbone_lr, model.parts()["language"]),
    ]
    groups, taken = [], set[Tensor]()
    for name, part, lr, modules in rates:
        parameters = [
            parameter
            for module in modules
            for parameter in module.parameters()
            if parameter not in taken and parameter.requires_grad
        ]
        taken.update(parameters)
        for decay, chosen in (
            (recipe.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            if chosen:
                group = {"name": name, "part": part, "lr": lr, "peak_lr": lr}
                groups.append({**group, "params": chosen, "weight_decay": decay})
    if not groups:
        raise InputError(
            f"recipe: found no parameter to train beside the frozen {', '.join(recipe.frozen)}, "
            "expected some. Freeze less, or train with a fusion"
        )
    return torch.optim.AdamW(groups, fused=next(model.parameters()).is_cuda or None)


def mask_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice + binary cross-entropy of every channel: float (B, M), of float (B, M, U, U) each."""
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(dim=(2, 3))
    probabilities = logits.sigmoid()
    overlap = (probabilities * masks).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(dim=(2, 3)) + masks.sum(dim=(2, 3)) + 1)
    return bce + dice


def segmentation_loss(logits: Tensor, masks: Tensor, has_mask: Tensor) -> Tensor:
    """Mean of `mask_losses` over the annotated channels alone.

    Args:
        logits, masks: float (B, M, U, U).
        has_mask: float (B, M); a channel that was not annotated counts for nothing.
    """
    return (mask_losses(logits, masks) * has_mask).sum() / has_mask.sum().clamp(min=1)


def dice_scores(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice of every channel cut at 0.5, 1.0 where neither has a pixel: float (B, M)."""
    predicted = (logits > 0).to(masks.dtype)
    both = (predicted * masks).sum(dim=(2, 3))
    either = predicted.sum(dim=(2, 3)) + masks.sum(dim=(2, 3))
    return torch.where(either > 0, 2 * both / either, 1.0)


def fit_temperature(scores: Tensor, truth: Tensor) -> float:
    """Find the temperature of least negative log-likelihood (Guo et al., 2017).

    Between 0.05 and 20; 1.0 where the held-out cases set no bound, as when none of them is wrong.

    Args:
        scores: float (N, K) of held-out cases.
        truth: int64 (N,).
    """
    # The loss is convex in 1 / T; steps of 2 % are finer than held-out cases can tell.
    grid = torch.logspace(np.log10(0.05), np.log10(20), 300, dtype=torch.float64)
    losses = [F.cross_entropy(scores.double() / t, truth) for t in grid]
    best = int(torch.stack(losses).argmin())
    return 1.0 if best in (0, len(grid) - 1) else float(grid[best])


@dataclass(frozen=True)
class _Step:
    """What chance decides of one step: which cases, how each is changed, whether they count."""

    indices: Sequence[int]
    cameras: Sequence[Camera | None]
    flip: npt.NDArray[np.bool_]
    no_text: npt.NDArray[np.bool_]
    no_image: npt.NDArray[np.bool_]
    counts: bool


class _Trainer:
    """One run's model, optimizer and schedule; all chance comes from (seed, epoch)."""

    def __init__(
        self,
        model: MDFModel,
        encoder: PromptEncoder,
        pixels: PixelSet,
        recipe: Recipe,
        optimizer: torch.optim.AdamW,
        processes: Processes,
        readers: int,
    ) -> None:
        self.model, self.encoder, self.pixels, self.recipe = model, encoder, pixels, recipe
        self.optimizer, self.processes, self.readers = optimizer, processes, readers
        self.device = next(model.parameters()).device
        self.blank = blank_pixels(pixels.spec)
        self.factors = dict.fromkeys(model.parts(), 1.0)

    def run_epoch(self, epoch: int, indices: Sequence[int]) -> tuple[float, float]:
        """Train one epoch; return the mean label and segmentation losses."""
        set_training(self.model, self.model.parts())
        rng = np.random.default_rng([self.recipe.seed, epoch])
        order = rng.permutation(indices).tolist()
        steps = [self._draw(batch, rng) for batch in batches(order, self.recipe.batch_size)]
        totals = np.zeros(2)
        bar = tqdm(
            range(len(steps)),
            desc=f"epoch {epoch + 1}/{self.recipe.epochs}",
            leave=False,
            disable=None if self.processes.is_main else True,
        )
        if self.readers:
            self.pixels.fill(indices)  # before they are copied; the same ones in every epoch
        prepared = prepare_ahead(self._prepare, steps, self.readers)
        for number, inputs in zip(bar, prepared, strict=True):
            self._set_learning_rates(epoch * len(steps) + number, self.recipe.epochs * len(steps))
            label_loss, mask_loss = self._losses(inputs)
            loss = label_loss + self.recipe.mask_weight * mask_loss
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(
                [p for p in self.model.parameters() if p.requires_grad], self.recipe.max_grad_norm
            )
            self.optimizer.step()
            # Those of the whole batch, alike in every process: they stop together or not at all.
            # Read last: until then a card works ahead.
            losses = self.processes.sum(torch.stack([label_loss, mask_loss, loss]).detach())
            *means, total = (losses / self.processes.size).tolist()
            if not np.isfinite(total):
                raise CheckpointError(
                    f"epoch {epoch + 1}, step {number + 1}: found the loss {total}, expected a "
                    "finite one. Lower the learning rates; the last epoch's checkpoint is kept."
                )
            totals += means
            bar.set_postfix(
                label=f"{totals[0] / (number + 1):.3f}", mask=f"{totals[1] / (number + 1):.3f}"
            )
        label_loss, mask_loss = totals / len(steps)
        return float(label_loss), float(mask_loss)

    @torch.no_grad()
    def measure(self, indices: Sequence[int]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Measure cases that are held out.

        Returns:
            What the history says of them (losses, accuracy, Dice by mask kind; None where no case
            was annotated), their label scores (N, K) and true labels (N,), on the CPU.
        """
        self.model.eval()
        scores = []
        sums = torch.zeros(3, len(self.pixels.mask_kinds), dtype=torch.float64)
        for batch in batches(indices, BATCH_SIZE):
            share = self.processes.share(len(batch))
            cases = self.pixels.read(batch[share.cases])
            masks, has_mask = (
                self._to_device(np.stack([getattr(c, name) for c in cases]))
                for name in ("masks", "has_mask")
            )
            has_mask *= share.counts
            tower, unet = map(self._to_device, stack_pixels(cases))
            output = self._run(tower, unet, [c.row.text for c in cases])
            own = torch.zeros(len(batch), output.scores.shape[1])
            own[share.cases] = output.scores.cpu() * share.counts
            scores.append(self.processes.sum(own))
            for total, values in zip(
                sums,
                (
                    mask_losses(output.mask_logits, masks) * has_mask,
                    dice_scores(output.mask_logits, masks) * has_mask,
                    has_mask,
                ),
                strict=True,
            ):
                total += values.sum(dim=0).cpu()
        reshard(self.model)
        losses, dice, counts = self.processes.sum(sums)
        joined = torch.cat(scores)
        truth = self._truth([self.pixels.data.rows[i].label for i in indices])
        kinds = zip(self.pixels.mask_kinds, dice.tolist(), counts.tolist(), strict=True)
        measured = {
            "validation_loss": float(F.cross_entropy(joined, truth)),
            "validation_accuracy": float((joined.argmax(1) == truth).float().mean()),
            "validation_mask_loss": float(losses.sum() / counts.sum()) if counts.any() else None,
            "validation_dice": {k: total / n if n else None for k, total, n in kinds},
        }
        return measured, joined, truth

    def learning_rates(self) -> dict[str, float]:
        """Return those of the last step, by the group's name."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def _run(self, tower: Tensor, unet: Tensor, texts: Sequence[str]) -> ModelOutput:
        packed = self.encoder.pack([self.encoder.encode(text) for text in texts])
        output: ModelOutput = self.model(
            tower, unet, PromptTensors.from_packed(packed, self.encoder, self.device)
        )
        return output

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device, torch.float32)

    def _draw(self, batch: Sequence[int], rng: np.random.Generator) -> "_Step":
        """Draw what chance decides of a step: for the whole batch, then this process's share."""
        strength = self.recipe.augment
        cameras = [Camera.draw(rng, strength) for _ in batch] if strength else [None] * len(batch)
        flip, no_text, no_image = (
            rng.random(len(batch)) < p for p in (0.5, self.recipe.drop_text, self.recipe.drop_image)
        )
        share = self.processes.share(len(batch))
        own = share.cases
        return _Step(batch[own], cameras[own], flip[own], no_text[own], no_image[own], share.counts)

    def _prepare(self, step: "_Step") -> dict[str, Any]:
        """Read a step's cases and change them as it says; arrays by name, texts and labels."""
        cases = self.pixels.read(step.indices, step.cameras)
        # A fundus mirrored left to right is that of the other eye.
        arrays = {
            name: np.stack(
                [
                    getattr(c, name)[..., ::-1] if f else getattr(c, name)
                    for c, f in zip(cases, step.flip, strict=True)
                ]
            )
            for name in ("tower_pixels", "unet_pixels", "masks")
        }
        arrays["tower_pixels"][step.no_image], arrays["unet_pixels"][step.no_image] = self.blank
        texts = [
            NEUTRAL_TEXT if dropped else c.row.text
            for c, dropped in zip(cases, step.no_text, strict=True)
        ]
        return {
            **arrays,
            "has_mask": np.stack([c.has_mask for c in cases]) * ~step.no_image[:, None],
            "texts": texts,
            "labels": [c.row.label for c in cases],
            "counts": step.counts,
        }

    def _losses(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the label and the segmentation loss of what `_prepare` gives."""
        counts = inputs["counts"]
        set_counting(self.model, counts)
        tower, unet, masks, annotated = (
            inputs[name].to(self.device, torch.float32)
            for name in ("tower_pixels", "unet_pixels", "masks", "has_mask")
        )
        output = self._run(tower, unet, inputs["texts"])
        truth = self._truth(inputs["labels"])
        label_loss = F.cross_entropy(output.scores, truth.to(self.device))
        mask_loss = segmentation_loss(output.mask_logits, masks, annotated)
        weigh = self.processes.weigh
        return weigh(label_loss, len(truth) * counts), weigh(mask_loss, annotated.sum() * counts)

    def _truth(self, labels: Sequence[str]) -> Tensor:
        return torch.tensor([self.encoder.labels.index(label) for label in labels])

    def _set_learning_rates(self, step: int, total_steps: int) -> None:
        """Set each group's by its part's schedule and the policy's factor."""
        for group in self.optimizer.param_groups:
            part = group["part"]
            factor = step_factor(step, total_steps, self.recipe.schedule(part))
            group["lr"] = group["peak_lr"] * factor * self.factors[part]


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
    except (OSError, ValueError):
        raise CheckpointError(
            f"{out}: found no unfinished run, expected {TRAINER}. Start one without --resume."
        ) from None
    different = [key for key in run if json.loads(json.dumps(run[key])) != saved.get(key)]
    if different:
        raise CheckpointError(
            f"{out}: found a run with other settings ({', '.join(different)}), expected the same. "
            f"It was started with {json.dumps(saved)}"
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


def _optimizer_tensors(model: MDFModel, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return AdamW's state by the parameter's name and its own, such as "fusion.0.gate.exp_avg"."""
    return {
        f"{name}.{kind}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(model: MDFModel, optimizer: torch.optim.AdamW, folder: Path) -> None:
    """Give AdamW the state that a checkpoint has; each process reads its own rows."""
    files = TensorFiles(folder, OPTIMIZER)
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    chosen = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(chosen):
        step, *moments = (f"{names[parameter]}.{k}" for k in ("step", "exp_avg", "exp_avg_sq"))
        if step not in files.shapes:  # no gradient has reached it yet
            continue
        state[index] = {"step": files[step]}
        for key in moments:
            moment = torch.zeros_like(parameter)
            files.read_into(moment, key)
            state[index][key.rpartition(".")[2]] = moment
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})

"""A preset and a data set in, a trained checkpoint directory out."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from mdf_sdk.errors import CheckpointError, DataError, InputError
from mdf_sdk.prompt import PromptEncoder
from mdf_training.cases import DataSet
from mdf_training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mdf_training.checkpoint_scorer import CheckpointScorer
from mdf_training.config import ModelConfig, load_preset, set_task
from mdf_training.data import open_data, split_by_patient
from mdf_training.evaluation import BATCH_SIZE
from mdf_training.model import MDFModel, PromptTensors, build_model
from mdf_training.pixels import CasePixels, PixelSet, batches, blank_pixels, stack_pixels
from mdf_training.recipes import RECIPES, Recipe
from mdf_training.synthetic import NEUTRAL_TEXT
from mdf_training.tokenizer import load_tokenizer
from mdf_training.unet_weights import describe_weights, load_unet_weights

NOTICE = "Not for clinical use."
OPTIMIZER, TRAINER = "optimizer.safetensors", "trainer.json"
BUILT_WITH = ("mdf-mllm", "torch", "transformers", "segmentation-models-pytorch")


def train(
    preset: str,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    resume: bool = False,
    labels: Sequence[str] | None = None,
    mask_kinds: Sequence[str] | None = None,
    unet_weights: str | os.PathLike[str] | None = None,
    tokenizer_json: str | None = None,
    notice: str = NOTICE,
) -> dict[str, Any]:
    """Train a fused model, saving the checkpoint after every epoch.

    Args:
        preset: "nano", "smol-135m" or "llama-3.2-11b".
        data: a folder with labels.csv, or "synthetic:COUNT:SEED".
        out: checkpoint directory; new, unless `resume`.
        recipe: the preset's own when left out.
        resume: go on after the last epoch saved in `out`; same settings.
        labels, mask_kinds: what the model tells apart and what it segments; the preset's own when
            left out.
        unet_weights: file of ImageNet weights that the U-Net encoder starts from (see
            `load_unet_weights`).
        tokenizer_json: for a preset whose tokenizer no package carries.
        notice: goes with the checkpoint and every engine made of it.

    Returns:
        The provenance written beside the weights: data, recipe, versions, and each epoch's losses.

    Raises:
        DataError, CheckpointError: what was given cannot be used.
    """
    config = load_preset(preset)
    config = set_task(
        config,
        config.labels if labels is None else labels,
        config.mask_kinds if mask_kinds is None else mask_kinds,
    )
    recipe = recipe or RECIPES[config.preset]
    cases = open_data(data, config.labels)
    train_on, held_out = _split(cases, config, recipe)
    rows = sha256(repr(list(cases.rows)).encode()).hexdigest()
    run = {
        "preset": preset,
        "labels": config.labels,
        "mask_kinds": config.mask_kinds,
        "data": str(data),
        "rows": rows,
        "unet_weights": describe_weights(unet_weights) if unet_weights else None,
        "recipe": asdict(recipe),
    }
    out = Path(out)
    _check_target(out, run, resume=resume)

    torch.manual_seed(recipe.seed)
    history: list[dict[str, float]] = []
    if resume:
        checkpoint = load_checkpoint(out)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer_json
        history += checkpoint.provenance["history"]
    else:
        tokenizer = tokenizer_json or load_tokenizer(config)
        model = build_model(config)
        if unet_weights:
            load_unet_weights(model.unet.encoder, unet_weights)
        if recipe.gates is not None:
            open_gates(model, recipe.gates)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = build_optimizer(model, recipe, pretrained_encoder=bool(unet_weights))
    if resume:
        _load_optimizer(optimizer, out / OPTIMIZER)
    encoder = PromptEncoder(tokenizer, config.prompt, config.labels)
    pixels = PixelSet(cases, config.image, config.mask_kinds)
    trainer = _Trainer(model, encoder, pixels, recipe, optimizer)

    provenance = {
        **run,
        "notice": notice,
        "training_cases": len(train_on),
        "validation_cases": len(held_out),
        "history": history,
        "built_with": {name: metadata.version(name) for name in BUILT_WITH},
    }
    for epoch in range(len(history), recipe.epochs):
        label_loss, mask_loss = trainer.run_epoch(epoch, train_on)
        scores, truth = trainer.score(held_out)
        history.append(
            {
                "epoch": epoch + 1,
                "label_loss": label_loss,
                "mask_loss": mask_loss,
                "validation_loss": float(F.cross_entropy(scores, truth)),
                "validation_accuracy": float((scores.argmax(1) == truth).float().mean()),
            }
        )
        tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in history[-1].items()))
        provenance["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        if epoch + 1 < recipe.epochs:
            extra = {OPTIMIZER: _optimizer_bytes(optimizer), TRAINER: json.dumps(run).encode()}
        else:  # a finished run needs no optimizer, and has its last word on the temperature
            model.config = dataclasses.replace(config, temperature=fit_temperature(scores, truth))
            extra = {}
        save_checkpoint(out, Checkpoint(model, tokenizer, provenance), extra=extra)
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
    """AdamW with a learning rate for each part, and no decay on vectors and gates."""
    backbone = model.backbone.model
    text = backbone.language_model
    cross = [text.layers[i] for i in text.cross_attention_layers]
    grafted = [backbone.vision_model, backbone.multi_modal_projector, *cross]
    parts: list[tuple[float, list[nn.Module]]] = [
        (recipe.encoder_lr if pretrained_encoder else recipe.unet_lr, [model.unet.encoder]),
        (recipe.unet_lr, [model.unet]),
        (recipe.fusion_lr, [model.fusion, model.film]),
        (recipe.backbone_lr if recipe.grafted_lr is None else recipe.grafted_lr, grafted),
        (recipe.backbone_lr, [model.backbone]),
    ]
    groups, taken = [], set[Tensor]()
    for lr, modules in parts:
        parameters = [p for module in modules for p in module.parameters() if p not in taken]
        taken.update(parameters)
        for decay, chosen in (
            (recipe.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            groups.append({"params": chosen, "lr": lr, "peak_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def segmentation_loss(logits: Tensor, masks: Tensor, has_mask: Tensor) -> Tensor:
    """Dice + binary cross-entropy, over the annotated channels alone.

    Args:
        logits, masks: float (B, M, U, U).
        has_mask: float (B, M); a channel that was not annotated counts for nothing.
    """
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(dim=(2, 3))
    probabilities = logits.sigmoid()
    overlap = (probabilities * masks).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(dim=(2, 3)) + masks.sum(dim=(2, 3)) + 1)
    return ((bce + dice) * has_mask).sum() / has_mask.sum().clamp(min=1)


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


class _Trainer:
    """One run's model, optimizer and schedule; all chance comes from (seed, epoch)."""

    def __init__(
        self,
        model: MDFModel,
        encoder: PromptEncoder,
        pixels: PixelSet,
        recipe: Recipe,
        optimizer: torch.optim.AdamW,
    ) -> None:
        self.model, self.encoder, self.pixels, self.recipe = model, encoder, pixels, recipe
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.blank = blank_pixels(pixels.spec)

    def run_epoch(self, epoch: int, indices: Sequence[int]) -> tuple[float, float]:
        """Train one epoch; return the mean label and segmentation losses."""
        self.model.train()
        rng = np.random.default_rng([self.recipe.seed, epoch])
        order = rng.permutation(indices).tolist()
        steps = list(batches(order, self.recipe.batch_size))
        totals = np.zeros(2)
        bar = tqdm(steps, desc=f"epoch {epoch + 1}/{self.recipe.epochs}", leave=False, disable=None)
        for number, batch in enumerate(bar):
            self._set_learning_rates(epoch * len(steps) + number, self.recipe.epochs * len(steps))
            label_loss, mask_loss = self._losses(self.pixels.read(batch), rng)
            loss = label_loss + self.recipe.mask_weight * mask_loss
            if not torch.isfinite(loss):
                raise CheckpointError(
                    f"epoch {epoch + 1}, step {number + 1}: found the loss {loss.item()}, expected "
                    "a finite one. Lower the learning rates; the last epoch's checkpoint is kept."
                )
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
            self.optimizer.step()
            totals += [label_loss.item(), mask_loss.item()]
            bar.set_postfix(
                label=f"{totals[0] / (number + 1):.3f}", mask=f"{totals[1] / (number + 1):.3f}"
            )
        label_loss, mask_loss = totals / len(steps)
        return float(label_loss), float(mask_loss)

    def score(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return label scores (N, K) and true labels (N,) of cases, on the CPU."""
        self.model.eval()
        scorer = CheckpointScorer(self.model, self.encoder)
        scores = []
        for batch in batches(indices, BATCH_SIZE):
            cases = self.pixels.read(batch)
            scores.append(scorer.score(*stack_pixels(cases), [c.row.text for c in cases]))
        labels = [self.pixels.data.rows[i].label for i in indices]
        return torch.from_numpy(np.concatenate(scores)), self._truth(labels)

    def _losses(
        self, cases: Sequence[CasePixels], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        flip, no_text, no_image = (
            rng.random(len(cases)) < p for p in (0.5, self.recipe.drop_text, self.recipe.drop_image)
        )
        # A fundus mirrored left to right is that of the other eye.
        arrays = {
            name: np.stack(
                [
                    getattr(c, name)[..., ::-1] if f else getattr(c, name)
                    for c, f in zip(cases, flip, strict=True)
                ]
            )
            for name in ("tower_pixels", "unet_pixels", "masks")
        }
        has_mask = np.stack([c.has_mask for c in cases]) * ~no_image[:, None]
        arrays["tower_pixels"][no_image], arrays["unet_pixels"][no_image] = self.blank
        texts = [
            NEUTRAL_TEXT if dropped else c.row.text
            for c, dropped in zip(cases, no_text, strict=True)
        ]
        packed = self.encoder.pack([self.encoder.encode(text) for text in texts])
        tower, unet, masks, annotated = (
            torch.from_numpy(a).to(self.device, torch.float32) for a in (*arrays.values(), has_mask)
        )
        output = self.model(
            tower, unet, PromptTensors.from_packed(packed, self.encoder, self.device)
        )
        truth = self._truth([c.row.label for c in cases])
        label_loss = F.cross_entropy(output.scores, truth.to(self.device))
        return label_loss, segmentation_loss(output.mask_logits, masks, annotated)

    def _truth(self, labels: Sequence[str]) -> Tensor:
        return torch.tensor([self.encoder.labels.index(label) for label in labels])

    def _set_learning_rates(self, step: int, total_steps: int) -> None:
        """Rise in a line over the warm-up, then fall as half a cosine."""
        progress, warmup = step / total_steps, self.recipe.warmup
        if progress < warmup:
            factor = min(1.0, (step + 1) / (warmup * total_steps))
        else:
            factor = 0.5 * (1 + np.cos(np.pi * (progress - warmup) / (1 - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def _check_target(out: Path, run: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse a directory that is taken, or one to resume that holds no unfinished run like this."""
    if not resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(
                f"{out}: found something there, expected a new directory. "
                "Go on with it by --resume, or choose another name."
            )
        return
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


def _split(cases: DataSet, config: ModelConfig, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Split by patient; refuse what would train or hold out a part of the task alone."""
    unknown = [kind for kind in cases.mask_kinds if kind not in config.mask_kinds]
    if unknown:
        raise DataError(
            f"data, column mask: found the kinds {', '.join(unknown)}, expected only "
            f"{', '.join(config.mask_kinds)}. Name the kinds by --mask-kinds, or leave the column "
            "empty."
        )
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


def _optimizer_bytes(optimizer: torch.optim.AdamW) -> bytes:
    state = optimizer.state_dict()["state"]
    return save({f"{i}.{name}": t.cpu() for i, entry in state.items() for name, t in entry.items()})


def _load_optimizer(optimizer: torch.optim.AdamW, path: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )

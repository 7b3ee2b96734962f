"""Cases in, an epoch's steps taken or its held-out cases measured: the loop of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mdf_sdk.errors import CheckpointError
from mdf_sdk.prompt import PromptEncoder
from mdf_training.data.augmentation import Camera
from mdf_training.data.loading import prepare_ahead
from mdf_training.data.pixels import PixelSet, batches, blank_pixels, stack_pixels
from mdf_training.data.synthetic import NEUTRAL_TEXT
from mdf_training.distributed import Processes, reshard, set_counting
from mdf_training.evaluation.evaluate import BATCH_SIZE
from mdf_training.losses import dice_scores, mask_losses, segmentation_loss
from mdf_training.model import MDFModel, ModelOutput, PromptTensors
from mdf_training.recipes import Recipe
from mdf_training.schedule import set_training, step_factor


@dataclass(frozen=True)
class _Step:
    """What chance decides of one step: which cases, how each is changed, whether they count."""

    indices: Sequence[int]
    cameras: Sequence[Camera | None]
    flip: npt.NDArray[np.bool_]
    no_text: npt.NDArray[np.bool_]
    no_image: npt.NDArray[np.bool_]
    counts: bool


class EpochRunner:
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

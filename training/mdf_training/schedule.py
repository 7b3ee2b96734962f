"""A run's history in, each part's learning rate out, and when a part stops.

The parts of a fused model learn at different speeds: the paper's U-Net was best at epoch 18, its
language model at 55. A part's own loss is, on the cases held out, the mask loss for the U-Net and
the label loss for every other part.

"joint": one schedule for all; the last epoch's weights stay.
"stop_parts": a part whose own loss has not improved for `patience` epochs goes back to its best
    weights and stays there; the others train on beside it, and count anew, as their losses were
    measured beside weights that are gone. When the run ends, every part has its best weights.
"in_step": the part that is ahead gets a smaller learning rate. With

        remaining(part) = least own loss so far / loss of a model that knows nothing
        factor(part) = remaining(part) / largest remaining of any part

    the rate of the next epoch is the schedule's times the factor. Loss over its first value is what
    GradNorm (Chen et al., 2018) evens out between tasks; here each part has a rate of its own, so
    the rate is what is scaled. The part that is most behind keeps its full rate. The least loss is
    taken, so a part that overfits does not seem behind.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mdf_training.checkpoint import TensorFiles
from mdf_training.distributed import local_rows
from mdf_training.recipes import Recipe, Schedule

Epoch = Mapping[str, Any]
# The losses of a model that knows nothing: Dice + binary cross-entropy of masks at 0.5.
BLIND_MASK_LOSS = 1 + math.log(2)


def step_factor(step: int, total_steps: int, schedule: Schedule) -> float:
    """Return the share of the peak learning rate at a step, counted from 0."""
    progress, warmup = step / total_steps, schedule.warmup
    if progress < warmup:
        return min(1.0, (step + 1) / (warmup * total_steps))
    if progress >= schedule.end:
        return 0.0
    return float(0.5 * (1 + np.cos(np.pi * (progress - warmup) / (schedule.end - warmup))))


def own_loss(part: str, epoch: Epoch) -> float:
    """Return a part's validation loss at an epoch; without masks all share the label loss."""
    mask_loss: float | None = epoch["validation_mask_loss"]
    label_loss: float = epoch["validation_loss"]
    return mask_loss if part == "unet" and mask_loss is not None else label_loss


def in_step_factors(
    history: Sequence[Epoch], parts: Sequence[str], labels: int
) -> dict[str, float]:
    """Return what policy "in_step" multiplies the next epoch's learning rates by.

    Args:
        parts: those that train.
        labels: size of the label set.
    """
    if not history:
        return dict.fromkeys(parts, 1.0)
    remaining = {}
    for part in parts:
        of_masks = part == "unet" and history[-1]["validation_mask_loss"] is not None
        blind = BLIND_MASK_LOSS if of_masks else math.log(labels)
        remaining[part] = min(own_loss(part, epoch) for epoch in history) / blind
    most = max(remaining.values())
    return {part: share / most if most > 0 else 1.0 for part, share in remaining.items()}


def epochs_since_best(history: Sequence[Epoch], part: str) -> int:
    """Count the epochs since a part's own loss was least, of those after the last stop of any."""
    stopped = [epoch["stopped"] for epoch in history]
    start = max((i for i in range(1, len(history)) if stopped[i] != stopped[i - 1]), default=-1)
    losses = [own_loss(part, epoch) for epoch in history[start + 1 :]]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class PartPolicy:
    """A recipe's policy at work on a model.

    All but the kept weights follows from the history, so a resumed run goes on as the unbroken one.
    """

    def __init__(
        self, parts: Mapping[str, Sequence[nn.Module]], recipe: Recipe, labels: int
    ) -> None:
        """Args:
        parts: the model's, by name.
        recipe: its policy, patience and frozen parts.
        labels: size of the label set.
        """
        self._parts, self._recipe, self._labels = parts, recipe, labels
        self._training = [part for part in parts if part not in recipe.frozen]
        self._best: dict[str, dict[str, Tensor]] = {}

    def factors(self, history: Sequence[Epoch]) -> dict[str, float]:
        """Return what the next epoch's learning rate of each part is multiplied by."""
        factors = dict.fromkeys(self._parts, 1.0)
        if self._recipe.policy == "in_step":
            factors |= in_step_factors(history, self._training, self._labels)
        return factors | dict.fromkeys(self._still(history), 0.0)

    def end_epoch(self, history: Sequence[dict[str, Any]]) -> None:
        """Keep, stop and put back parts by the epoch just measured, which gets "stopped"."""
        stopped = list(history[-2]["stopped"]) if len(history) > 1 else []
        history[-1]["stopped"] = stopped
        if self._recipe.policy != "stop_parts":
            return
        live = [part for part in self._training if part not in stopped]
        ages = {part: epochs_since_best(history, part) for part in live}
        for part, age in ages.items():
            if age == 0:
                self._best[part] = {
                    name: local_rows(tensor)[0].to("cpu", copy=True)
                    for name, tensor in self._tensors(part)
                }
            elif age >= self._recipe.patience:
                self._put_back(part)
                freeze(self._parts[part])
                stopped.append(part)

    def resume(self, history: Sequence[Epoch], best: TensorFiles) -> None:
        """Go on after the last epoch of a history, with what `best` gave then."""
        for part in history[-1]["stopped"]:
            freeze(self._parts[part])
        for part in self._training:
            for name, tensor in self._tensors(part):
                if (key := f"{part}.{name}") in best.shapes:
                    kept = torch.empty_like(tensor)
                    best.read_into(kept, key)
                    self._best.setdefault(part, {})[name] = local_rows(kept)[0].cpu()

    def best(self) -> dict[str, Tensor]:
        """Return the kept weights by name, spread over the processes as the model's are."""
        return {
            f"{part}.{name}": _spread(self._best[part][name], tensor)
            for part in self._best
            for name, tensor in self._tensors(part)
        }

    def finished(self, history: Sequence[Epoch]) -> bool:
        """Whether nothing trains any more."""
        return set(self._still(history)) >= set(self._parts)

    def finish(self) -> bool:
        """Give every part its best weights; return whether that changed the model."""
        changed = [self._put_back(part) for part in self._best]
        return any(changed)

    def _still(self, history: Sequence[Epoch]) -> list[str]:
        return [*self._recipe.frozen, *(history[-1]["stopped"] if history else ())]

    def _tensors(self, part: str) -> Iterator[tuple[str, Tensor]]:
        for number, module in enumerate(self._parts[part]):
            for name, tensor in module.state_dict().items():
                yield f"{number}.{name}", tensor

    @torch.no_grad()
    def _put_back(self, part: str) -> bool:
        changed = False
        for name, tensor in self._tensors(part):
            own = local_rows(tensor)[0]
            best = self._best[part][name].to(own.device)
            changed |= not torch.equal(own, best)
            own.copy_(best)
        return changed


def freeze(modules: Iterable[nn.Module]) -> None:
    """Take modules out of training: no gradient."""
    for module in modules:
        module.requires_grad_(False)


def set_training(model: nn.Module, parts: Mapping[str, Sequence[nn.Module]]) -> None:
    """Put a model in training mode; what is frozen keeps its BatchNorm statistics."""
    model.train()
    for module in chain.from_iterable(parts.values()):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()


def _spread(rows: Tensor, like: Tensor) -> Tensor:
    """Give this process's rows the form of the tensor that they are rows of."""
    if not isinstance(like, DTensor):
        return rows
    return DTensor.from_local(
        rows.to(like.device),
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
    )

"""Scores, masks and the truth in; what training lowers, and the temperature, out."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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

"""mdf_training.losses: by hand, and where nothing is to be learned."""

import numpy as np
import pytest
import torch

from mdf_training.losses import dice_scores, fit_temperature, segmentation_loss


def test_dice_is_one_for_the_same_mask_and_for_none_at_all() -> None:
    masks = torch.zeros(1, 3, 4, 4)
    masks[0, 1, :2] = masks[0, 2, :2] = 1
    logits = torch.full_like(masks, -1.0)
    logits[0, 1, :2] = logits[0, 2, 1:3] = 1
    assert dice_scores(logits, masks).tolist() == [[1.0, 1.0, 0.5]]


def test_an_unannotated_mask_costs_nothing_and_an_annotated_one_does() -> None:
    logits = torch.full((1, 2, 4, 4), 3.0, requires_grad=True)
    masks = torch.zeros(1, 2, 4, 4)
    nothing = segmentation_loss(logits, masks, torch.tensor([[0.0, 0.0]]))
    assert nothing == 0
    one = segmentation_loss(logits, masks, torch.tensor([[1.0, 0.0]]))
    one.backward()
    assert one > 1
    assert logits.grad is not None
    assert logits.grad[:, 0].abs().min() > 0
    assert not logits.grad[:, 1].any()


def test_without_a_wrong_case_the_temperature_stays_at_one() -> None:
    scores = torch.tensor([[5.0, -5.0], [-5.0, 5.0]])
    assert fit_temperature(scores, torch.tensor([0, 1])) == 1.0


def test_the_fitted_temperature_undoes_a_known_one() -> None:
    rng = np.random.default_rng(0)
    true_logits = rng.normal(size=(20_000, 3))
    probabilities = np.exp(true_logits) / np.exp(true_logits).sum(axis=1, keepdims=True)
    truth = torch.tensor([rng.choice(3, p=p) for p in probabilities])
    overconfident = torch.from_numpy(2.5 * true_logits).float()
    assert fit_temperature(overconfident, truth) == pytest.approx(2.5, rel=0.05)

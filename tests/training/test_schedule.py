"""mdf_training.schedule: rates over the steps, and what a part's own loss does to it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mdf_training.checkpoint import TensorFiles
from mdf_training.recipes import Recipe, Schedule
from mdf_training.schedule import (
    BLIND_MASK_LOSS,
    PartPolicy,
    epochs_since_best,
    freeze,
    in_step_factors,
    set_training,
    step_factor,
)

STOP = Recipe(policy="stop_parts", patience=2)


def epoch(label: float, mask: float | None, stopped: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"validation_loss": label, "validation_mask_loss": mask, "stopped": list(stopped)}


def parts() -> dict[str, list[nn.Module]]:
    """A U-Net and a language model of one weight each."""
    return {"unet": [nn.BatchNorm1d(1)], "language": [nn.Linear(1, 1)]}


def set_weights(model: dict[str, list[nn.Module]], value: float) -> None:
    with torch.no_grad():
        for modules in model.values():
            for tensor in modules[0].state_dict().values():
                tensor.fill_(value)


def weights(model: dict[str, list[nn.Module]]) -> dict[str, float]:
    return {part: modules[0].weight.item() for part, modules in model.items()}


def follow(
    policy: PartPolicy, model: dict[str, list[nn.Module]], losses: list[tuple[float, float]]
) -> list[dict[str, Any]]:
    """Run epochs of given losses; a part that trains has the epoch's number for weights."""
    history: list[dict[str, Any]] = []
    for number, (label, mask) in enumerate(losses, start=1):
        live = {p: m for p, m in model.items() if next(m[0].parameters()).requires_grad}
        set_weights(live, number)
        history.append(epoch(label, mask))
        policy.end_epoch(history)
    return history


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [step_factor(step, 100, Schedule(0.1)) for step in (0, 9, 10, 55, 99)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0], abs=1e-3)


def test_a_schedule_that_ends_early_stays_at_zero() -> None:
    schedule = Schedule(warmup=0.1, end=0.3)
    rates = [step_factor(step, 100, schedule) for step in (20, 30, 99)]
    assert rates == pytest.approx([0.5, 0.0, 0.0])


def test_the_part_that_is_ahead_gets_the_smaller_rate() -> None:
    history = [epoch(math.log(2), BLIND_MASK_LOSS), epoch(0.9 * math.log(2), BLIND_MASK_LOSS / 2)]
    factors = in_step_factors(history, ("unet", "fusion", "language"), labels=2)
    assert factors == pytest.approx({"unet": 0.5 / 0.9, "fusion": 1.0, "language": 1.0})


def test_a_part_that_overfits_does_not_seem_behind() -> None:
    history = [epoch(0.5, 1.0), epoch(0.3, 1.0), epoch(3.0, 1.0)]
    parts_ = ("unet", "language")
    assert in_step_factors(history, parts_, 2) == in_step_factors(history[:2], parts_, 2)


def test_without_masks_all_parts_keep_step_by_the_label_loss() -> None:
    factors = in_step_factors([epoch(0.4, None)], ("unet", "language"), labels=4)
    assert factors == {"unet": 1.0, "language": 1.0}


def test_before_the_first_epoch_every_part_has_its_full_rate() -> None:
    policy = PartPolicy(parts(), Recipe(policy="in_step"), labels=2)
    assert policy.factors([]) == {"unet": 1.0, "language": 1.0}


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.none() | st.floats(0, 10)).map(lambda x: epoch(*x)),
        min_size=1,
    )
)
def test_in_step_never_raises_a_rate_and_leaves_the_slowest_its_own(
    history: list[dict[str, Any]],
) -> None:
    factors = in_step_factors(history, ("unet", "language"), labels=3).values()
    assert max(factors) == 1.0
    assert min(factors) >= 0


def test_frozen_parts_neither_train_nor_hold_others_back() -> None:
    policy = PartPolicy(parts(), Recipe(policy="in_step", frozen=("language",)), labels=2)
    history = [epoch(10.0, 0.1)]
    assert policy.factors(history) == {"unet": 1.0, "language": 0.0}


def test_a_part_stops_at_its_best_weights_and_the_others_train_on() -> None:
    model = parts()
    policy = PartPolicy(model, STOP, labels=2)
    history = follow(policy, model, [(1.0, 1.0), (0.9, 0.5), (0.8, 0.6), (0.7, 0.7), (0.6, 9.0)])
    assert [e["stopped"] for e in history] == [[], [], [], ["unet"], ["unet"]]
    assert weights(model) == {"unet": 2.0, "language": 5.0}
    assert float(model["unet"][0].running_mean) == 2.0
    assert policy.factors(history) == {"unet": 0.0, "language": 1.0}
    assert not policy.finished(history)


def test_the_others_count_anew_when_a_part_has_stopped() -> None:
    history = [epoch(0.1, 0.1), epoch(0.5, 0.5), epoch(0.6, 0.6, ("unet",))]
    assert epochs_since_best(history, "language") == 0
    history.append(epoch(0.7, 0.7, ("unet",)))
    assert epochs_since_best(history, "language") == 0
    history.append(epoch(0.8, 0.8, ("unet",)))
    assert epochs_since_best(history, "language") == 1


def test_a_run_whose_parts_have_all_stopped_is_finished() -> None:
    model = parts()
    policy = PartPolicy(model, STOP, labels=2)
    history = follow(policy, model, [(1.0, 1.0), (2.0, 2.0), (2.0, 2.0)])
    assert history[-1]["stopped"] == ["unet", "language"]
    assert policy.finished(history)
    assert weights(model) == {"unet": 1.0, "language": 1.0}


def test_the_end_of_a_run_gives_every_part_its_best_weights() -> None:
    model = parts()
    policy = PartPolicy(model, STOP, labels=2)
    follow(policy, model, [(0.5, 1.0), (0.6, 0.9)])
    assert policy.finish()
    assert weights(model) == {"unet": 2.0, "language": 1.0}
    assert not policy.finish()


def test_a_joint_run_ends_with_its_last_weights() -> None:
    model = parts()
    policy = PartPolicy(model, Recipe(), labels=2)
    history = follow(policy, model, [(0.5, 1.0), (9.0, 9.0)])
    assert not policy.finish()
    assert weights(model) == {"unet": 2.0, "language": 2.0}
    assert policy.factors(history) == {"unet": 1.0, "language": 1.0}


def test_a_resumed_policy_has_the_weights_that_were_kept(tmp_path: Path) -> None:
    model = parts()
    policy = PartPolicy(model, STOP, labels=2)
    losses = [(0.5, 1.0), (0.6, 2.0), (0.4, 2.0)]
    history = follow(policy, model, losses)
    save_file(policy.best(), tmp_path / "best_parts.safetensors")

    again = parts()
    set_weights(again, 7.0)
    resumed = PartPolicy(again, STOP, labels=2)
    resumed.resume(history, TensorFiles(tmp_path, "best_parts"))
    assert not any(p.requires_grad for p in again["unet"][0].parameters())
    assert resumed.finish()
    assert weights(again) == {"unet": 1.0, "language": 3.0}


def test_what_is_frozen_keeps_its_batch_norm_statistics() -> None:
    model = nn.ModuleDict({"unet": nn.BatchNorm1d(2), "language": nn.Dropout(0.5)})
    freeze([model["unet"]])
    set_training(model, {"unet": [model["unet"]]})
    assert (model.training, model["unet"].training) == (True, False)

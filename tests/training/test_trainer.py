"""mdf_training.trainer: a run repeats itself to the last digit, and goes on where it stopped."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mdf_sdk.errors import CheckpointError, DataError, InputError
from mdf_training.checkpoint import load_checkpoint
from mdf_training.config import load_preset
from mdf_training.data.folder import save_data
from mdf_training.data.synthetic import SyntheticData
from mdf_training.epochs import EpochRunner
from mdf_training.model import build_model
from mdf_training.recipes import Recipe
from mdf_training.trainer import open_gates, train

DATA = "synthetic:40:1"
RECIPE = Recipe(epochs=3, batch_size=16, seed=5)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, train("nano", DATA, out, recipe=RECIPE)


def same_tensors(first: Path, second: Path) -> bool:
    a, b = (load_checkpoint(folder).model.state_dict() for folder in (first, second))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_run_to_the_last_digit(
    unbroken: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, provenance = unbroken
    again = train("nano", DATA, tmp_path / "again", recipe=RECIPE, readers=2)
    assert again["history"] == provenance["history"]
    assert same_tensors(out, tmp_path / "again")


def run_until(stop: int, out: Path, recipe: Recipe, patch: pytest.MonkeyPatch) -> None:
    """Train, or go on, and be interrupted after as many epochs."""
    run_epoch = EpochRunner.run_epoch

    def interrupt(self: Any, epoch: int, indices: Any) -> tuple[float, float]:
        if epoch == stop:
            raise KeyboardInterrupt
        return run_epoch(self, epoch, indices)

    with patch.context() as patched:
        patched.setattr(EpochRunner, "run_epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("nano", "synthetic:16:1", out, recipe=recipe, resume=out.exists())


# With rates this high the U-Net's own loss stops to fall at once.
POLICIES = {
    "stop_parts": Recipe(
        epochs=4, batch_size=8, validation=0.5, policy="stop_parts", patience=1, unet_lr=0.3, seed=5
    ),
    "in_step": Recipe(epochs=3, batch_size=8, policy="in_step", augment=0.5, seed=5),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policys_resumed_run_equals_the_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    recipe = POLICIES[policy]
    unbroken = train("nano", "synthetic:16:1", tmp_path / "unbroken", recipe=recipe)
    history = unbroken["history"]
    if policy == "stop_parts":  # once before anything stopped, once behind it
        first = next(i for i, epoch in enumerate(history) if epoch["stopped"])
        assert len(history) > first + 1
        interruptions = [first, first + 1]
    else:
        interruptions = [2]
        rates = [epoch["learning_rates"] for epoch in history]
        ratios = [rate["unet_decoder"] / rate["language"] for rate in rates]
        assert ratios[0] == pytest.approx(2)  # as the recipe has them
        assert ratios[1] != pytest.approx(2)
    out = tmp_path / "interrupted"
    for stop in interruptions:
        run_until(stop, out, recipe, monkeypatch)
    resumed = train("nano", "synthetic:16:1", out, recipe=recipe, resume=True)
    assert resumed["history"] == history
    assert resumed["final"] == unbroken["final"]
    assert same_tensors(tmp_path / "unbroken", out)


def test_a_frozen_part_stays_as_it_is_and_the_rest_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(epochs=1, batch_size=16, frozen=("unet", "language"))
    before: dict[str, torch.Tensor] = {}
    run_epoch = EpochRunner.run_epoch

    def look(self: Any, epoch: int, indices: Any) -> tuple[float, float]:
        before.update({name: t.clone() for name, t in self.model.state_dict().items()})
        losses = run_epoch(self, epoch, indices)
        trained = {id(p) for p in self.optimizer.state}
        assert trained == {id(p) for p in self.model.parameters() if p.requires_grad}
        return losses

    monkeypatch.setattr(EpochRunner, "run_epoch", look)
    train("nano", "synthetic:16:1", tmp_path / "out", recipe=recipe)
    after = load_checkpoint(tmp_path / "out").model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = ("unet.", "backbone.model.language_model.", "backbone.lm_head.")
    assert not [name for name in changed if name.startswith(frozen)]
    for prefix in ("fusion.", "film.", "backbone.model.vision_model."):
        assert any(name.startswith(prefix) for name in changed), prefix


def test_training_without_fusion_leaves_its_weights_alone(tmp_path: Path) -> None:
    fusion = dataclasses.replace(load_preset("nano").fusion, depths=(1,), film=False)
    recipe = Recipe(epochs=1, batch_size=16, gates=0.5)
    train("nano", "synthetic:16:1", tmp_path / "out", recipe=recipe, fusion=fusion)
    model = load_checkpoint(tmp_path / "out").model
    assert model.config.fusion == fusion
    gates = [block.gate.item() for block in model.fusion]
    assert gates[0] == gates[2] == gates[3] == 0.5 != gates[1]
    assert not any(film.proj.weight.any() for film in model.film)


def test_the_history_tells_both_losses_the_dice_and_the_rates(
    unbroken: tuple[Path, dict[str, Any]],
) -> None:
    out, provenance = unbroken
    last = provenance["history"][-1]
    assert last["validation_mask_loss"] > 0
    assert set(last["validation_dice"]) == {"vessel", "lesion", "disc"}
    assert all(0 <= dice <= 1 for dice in last["validation_dice"].values())
    assert set(last["learning_rates"]) == {
        *("unet_encoder", "unet_decoder", "fusion", "vision", "cross_attention", "language")
    }
    assert last["stopped"] == []
    assert provenance["final"]["validation_loss"] == last["validation_loss"]
    assert (out / "history.png").read_bytes().startswith(b"\x89PNG")


def test_augmented_pictures_make_another_run(
    unbroken: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, augment=1.0)
    augmented = train("nano", DATA, tmp_path / "augmented", recipe=recipe)
    assert augmented["history"][0]["mask_loss"] != unbroken[1]["history"][0]["mask_loss"]


def test_gates_start_where_the_recipe_says_and_nothing_else_moves() -> None:
    torch.manual_seed(0)
    model = build_model("nano")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    open_gates(model, 0.25)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Two of each of 4 cross-attention layers, one of each of 4 fusion blocks.
    assert len(changed) == 4 * 2 + 4
    assert all(name.endswith("gate") and float(after[name]) == 0.25 for name in changed)


def test_another_seed_gives_another_run(
    unbroken: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, seed=6, epochs=1)
    other = train("nano", DATA, tmp_path / "other", recipe=recipe)
    assert other["history"][0] != unbroken[1]["history"][0]


def test_a_resumed_run_equals_the_unbroken_one(
    unbroken: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, provenance = unbroken
    interrupted = tmp_path / "interrupted"
    run_epoch = EpochRunner.run_epoch

    def stop_in_the_second_epoch(self: Any, epoch: int, indices: Any) -> tuple[float, float]:
        if epoch == 1:
            raise KeyboardInterrupt
        return run_epoch(self, epoch, indices)

    with monkeypatch.context() as patch:
        patch.setattr(EpochRunner, "run_epoch", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            train("nano", DATA, interrupted, recipe=RECIPE)
    resumed = train("nano", DATA, interrupted, recipe=RECIPE, resume=True)
    assert resumed["history"] == provenance["history"]
    assert same_tensors(out, interrupted)
    assert {p.name for p in interrupted.iterdir()} == {p.name for p in out.iterdir()}


def test_the_provenance_says_how_the_checkpoint_was_made(
    unbroken: tuple[Path, dict[str, Any]],
) -> None:
    out, provenance = unbroken
    saved = json.loads((out / "provenance.json").read_text())
    assert saved == json.loads(json.dumps(provenance))
    assert saved["notice"] == "Not for clinical use."
    assert (saved["data"], saved["recipe"]["seed"]) == (DATA, 5)
    assert saved["training_cases"] + saved["validation_cases"] == 40


@pytest.mark.parametrize(("query", "changed"), [("vision", ""), ("skip", "fusion, ")])
def test_resuming_with_other_settings_names_them(query: str, changed: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    one_of_two = dataclasses.replace(RECIPE, epochs=2)
    out.mkdir()
    run = {
        "preset": "nano",
        "labels": ["Acquired", "Inherited"],
        "mask_kinds": ["vessel", "lesion", "disc"],
        "fusion": dataclasses.asdict(load_preset("nano").fusion),
        "data": DATA,
        "unet_weights": None,
        "recipe": dataclasses.asdict(one_of_two),
    }
    (out / "trainer.json").write_text(json.dumps(run))
    fusion = dataclasses.replace(load_preset("nano").fusion, query=query)
    with pytest.raises(CheckpointError, match=rf"other settings \({changed}data, rows\)") as told:
        train("nano", "synthetic:41:1", out, recipe=one_of_two, fusion=fusion, resume=True)
    assert f'"data": "{DATA}"' in str(told.value)
    assert "mask_kinds" not in str(told.value)  # what is the same is no news
    assert "Give that again with --resume" in str(told.value)


def test_resuming_where_nothing_was_interrupted_is_refused(
    unbroken: tuple[Path, dict[str, Any]],
) -> None:
    with pytest.raises(CheckpointError, match="no unfinished run"):
        train("nano", DATA, unbroken[0], recipe=RECIPE, resume=True)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_resuming_from_a_damaged_state_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(content)
    with pytest.raises(CheckpointError, match="no unfinished run"):
        train("nano", DATA, tmp_path, recipe=RECIPE, resume=True)


def test_a_directory_that_is_taken_is_refused(unbroken: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="--resume"):
        train("nano", DATA, unbroken[0], recipe=RECIPE)


def test_a_folder_with_other_labels_is_refused_before_training(tmp_path: Path) -> None:
    save_data(SyntheticData(8, 0), tmp_path / "data")
    table = tmp_path / "data" / "labels.csv"
    table.write_text(table.read_text().replace("Inherited", "Healthy"))
    with pytest.raises(DataError, match=r"row \d, column label: found 'Healthy'"):
        train("nano", str(tmp_path / "data"), tmp_path / "out", recipe=RECIPE)
    assert not (tmp_path / "out").exists()


def write_three_classes(folder: Path) -> None:
    """A folder of 30 cases whose label and lesion mask are not the preset's."""
    save_data(SyntheticData(30, 0), folder)
    table = folder / "labels.csv"
    text = table.read_text().replace("Inherited", "healthy").replace("lesion:", "MA:")
    lines = [
        line.replace("Acquired", "glaucoma") if number % 4 == 1 else line
        for number, line in enumerate(text.splitlines(keepends=True))
    ]
    table.write_text("".join(lines))


def test_labels_and_mask_kinds_of_the_users_own_train_and_stay_with_the_checkpoint(
    tmp_path: Path,
) -> None:
    write_three_classes(tmp_path / "data")
    labels, kinds = ("healthy", "glaucoma", "Acquired"), ("MA", "vessel", "disc", "spare")
    recipe = Recipe(epochs=1, batch_size=16)
    provenance = train(
        "nano",
        tmp_path / "data",
        tmp_path / "out",
        recipe=recipe,
        labels=labels,
        mask_kinds=kinds,
    )
    checkpoint = load_checkpoint(tmp_path / "out")
    assert (provenance["labels"], provenance["mask_kinds"]) == (labels, kinds)
    assert (checkpoint.config.labels, checkpoint.config.mask_kinds) == (labels, kinds)
    assert "healthy, glaucoma or Acquired?" in checkpoint.config.prompt.prefix
    assert len(checkpoint.prompt_encoder().label_ids) == 3
    assert checkpoint.model.unet.segmentation_head[0].out_channels == 4


def test_the_u_net_encoder_starts_from_the_file_and_learns_at_its_own_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_model("nano").unet.encoder
    state = {n.removeprefix("model."): t for n, t in encoder.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    seen: dict[str, Any] = {}

    def look(self: Any, epoch: int, indices: Any) -> tuple[float, float]:
        seen["state"] = {n: t.clone() for n, t in self.model.unet.encoder.state_dict().items()}
        seen["rates"] = {
            id(p): g["peak_lr"] for g in self.optimizer.param_groups for p in g["params"]
        }
        seen["encoder"] = [id(p) for p in self.model.unet.encoder.parameters()]
        seen["decoder"] = [id(p) for p in self.model.unet.decoder.parameters()]
        return 0.0, 0.0

    monkeypatch.setattr(EpochRunner, "run_epoch", look)
    recipe = Recipe(epochs=1, unet_lr=0.5, encoder_lr=0.25)
    weights = tmp_path / "weights.safetensors"
    provenance = train("nano", DATA, tmp_path / "out", recipe=recipe, unet_weights=weights)
    assert all(torch.equal(t, seen["state"][n]) for n, t in encoder.state_dict().items())
    assert {seen["rates"][p] for p in seen["encoder"]} == {0.25}
    assert {seen["rates"][p] for p in seen["decoder"]} == {0.5}
    assert provenance["unet_weights"]["file"] == "weights.safetensors"
    assert len(provenance["unet_weights"]["sha256"]) == 64


def test_too_few_patients_to_hold_one_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no patient of Inherited to train on"):
        train("nano", "synthetic:1:1", tmp_path / "out", recipe=RECIPE)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_one_class_is_refused(tmp_path: Path) -> None:
    save_data(SyntheticData(30, 0), tmp_path / "data")
    table = tmp_path / "data" / "labels.csv"
    table.write_text(table.read_text().replace("Inherited", "Acquired"))
    with pytest.raises(DataError, match="no patient of Inherited"):
        train("nano", tmp_path / "data", tmp_path / "out", recipe=RECIPE)


def test_masks_of_a_kind_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    save_data(SyntheticData(30, 0), tmp_path / "data")
    table = tmp_path / "data" / "labels.csv"
    table.write_text(table.read_text().replace("lesion:", "Lesions:"))
    with pytest.raises(DataError, match=r"column mask: found the kinds Lesions, expected only"):
        train("nano", tmp_path / "data", tmp_path / "out", recipe=RECIPE)


def test_a_folder_that_changed_since_the_interruption_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_data(SyntheticData(40, 0), tmp_path / "data")
    run_epoch = EpochRunner.run_epoch

    def one_epoch(self: Any, epoch: int, indices: Any) -> tuple[float, float]:
        if epoch:
            raise KeyboardInterrupt
        return run_epoch(self, epoch, indices)

    monkeypatch.setattr(EpochRunner, "run_epoch", one_epoch)
    with pytest.raises(KeyboardInterrupt):
        train("nano", tmp_path / "data", tmp_path / "out", recipe=RECIPE)
    table = tmp_path / "data" / "labels.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(CheckpointError, match=r"other settings \(rows\)"):
        train("nano", tmp_path / "data", tmp_path / "out", recipe=RECIPE, resume=True)


@pytest.mark.parametrize(
    "field", [{"epochs": 0}, {"batch_size": 0}, {"validation": 0.0}, {"seed": -1}, {"seed": 2**70}]
)
def test_a_recipe_that_no_run_can_use_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(field))):
        Recipe(**field)


def test_a_broken_trainer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match="no unfinished run"):
        train("nano", DATA, tmp_path, recipe=RECIPE, resume=True)


def test_a_preset_without_its_tokenizer_fails_before_its_weights_are_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no tokenizer"):
        train("llama-3.2-11b", DATA, tmp_path / "out", recipe=RECIPE)


def test_a_folder_trains_as_the_set_it_was_written_from(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=16)
    save_data(SyntheticData(24, 1), tmp_path / "data")
    folder = train("nano", str(tmp_path / "data"), tmp_path / "a", recipe=recipe)
    synthetic = train("nano", "synthetic:24:1", tmp_path / "b", recipe=recipe)
    assert folder["history"] == synthetic["history"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = EpochRunner._losses
    calls = 0

    def diverge(self: Any, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        label_loss, mask_loss = losses(self, inputs)
        return (label_loss * float("nan") if calls > 3 else label_loss), mask_loss

    monkeypatch.setattr(EpochRunner, "_losses", diverge)
    with pytest.raises(CheckpointError, match="epoch 2, step 1: found the loss nan"):
        train("nano", DATA, tmp_path / "run", recipe=RECIPE)
    assert len(load_checkpoint(tmp_path / "run").provenance["history"]) == 1

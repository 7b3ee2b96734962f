"""mdf_training.config: a label set of the user's own changes the prompt, the presets' stay."""

import dataclasses
import json
from typing import Any

import pytest

from mdf_sdk.errors import CheckpointError, InputError
from mdf_training.config import PRESETS, ModelConfig, load_preset, set_task

DISEASES = ("healthy", "diabetic retinopathy", "age-related macular degeneration")
CHOICE = "healthy, diabetic retinopathy or age-related macular degeneration"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_own_labels_leave_its_config_as_it_is(preset: str) -> None:
    config = load_preset(preset)
    assert set_task(config, config.labels, config.mask_kinds) == config


def test_the_presets_prompts_are_those_that_checkpoints_were_trained_with() -> None:
    question = "Is the retinal disease of this patient Acquired or Inherited?"
    nano, smol = load_preset("nano").prompt, load_preset("smol-135m").prompt
    assert (nano.prefix, nano.suffix) == (f"<|begin_of_text|>{question}\n", "\nAnswer:")
    assert smol.prefix == (
        f"<|im_start|>user\n{question}\nThe photograph and the clinical information follow.\n"
    )
    assert smol.suffix == (
        "\nAnswer with Acquired or Inherited.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_the_prompt_names_the_users_labels_and_no_others(preset: str) -> None:
    config = set_task(load_preset(preset), DISEASES, ("disc",))
    assert (config.labels, config.mask_kinds) == (DISEASES, ("disc",))
    assert f"Is the retinal disease of this patient {CHOICE}?\n" in config.prompt.prefix
    if preset != "nano":
        assert f"\nAnswer with {CHOICE}." in config.prompt.suffix
    assert "Inherited" not in config.prompt.prefix + config.prompt.suffix


@pytest.mark.parametrize(
    "labels", [(), ("healthy",), ("a", "a"), ("a", ""), ("a", " b"), ("a", "<|eot_id|>"), "ab"]
)
def test_labels_that_no_model_can_tell_apart_are_refused(labels: Any) -> None:
    with pytest.raises(InputError, match=r"labels: found .*--labels 'healthy,glaucoma'"):
        set_task(load_preset("nano"), labels, ("disc",))


def test_a_model_without_a_mask_kind_is_refused() -> None:
    with pytest.raises(InputError, match="mask_kinds: found"):
        set_task(load_preset("nano"), DISEASES, ())


@pytest.mark.parametrize("preset", PRESETS)
def test_json_gives_the_same_config(preset: str) -> None:
    config = load_preset(preset)
    fusion = dataclasses.replace(config.fusion, depths=(0, 2), film=False, query="skip", alpha=2)
    config = dataclasses.replace(config, fusion=fusion)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_where_a_skip_asks_a_layer_reads_as_many_states_as_the_skip_has_patches() -> None:
    config = load_preset("smol-135m")
    tower = dict.fromkeys((3, 9, 15, 21, 27, 33), 16 * 16 + 1)
    assert config.state_rows() == tower
    skip = dataclasses.replace(config.fusion, query="skip", depths=(0, 2))
    asking = dataclasses.replace(config, fusion=skip).state_rows()
    assert asking == tower | {3: 12 * 12, 21: 12 * 12}
    silent = dataclasses.replace(config, fusion=dataclasses.replace(skip, alpha=0.0))
    assert silent.state_rows() == tower


def test_a_config_from_before_the_variants_fuses_every_skip_both_ways() -> None:
    values = load_preset("nano").to_dict()
    for name in ("depths", "film", "query"):
        del values["fusion"][name]
    fusion = ModelConfig.from_dict(values).fusion
    assert (fusion.depths, fusion.film, fusion.query) == ((0, 1, 2, 3), True, "vision")


@pytest.mark.parametrize(
    "field",
    [
        {"depths": [4]},
        {"depths": [1, 0]},
        {"depths": [1, 1]},
        {"depths": 3},
        {"depths": [True]},
        {"film": "no"},
        {"query": "unet"},
        {"query": ["vision"]},
        {"alpha": float("nan")},
        {"alpha": "1"},
    ],
    ids=str,
)
def test_a_fusion_that_no_model_has_is_refused(field: dict[str, Any]) -> None:
    values = load_preset("nano").to_dict()
    values["fusion"] |= field
    with pytest.raises(CheckpointError, match=f"fusion, {next(iter(field))}: found .*, expected"):
        ModelConfig.from_dict(values)
    fusion = load_preset("nano").fusion
    with pytest.raises(InputError, match=f"fusion, {next(iter(field))}: found"):
        dataclasses.replace(fusion, **field)

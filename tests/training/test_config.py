"""mdf_training.config: a label set of the user's own changes the prompt, the presets' stay."""

from typing import Any

import pytest

from mdf_sdk.errors import InputError
from mdf_training.config import PRESETS, load_preset, set_task

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

"""mdf_training.tokenizer: each preset's tokenizer, the image token past its vocabulary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mdf_sdk.errors import CheckpointError
from mdf_sdk.prompt import PromptEncoder
from mdf_training.config import PRESETS, load_preset
from mdf_training.tokenizer import load_tokenizer

NANO = load_tokenizer(load_preset("nano"))


def test_training_the_nano_tokenizer_twice_gives_the_same_file() -> None:
    assert load_tokenizer(load_preset("nano")) == NANO


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_survives_the_nano_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_str(NANO)
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("preset", ["nano", "smol-135m"])
def test_the_image_token_is_the_first_id_past_the_vocabulary(preset: str) -> None:
    config = load_preset(preset)
    encoder = PromptEncoder(load_tokenizer(config), config.prompt, config.labels)
    assert encoder.image_id == config.text["vocab_size"]
    ids = [*encoder.prefix_ids, *encoder.suffix_ids, *sum(encoder.label_ids, ())]
    assert max(ids) < encoder.image_id


@pytest.mark.parametrize("preset", ["nano", "smol-135m"])
def test_the_prompts_special_tokens_are_single_ids(preset: str) -> None:
    config = load_preset(preset)
    tokenizer = Tokenizer.from_str(load_tokenizer(config))
    assert tokenizer.token_to_id(config.prompt.end_token) is not None
    first = tokenizer.encode(config.prompt.prefix, add_special_tokens=False).tokens[0]
    assert first.startswith("<|")


def test_the_llama_preset_asks_for_the_users_own_tokenizer() -> None:
    with pytest.raises(CheckpointError, match="your own copy"):
        load_tokenizer(load_preset("llama-3.2-11b"))


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=", ".join(PRESETS)):
        load_preset("llama-4")

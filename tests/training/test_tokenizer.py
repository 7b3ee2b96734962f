"""mdf_training.tokenizer: each preset's tokenizer, the image token past its vocabulary."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mdf_sdk.errors import CheckpointError
from mdf_sdk.prompt import PromptEncoder
from mdf_training.config import PRESETS, load_preset
from mdf_training.tokenizer import load_tokenizer, read_llama_tokenizer

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
    with pytest.raises(CheckpointError, match=r"your own copy.*--backbone"):
        load_tokenizer(load_preset("llama-3.2-11b"))


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=", ".join(PRESETS)):
        load_preset("llama-4")


def test_a_directorys_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(NANO, encoding="utf-8")
    assert read_llama_tokenizer(tmp_path, load_preset("nano")) == NANO


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("<|eot_id|>", r"no special token <\|eot_id\|>"),
        ("<|begin_of_text|>", r"no special token <\|begin_of_text\|>"),
        ("<|image|>", r"no special token <\|image\|>"),
    ],
)
def test_a_tokenizer_without_a_special_token_of_the_prompt_is_refused(
    removed: str, message: str, tmp_path: Path
) -> None:
    content = json.loads(NANO)
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != removed]
    content["model"]["vocab"].pop(removed, None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_llama_tokenizer(tmp_path, load_preset("nano"))


def test_an_image_token_elsewhere_is_refused(tmp_path: Path) -> None:
    content = json.loads(NANO)
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|image|>"]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<|python_tag|>", "<|image|>"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    with pytest.raises(CheckpointError, match="at 641, expected 640"):
        read_llama_tokenizer(tmp_path, load_preset("nano"))


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(NANO, encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokens below 128256, expected 128256"):
        read_llama_tokenizer(tmp_path, load_preset("llama-3.2-11b"))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]"])
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*expected the tokenizer"):
        read_llama_tokenizer(tmp_path, load_preset("nano"))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_llama_tokenizer(tmp_path, load_preset("nano"))

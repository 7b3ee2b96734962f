import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mdf_sdk import TextError
from mdf_sdk.prompt import PromptEncoder, _clean

from .toy_engine import LABELS, PROMPT, SPECIAL_TOKENS


@pytest.fixture(scope="module")
def encoder(toy_engine: Path) -> PromptEncoder:
    return PromptEncoder((toy_engine / "tokenizer.json").read_text(), PROMPT, LABELS)


@pytest.fixture(scope="module")
def tokenizer(toy_engine: Path) -> Tokenizer:
    return Tokenizer.from_file(str(toy_engine / "tokenizer.json"))


@given(
    parts=st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=5), min_size=1, max_size=6)
)
@settings(deadline=None)
def test_no_text_becomes_a_special_token(encoder: PromptEncoder, parts: list[str]) -> None:
    text = "eye " + "".join(parts).encode("utf-8", "replace").decode()
    assert max(encoder.encode(text).ids) < 256


def test_what_does_not_fit_is_cut_off_and_counted(encoder: PromptEncoder) -> None:
    encoded = encoder.encode("a" * 63 + "bcd")
    assert encoded.ids == encoder.encode("a" * 63 + "b").ids
    assert encoded.dropped_tokens == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n\t",
        "\0\x07",
        "\u200b\ufeff",
        "\u200c \u200d",
        "\u202e\u2066\u00ad",
        "\U000e0041",
        "a\ud800",
        "a" + "\u0301" * 31,
        None,
        b"text",
        3,
    ],
)
def test_what_is_no_text_is_refused(encoder: PromptEncoder, text: str) -> None:
    with pytest.raises(TextError, match=r"found .* expected"):
        encoder.encode(text)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("e\u0301", "\u00e9"),  # NFC
        ("e\u200b\u0301", "\u00e9"),
        ("a\r\nb\rc\u2028d\x85e", "a\nb\nc\nd\ne"),
        ("a\tb", "a\tb"),
        ("58\0years\x1b[2J\x9f", "58 years [2J"),
        ("not \u202etnereffid\u202c", "not tnereffid"),
        ("eye\U000e0069\U000e0067\ufe0f", "eye"),
        ("\ufeffeye", "eye"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),  # Persian needs its joiner
    ],
)
def test_a_text_is_read_as_it_is_seen(
    encoder: PromptEncoder, tokenizer: Tokenizer, text: str, seen: str
) -> None:
    assert list(encoder.encode(text).ids) == tokenizer.encode(seen).ids


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40))
@settings(deadline=None)
def test_plain_text_is_encoded_as_it_stands(
    encoder: PromptEncoder, tokenizer: Tokenizer, text: str
) -> None:
    assert list(encoder.encode(text).ids) == tokenizer.encode(text).ids


@given(st.text(max_size=60))
@settings(deadline=None)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    try:
        once = _clean(text)
    except TextError:
        return
    assert _clean(once) == once


def test_the_longest_text_is_cleaned_in_a_moment() -> None:
    start = time.perf_counter()
    with pytest.raises(TextError, match="combining marks"):
        _clean("a" + "\u0301\u0316" * 50_000)  # 6 s, were it normalized
    _clean("\u00e9" * 100_000)
    assert time.perf_counter() - start < 2


def test_padding_moves_nothing_that_a_case_sees(encoder: PromptEncoder) -> None:
    short, long = encoder.encode("ab"), encoder.encode("abcdefgh")
    alone, together = encoder.pack([short]), encoder.pack([short, long])
    shift = together.input_ids.shape[1] - alone.input_ids.shape[1]
    prefix = alone.prefix_length
    np.testing.assert_array_equal(
        together.input_ids[0, prefix + shift :], alone.input_ids[0, prefix:]
    )
    np.testing.assert_array_equal(
        together.position_ids[0, prefix + shift :], alone.position_ids[0, prefix:]
    )
    kept = np.r_[:prefix, prefix + shift : together.input_ids.shape[1]]
    np.testing.assert_array_equal(
        together.attention_mask[0][np.ix_(kept, kept)], alone.attention_mask[0]
    )
    padding = slice(prefix, prefix + shift)
    assert not together.attention_mask[0, prefix + shift :, padding].any()

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdf_sdk import TextError
from mdf_sdk.prompt import PromptEncoder

from .toy_engine import LABELS, PROMPT, SPECIAL_TOKENS


@pytest.fixture(scope="module")
def encoder(toy_engine: Path) -> PromptEncoder:
    return PromptEncoder((toy_engine / "tokenizer.json").read_text(), PROMPT, LABELS)


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


@pytest.mark.parametrize("text", ["", "  \n\t", "a\ud800", None, b"text", 3])
def test_what_is_no_text_is_refused(encoder: PromptEncoder, text: str) -> None:
    with pytest.raises(TextError, match=r"found .* expected"):
        encoder.encode(text)


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

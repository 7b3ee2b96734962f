"""Clinical texts in, the packed token arrays of one label-scoring prefill out.

Layout of a packed row, the same in training and in an engine (T = P + body + M, left-padded body):

    [ prefix (P) | padding | <|image|> text suffix | labels (M) ]

The prefix (instruction) stands before the image, so its keys and values do not depend on the case:
an engine carries them as constants and is fed the rows from P on. Every label sees the prefix, the
body and its own earlier tokens, and starts at the position after the body, so one prefill scores
each label exactly as a forward of its own would.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from mdf_sdk.errors import TextError
from mdf_sdk.manifest import PromptSpec

MAX_CHARACTERS = 100_000  # some 40 pages: tokenizing more would take seconds to cut it all off
# UAX #15's stream-safe limit. Normalizing takes the square of a run's length: 6 s for 100,000.
_MAX_MARKS = 30
_NEW_LINES = re.compile("\r\n?|[\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What shows nothing and may hide or reorder what is shown: soft hyphens, zero-width spaces, marks
# and overrides of the writing direction, fillers, variation selectors, interlinear notes, tags.
# The zero-width joiners (U+200C, U+200D) stay: Persian and Hindi spell with them.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class EncodedText:
    """Token ids of one clinical text, and how many ids were cut off its end to fit."""

    ids: tuple[int, ...]
    dropped_tokens: int


@dataclass(frozen=True)
class PackedPrompt:
    """Arrays of one prefill over B cases; rows before `prefix_length` are the same for every case.

    Attributes:
        input_ids: int64 (B, T).
        position_ids: int64 (B, T); padding holds 0.
        attention_mask: bool (B, T, T), True where the row may read the column. A padding row reads
            itself.
        body_mask: bool (B, T), True on the case's own tokens: image, text and suffix.
        prefix_length: P.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.bool_]
    body_mask: npt.NDArray[np.bool_]
    prefix_length: int


class PromptEncoder:
    """Turns clinical texts into packed prompts; holds the tokenizer and the label set."""

    def __init__(self, tokenizer_json: str, spec: PromptSpec, labels: Sequence[str]) -> None:
        """Args:
        tokenizer_json: the content of tokenizer.json.
        spec: instruction, question and their special tokens.
        labels: distinct, not empty; the order of every score array.
        """
        self._template = Tokenizer.from_str(tokenizer_json)
        self._text = Tokenizer.from_str(tokenizer_json)
        # In a user's text `<|eot_id|>` is ten characters, not a token.
        self._text.encode_special_tokens = True
        self.spec = spec
        self.labels = tuple(labels)
        self.image_id = self._special(spec.image_token)
        end_id = self._special(spec.end_token)
        self.prefix_ids = self._ids(spec.prefix)
        self.suffix_ids = self._ids(spec.suffix)
        # The end token closes each label, so that none is the beginning of another.
        self.label_ids = tuple((*self._ids(label), end_id) for label in self.labels)
        self.label_vocabulary = tuple(sorted({i for ids in self.label_ids for i in ids}))

    def encode(self, text: str) -> EncodedText:
        """Tokenize one clinical text; special tokens in it are plain characters.

        Before that every line ends with LF, other control characters but tabs become spaces,
        characters that show nothing are removed (zero-width ones, marks of the writing direction),
        and the text is NFC-normalized and stripped. Ids beyond `spec.max_text_tokens` are cut off
        its end and counted.

        Raises:
            TextError: not a string, empty once cleaned, or no Unicode text.
        """
        if not isinstance(text, str):
            raise TextError(f"clinical text: found {type(text).__name__}, expected str")
        if len(text) > MAX_CHARACTERS:
            raise TextError(
                f"clinical text: found {len(text)} characters, expected at most {MAX_CHARACTERS}. "
                "Pass the part that describes the patient."
            )
        text = _clean(text)
        if all(character in _JOINERS or character.isspace() for character in text):
            raise TextError(
                "clinical text: found an empty text, expected at least one word. "
                "If nothing is known of the patient, say so: text='No clinical information.'"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError(
                f"clinical text: found a lone surrogate at {error.start}, expected Unicode. "
                "Decode the source with its true encoding."
            ) from None
        ids = self._text.encode(text, add_special_tokens=False).ids
        limit = self.spec.max_text_tokens
        return EncodedText(tuple(ids[:limit]), max(0, len(ids) - limit))

    @property
    def label_rows(self) -> int:
        """M: the fed label tokens, all but the last of each label."""
        return sum(len(ids) - 1 for ids in self.label_ids)

    def count_rows(self, text_tokens: int) -> int:
        """Rows of a prefill whose longest text has so many tokens, the prefix left out."""
        return 1 + text_tokens + len(self.suffix_ids) + self.label_rows

    def pack(self, texts: Sequence[EncodedText], rows: int = 0) -> PackedPrompt:
        """Lay B encoded texts and the label set out as one prefill.

        Args:
            rows: pad to at least so many, the prefix left out.
        """
        bodies = [(self.image_id, *text.ids, *self.suffix_ids) for text in texts]
        prefix, fed = len(self.prefix_ids), [ids[:-1] for ids in self.label_ids]
        longest = max(len(body) for body in bodies)
        longest = max(longest, rows - self.label_rows)
        batch, labels_at = len(bodies), prefix + longest
        length = labels_at + self.label_rows

        ids = np.zeros((batch, length), np.int64)
        positions = np.zeros((batch, length), np.int64)
        mask = np.zeros((batch, length, length), np.bool_)
        body_mask = np.zeros((batch, length), np.bool_)
        ids[:, :prefix] = self.prefix_ids
        positions[:, :prefix] = np.arange(prefix)
        mask[:] = np.eye(length, dtype=np.bool_)
        mask[:, :prefix, :prefix] = np.tri(prefix, dtype=np.bool_)
        for row, body in enumerate(bodies):
            start = labels_at - len(body)
            ids[row, start:labels_at] = body
            positions[row, start:labels_at] = prefix + np.arange(len(body))
            mask[row, start:, :prefix] = True
            mask[row, start:labels_at, start:labels_at] = np.tri(len(body), dtype=np.bool_)
            mask[row, labels_at:, start:labels_at] = True
            body_mask[row, start:labels_at] = True
        at = labels_at
        for label in fed:
            end = at + len(label)
            ids[:, at:end] = label
            mask[:, at:end, at:end] = np.tri(len(label), dtype=np.bool_)
            for row, body in enumerate(bodies):
                positions[row, at:end] = prefix + len(body) + np.arange(len(label))
            at = end
        return PackedPrompt(ids, positions, mask, body_mask, prefix)

    def score_pairs(self) -> list[list[tuple[int, int]]]:
        """For each label, the (row, column) pairs of the label logits whose sum is its score.

        Rows count from the last body token (row 0; rows 1 to M are the fed label tokens); columns
        index `label_vocabulary`. A label's score is the sum of log_softmax(logits over
        label_vocabulary) at its pairs: the log-probability of its whole token sequence, end token
        included, given that every token is one that the label set is made of. An engine therefore
        keeps those rows of the output head alone.
        """
        column = {token: i for i, token in enumerate(self.label_vocabulary)}
        pairs, fed = [], 0
        for ids in self.label_ids:
            rows = [0, *range(fed + 1, fed + len(ids))]
            pairs.append([(row, column[token]) for row, token in zip(rows, ids, strict=True)])
            fed += len(ids) - 1
        return pairs

    def _ids(self, template: str) -> tuple[int, ...]:
        return tuple(self._template.encode(template, add_special_tokens=False).ids)

    def _special(self, token: str) -> int:
        token_id = self._template.token_to_id(token)
        if token_id is None:
            raise TextError(
                f"tokenizer.json: found no token {token!r}, expected it as a special token"
            )
        return int(token_id)


def _clean(text: str) -> str:
    """Leave what a reader sees; plain text stays as it is."""
    text = _CONTROLS.sub(" ", _NEW_LINES.sub("\n", text))
    if text.isascii():
        return text.strip()
    text = _INVISIBLE.sub("", text)
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > _MAX_MARKS:
            raise TextError(
                f"clinical text: found more than {_MAX_MARKS} combining marks on one character, "
                "expected text. Decode the source with its true encoding."
            )
    return unicodedata.normalize("NFC", text).strip()

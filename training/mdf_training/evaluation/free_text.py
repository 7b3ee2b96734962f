"""A model that answers in words, and the same model scored over the label set: two read-outs.

The paper's baseline lets the stock model answer in free text, and counts what names no class as
None. Scored over the label set no answer can be None, so the difference of the two accuracies on
the same prompts is what the read-out alone costs.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
)

from mdf_sdk.errors import CheckpointError, InputError
from mdf_sdk.preprocessing import to_pixels
from mdf_sdk.prompt import PromptEncoder
from mdf_training.backbone import CrossAttentionFeed
from mdf_training.checkpoint import load_checkpoint
from mdf_training.config import MASK_KINDS, load_preset, set_task
from mdf_training.data.cases import Case, DataSet
from mdf_training.data.pixels import batches
from mdf_training.evaluation.evaluate import check_labels
from mdf_training.evaluation.statistics import (
    Bool,
    Int64,
    Proportion,
    estimate_balanced_accuracy,
    paired_difference,
)
from mdf_training.llama_weights import find_preset, read_backbone
from mdf_training.model import MDFModel, PromptTensors, build_model
from mdf_training.tokenizer import load_tokenizer, read_llama_tokenizer

Scores = npt.NDArray[np.float32]
MAX_NEW_TOKENS = 24
BATCH_SIZE = 16
GRAFTED = "smol-135m"  # the preset whose language weights a package carries


class Speaker(Protocol):
    """A model that answers a case in words, and scores its labels."""

    labels: tuple[str, ...]

    def read_out(self, cases: Sequence[Case]) -> tuple[list[str], Scores]:
        """Return each case's greedy answer, and its label scores (B, K), on one prompt."""


def parse_answer(answer: str, labels: Sequence[str]) -> str | None:
    """Return the one label that an answer names, or None where it names none or several.

    A label counts where its words stand whole, in any case of letters; of a label within a longer
    one ("Best" in "Best disease") the longer alone counts. Naming one label twice is naming one.
    What is said of it is not understood: "not Inherited" names Inherited.
    """
    longest_first = sorted(labels, key=len, reverse=True)
    pattern = "|".join(re.escape(label) for label in longest_first)
    found = re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", answer, re.IGNORECASE)
    named = {label for label in labels for words in found if words.lower() == label.lower()}
    return named.pop() if len(named) == 1 else None


def measure_baseline(speaker: Speaker, data: DataSet) -> dict[str, Any]:
    """Read every case out both ways.

    Returns:
        JSON types. `free_text` and `label_set`: accuracy and balanced accuracy, None counted as
        wrong; `none`: the share of answers that name no label or several; `read_out_gap`: accuracy
        over the label set minus that of free text, paired, over patients; `answers`: for each case
        its file, its label, the answer, the label named in it, and the label scored highest. An
        answer may repeat the clinical text.

    Raises:
        DataError: a label that the model does not have, or a picture that cannot be read.
    """
    check_labels(data, speaker.labels)
    answers: list[str] = []
    scores: list[Scores] = []
    for batch in tqdm(list(batches(range(len(data)), BATCH_SIZE)), leave=False, disable=None):
        words, of_batch = speaker.read_out([data[i] for i in batch])
        answers += words
        scores.append(of_batch)
    named = [parse_answer(answer, speaker.labels) for answer in answers]
    truth = np.array([speaker.labels.index(row.label) for row in data.rows])
    spoken = np.array([-1 if label is None else speaker.labels.index(label) for label in named])
    scored = np.concatenate(scores).argmax(axis=1)
    patients = [row.patient_id for row in data.rows]
    return {
        "n": len(data),
        "free_text": _accuracies(truth, spoken, patients),
        "label_set": _accuracies(truth, scored, patients),
        "none": Proportion.of(spoken < 0).to_dict(),
        "read_out_gap": paired_difference(scored == truth, spoken == truth, patients).to_dict(),
        "answers": [
            {
                "file": row.file,
                "label": row.label,
                "answer": answer,
                "named": label,
                "scored": speaker.labels[k],
            }
            for row, answer, label, k in zip(data.rows, answers, named, scored, strict=True)
        ],
    }


def open_speaker(
    model: str | os.PathLike[str], labels: Sequence[str] | None = None
) -> "CheckpointSpeaker | LlamaSpeaker":
    """Open what can answer in words.

    Args:
        model: a checkpoint; a Hugging Face directory of Llama 3.2 Vision; or "smol-135m", SmolLM2's
            own weights, whose shut gates let it see no photograph.
        labels: the label set of the latter two; Acquired and Inherited when left out.

    Raises:
        CheckpointError: it is none of them, or broken.
        InputError: `labels` for a checkpoint, which has its own.
    """
    folder = Path(model)
    if (folder / "preprocessor_config.json").exists() or (
        folder / "processor_config.json"
    ).exists():
        return LlamaSpeaker(folder, labels)
    if (folder / "config.json").exists():
        if labels is not None:
            raise InputError(
                f"labels: found {', '.join(labels)}, expected none: a checkpoint has its own. "
                "Leave --labels out."
            )
        checkpoint = load_checkpoint(folder)
        return CheckpointSpeaker(checkpoint.model, checkpoint.tokenizer_json)
    if os.fspath(model) != GRAFTED:
        raise CheckpointError(
            f"{folder}: found no config.json, expected a checkpoint, a Hugging Face directory of "
            f"Llama 3.2 Vision, or the word {GRAFTED}. `mdf train` makes a checkpoint."
        )
    config = load_preset(GRAFTED)
    if labels is not None:
        config = set_task(config, labels, config.mask_kinds)
    return CheckpointSpeaker(build_model(config).eval(), load_tokenizer(config))


class CheckpointSpeaker:
    """A fused model that answers in words, one token after another."""

    def __init__(self, model: MDFModel, tokenizer_json: str) -> None:
        self._device = _device()
        self._model = model.to(self._device)
        self._encoder = PromptEncoder(tokenizer_json, model.config.prompt, model.config.labels)
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._stops = _stops(self._encoder, model.config.text)
        self.labels = model.config.labels

    @torch.inference_mode()
    def read_out(self, cases: Sequence[Case]) -> tuple[list[str], Scores]:
        """As Speaker has it."""
        pixels = [to_pixels(case.image, self._model.config.image) for case in cases]
        tower, unet = (
            torch.from_numpy(np.stack(p)).to(self._device) for p in zip(*pixels, strict=True)
        )
        states = self._model.encode_image(tower, unet).states
        packed = self._encoder.pack([self._encoder.encode(case.text) for case in cases])
        prompt = PromptTensors.from_packed(packed, self._encoder, self._device)
        hidden, _ = self._model.decode_text(states, prompt)
        scores: Scores = self._model.score_labels(hidden, prompt).cpu().numpy()
        answers = self._generate(states, prompt).tolist()
        return [_decode(self._tokenizer, ids, self._stops) for ids in answers], scores

    def _generate(self, states: dict[int, Tensor], prompt: PromptTensors) -> Tensor:
        """Return greedy tokens, int64 (B, N), N at most MAX_NEW_TOKENS; rows run past their end."""
        text: Any = self._model.backbone.model.language_model
        first = next(iter(states.values()))
        closed = torch.finfo(first.dtype).min
        rows = prompt.input_ids.shape[1] - self._encoder.label_rows  # the labels are left out
        ids, positions = prompt.input_ids[:, :rows], prompt.position_ids[:, :rows]
        allowed = prompt.attention_mask[:, :rows, :rows]  # (B, T, T)
        sees_image = torch.arange(rows, device=self._device) >= prompt.prefix_length
        sees_image = sees_image.to(first.dtype)[None, :, None]  # (1, T, 1)
        feed: CrossAttentionFeed | None = CrossAttentionFeed(states, sees_image)
        cache = DynamicCache(config=text.config)
        tokens: list[Tensor] = []
        ended = torch.zeros(len(ids), dtype=torch.bool, device=self._device)
        while len(tokens) < MAX_NEW_TOKENS and not ended.all():
            hidden = text(
                input_ids=ids,
                position_ids=positions,
                attention_mask=torch.where(allowed, 0.0, closed).to(first.dtype)[:, None],
                cross_attention_states=feed,
                full_text_row_masked_out_mask=sees_image[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            ids = self._model.backbone.lm_head(hidden[:, -1:]).argmax(dim=-1)  # (B, 1)
            tokens.append(ids)
            ended |= torch.isin(ids[:, 0], torch.tensor(self._stops, device=self._device))
            # One row more: it reads what the last row read, and itself. The cache has the image.
            positions, feed = positions[:, -1:] + 1, None
            allowed, sees_image = F.pad(allowed[:, -1:], (0, 1), value=True), sees_image[:, -1:]
        return torch.cat(tokens, dim=1)


class LlamaSpeaker:
    """The stock model: transformers' own forward, `generate` and picture processing, four tiles.

    The prompt is the preset's, so that a fused model is compared on the same words.
    """

    def __init__(self, folder: Path, labels: Sequence[str] | None = None) -> None:
        """Args:
        folder: Hugging Face directory; of the architecture of any preset.
        labels: the preset's own when left out.

        Raises:
            CheckpointError: it is none, or broken.
        """
        config = find_preset(folder)
        if labels is not None:
            config = set_task(config, labels, MASK_KINDS)
        tokenizer_json = read_llama_tokenizer(folder, config)
        read_backbone(folder, config)  # its names and shapes: transformers makes up what is missing
        self._device = _device()
        model: Any = MllamaForConditionalGeneration.from_pretrained(folder, dtype="auto")
        self._model = model.eval().to(self._device)
        self._processor: Any = MllamaImageProcessor.from_pretrained(folder)
        self._encoder = PromptEncoder(tokenizer_json, config.prompt, config.labels)
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._stops = _stops(self._encoder, self._model.config.text_config.to_dict())
        self.labels = config.labels

    @torch.inference_mode()
    def read_out(self, cases: Sequence[Case]) -> tuple[list[str], Scores]:
        """As Speaker has it."""
        answers, scores = [], []
        for case in cases:
            picture, tiles = self._prepare(case)
            ids = [*self._encoder.prefix_ids, self._encoder.image_id]
            ids += [*self._encoder.encode(case.text).ids, *self._encoder.suffix_ids]
            answers.append(self._answer(ids, picture, tiles))
            scores.append(self._score(ids, picture, tiles))
        return answers, np.stack(scores)

    def _prepare(self, case: Case) -> tuple[dict[str, Tensor], int]:
        """Return the picture as the model takes it, and into how many tiles it was cut."""
        batch = self._processor(images=[[case.image]], return_tensors="pt")
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        picture = {name: batch[name].to(self._device) for name in names}
        picture["pixel_values"] = picture["pixel_values"].to(self._model.dtype)
        return picture, int(batch["aspect_ratio_mask"].sum())

    def _inputs(
        self, rows: Sequence[Sequence[int]], picture: Mapping[str, Tensor], tiles: int
    ) -> dict[str, Tensor]:
        """Lay prompts of one case out: right-padded, the tokens from the image on see its tiles."""
        length = max(len(row) for row in rows)
        padded = [[*row, *[self._stops[0]] * (length - len(row))] for row in rows]
        ids = torch.tensor(padded, device=self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        start = len(self._encoder.prefix_ids)
        sees = torch.zeros(
            *ids.shape, 1, picture["aspect_ratio_mask"].shape[-1], dtype=torch.long
        )  # (B, T, images, tiles)
        sees[:, start:, :, :tiles] = 1
        repeated = {n: t.expand(len(rows), *t.shape[1:]) for n, t in picture.items()}
        known = torch.arange(length, device=self._device) < lengths[:, None]
        return {
            "input_ids": ids,
            "attention_mask": known.long(),
            "cross_attention_mask": sees.to(self._device),
            **repeated,
        }

    def _answer(self, ids: Sequence[int], picture: Mapping[str, Tensor], tiles: int) -> str:
        greedy = GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(self._stops),
            pad_token_id=self._stops[0],
        )
        inputs = self._inputs([ids], picture, tiles)
        produced = self._model.generate(**inputs, generation_config=greedy)
        return _decode(self._tokenizer, produced[0, len(ids) :].tolist(), self._stops)

    def _score(self, ids: Sequence[int], picture: Mapping[str, Tensor], tiles: int) -> Scores:
        """Score the labels (K,) as PromptEncoder.score_pairs has them, each in a row of its own."""
        labels = self._encoder.label_ids
        vocabulary = self._encoder.label_vocabulary
        inputs = self._inputs([[*ids, *label[:-1]] for label in labels], picture, tiles)
        logits = self._model(**inputs, use_cache=False).logits[:, len(ids) - 1 :]
        log_probs = logits[..., list(vocabulary)].float().log_softmax(dim=-1)
        scores = [
            sum(
                float(log_probs[row, at, vocabulary.index(token)]) for at, token in enumerate(label)
            )
            for row, label in enumerate(labels)
        ]
        return np.array(scores, np.float32)


def _accuracies(truth: Int64, predicted: Int64, patients: Sequence[str]) -> dict[str, Any]:
    correct: Bool = predicted == truth
    return {
        "accuracy": Proportion.of(correct).to_dict(),
        "balanced_accuracy": estimate_balanced_accuracy(truth, predicted, patients).to_dict(),
    }


def _stops(encoder: PromptEncoder, text: Mapping[str, Any]) -> tuple[int, ...]:
    """Token ids that end an answer: the prompt's own and those of the language model."""
    ends = text["eos_token_id"]  # a number, several, or None
    several = ends if isinstance(ends, list) else [ends]
    return (encoder.label_ids[0][-1], *(end for end in several if end is not None))


def _decode(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[int]) -> str:
    """Turn tokens to text, up to the first that ends the answer."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

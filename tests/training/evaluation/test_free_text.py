"""evaluation.free_text: answers in words, parsed, beside the same model's label scores."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)

from mdf_sdk.cli import main
from mdf_sdk.errors import CheckpointError, DataError, InputError
from mdf_sdk.preprocessing import to_pixels
from mdf_sdk.prompt import EncodedText, PromptEncoder
from mdf_training.checkpoint import Checkpoint, load_checkpoint
from mdf_training.config import load_preset, set_task
from mdf_training.data.cases import Case
from mdf_training.data.folder import open_data
from mdf_training.data.pixels import PixelSet, stack_pixels
from mdf_training.evaluation.checkpoint_scorer import CheckpointScorer
from mdf_training.evaluation.free_text import (
    MAX_NEW_TOKENS,
    CheckpointSpeaker,
    LlamaSpeaker,
    measure_baseline,
    open_speaker,
    parse_answer,
)
from mdf_training.model import PromptTensors
from mdf_training.tokenizer import load_tokenizer

NANO = load_preset("nano")
LABELS = ("Acquired", "Inherited")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Inherited", "Inherited"),
        ("The disease is INHERITED.", "Inherited"),
        ("inherited, yes: inherited", "Inherited"),
        ("It is not Inherited", "Inherited"),
        ("**Acquired**", "Acquired"),
        ("", None),
        ("I cannot tell from this picture.", None),
        ("It is Acquired or Inherited.", None),
        ("Disinherited", None),
        ("inherited_disease", None),
        ("The disease was acquiredly so", None),
    ],
)
def test_an_answer_counts_when_it_names_exactly_one_label(answer: str, label: str | None) -> None:
    assert parse_answer(answer, LABELS) == label


def test_a_label_within_a_longer_one_does_not_count_beside_it() -> None:
    labels = ("Best", "Best disease", "C.O.D. (cone)")
    assert parse_answer("This is Best disease.", labels) == "Best disease"
    assert parse_answer("This is best", labels) == "Best"
    assert parse_answer("Best, that is Best disease", labels) is None
    assert parse_answer("It is c.o.d. (CONE)!", labels) == "C.O.D. (cone)"
    assert parse_answer("It is CXOYD (cone)", labels) is None


@given(st.sampled_from(LABELS), st.text(alphabet=" .,:;!?-\n*()"), st.text(alphabet=" .,;!?\n*"))
def test_a_lone_label_is_found_whatever_signs_stand_around_it(
    label: str, before: str, after: str
) -> None:
    assert parse_answer(before + label.upper() + after, LABELS) == label


class Parrot:
    """A Speaker that says what it is told."""

    labels = LABELS

    def __init__(self, answers: Sequence[str], scores: Sequence[Sequence[float]]) -> None:
        self._answers, self._scores = list(answers), list(scores)

    def read_out(self, cases: Sequence[Case]) -> tuple[list[str], Any]:
        answers, self._answers = self._answers[: len(cases)], self._answers[len(cases) :]
        scores, self._scores = self._scores[: len(cases)], self._scores[len(cases) :]
        return answers, np.array(scores, np.float32)


def test_none_counts_as_wrong_and_the_gap_is_what_the_read_out_costs() -> None:
    data = open_data("synthetic:20:1")
    truth = [row.label for row in data.rows]
    answers = [*truth[:10], *["I cannot tell."] * 6, *["Acquired or Inherited."] * 4]
    scores = [[float(label == name) for name in LABELS] for label in truth]
    report = measure_baseline(Parrot(answers, scores), data)
    assert report["free_text"]["accuracy"]["correct"] == 10
    assert report["none"]["correct"] == 10
    assert report["label_set"]["accuracy"]["value"] == 1.0
    gap = report["read_out_gap"]
    assert (gap["value"], gap["only_a"], gap["only_b"]) == (0.5, 10, 0)
    assert gap["interval_95"][0] > 0
    assert [a["named"] for a in report["answers"]] == [*truth[:10], *[None] * 10]
    assert [a["scored"] for a in report["answers"]] == truth
    assert json.loads(json.dumps(report)) == report


def test_data_of_other_labels_are_refused(tiny_checkpoint: Path) -> None:
    speaker = open_speaker(tiny_checkpoint)
    speaker.labels = ("healthy", "glaucoma")
    with pytest.raises(DataError, match="found the labels Acquired, Inherited"):
        measure_baseline(speaker, open_data("synthetic:20:1"))


def whole_forwards(checkpoint: Checkpoint, case: Case) -> list[int]:
    """Greedy tokens of one case without a cache: a whole forward for each."""
    model, encoder = checkpoint.model, checkpoint.prompt_encoder()
    tower, unet = (torch.from_numpy(p)[None] for p in to_pixels(case.image, model.config.image))
    end = encoder.label_ids[0][-1]
    tokens: list[int] = []
    with torch.no_grad():
        states = model.encode_image(tower, unet).states
        body = (*encoder.encode(case.text).ids, *encoder.suffix_ids)
        encoder.suffix_ids = ()
        while len(tokens) < MAX_NEW_TOKENS and end not in tokens:
            packed = encoder.pack([EncodedText((*body, *tokens), 0)])
            prompt = PromptTensors.from_packed(packed, encoder, "cpu")
            hidden, _ = model.decode_text(states, prompt)
            last = hidden[0, -1 - encoder.label_rows]
            tokens.append(int(model.backbone.lm_head(last).argmax()))
    return tokens


def test_greedy_decoding_with_a_cache_is_that_of_whole_forwards(tiny_checkpoint: Path) -> None:
    """In a batch of texts of several lengths, and photographs that differ."""
    loaded = load_checkpoint(tiny_checkpoint)
    tokenizer = Tokenizer.from_str(loaded.tokenizer_json)
    with torch.no_grad():  # far from one another, or a wrong position would change no token
        for parameter in loaded.model.backbone.model.language_model.layers.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    data = open_data("synthetic:3:1")
    cases = [data[i] for i in range(3)]
    answers, _ = CheckpointSpeaker(loaded.model, loaded.tokenizer_json).read_out(cases)
    expected = [whole_forwards(loaded, case) for case in cases]
    end = loaded.prompt_encoder().label_ids[0][-1]
    assert answers == [tokenizer.decode([t for t in ids if t != end]).strip() for ids in expected]
    assert len(set(answers)) > 1


def test_a_checkpoints_label_scores_are_those_of_evaluate(tiny_checkpoint: Path) -> None:
    data = open_data("synthetic:3:1")
    _, scores = open_speaker(tiny_checkpoint).read_out([data[i] for i in range(3)])
    scorer = CheckpointScorer.open(tiny_checkpoint)
    cases = PixelSet(data, scorer.image, ()).read(range(3))
    expected = scorer.score(*stack_pixels(cases), [case.row.text for case in cases])
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers writes it: a random four-tile Mllama of nano size."""
    folder = tmp_path_factory.mktemp("llama") / "Llama-nano"
    torch.manual_seed(0)
    vision = dict(NANO.vision) | {"max_num_tiles": 4}
    vision["supported_aspect_ratios"] = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1]]
    vision["supported_aspect_ratios"] += [[4, 1]]
    config = MllamaConfig(
        text_config=dict(NANO.text), vision_config=vision, image_token_index=640, dtype="float32"
    )
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "gate" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    image = MllamaImageProcessor(
        size={"height": 48, "width": 48},
        image_mean=NANO.image.tower_mean,
        image_std=NANO.image.tower_std,
        max_image_tiles=4,
    )
    image.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(load_tokenizer(NANO), encoding="utf-8")
    return folder


def processed(llama: Path, case: Case) -> tuple[Any, Any]:
    """transformers' own processor on the same words, and its model."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(llama / "tokenizer.json"), bos_token="<|begin_of_text|>"
    )
    processor = MllamaProcessor(MllamaImageProcessor.from_pretrained(llama), tokenizer)
    prompt = NANO.prompt
    text = f"{prompt.prefix}{prompt.image_token}{case.text}{prompt.suffix}"
    inputs = processor(images=case.image, text=text, add_special_tokens=False, return_tensors="pt")
    model = MllamaForConditionalGeneration.from_pretrained(llama).eval()
    return inputs, model


@pytest.mark.parametrize("shape", [(128, 128), (100, 190)])
def test_the_stock_model_answers_as_with_transformers_own_processor(
    llama: Path, shape: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    case = Case("a.png", "Acquired", "A woman of 46 years.", "p", "s", image, {})
    inputs, model = processed(llama, case)
    with torch.no_grad():
        produced = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=1, pad_token_id=1
        )
    tokenizer = Tokenizer.from_str((llama / "tokenizer.json").read_text())
    new = produced[0, inputs["input_ids"].shape[1] :].tolist()
    answers, _ = LlamaSpeaker(llama).read_out([case])
    assert answers == [tokenizer.decode(new).strip()]
    assert answers != [""]


def test_the_stock_models_label_scores_are_teacher_forced(llama: Path) -> None:
    labels = ("Acquired", "Acquired late", "Inherited")  # of several lengths
    text = "A woman of 46 years. <|image|><|eot_id|>"  # a text's special tokens are characters
    image = open_data("synthetic:3:1")[0].image
    case = Case("a.png", "Acquired", text, "p", "s", image, {})
    speaker = LlamaSpeaker(llama, labels)
    _, scores = speaker.read_out([case])
    inputs, model = processed(llama, dataclasses.replace(case, text="A woman."))
    prompt = set_task(NANO, labels, NANO.mask_kinds).prompt
    encoder = PromptEncoder(load_tokenizer(NANO), prompt, labels)
    assert encoder.image_id not in encoder.encode(text).ids
    start = [*encoder.prefix_ids, encoder.image_id, *encoder.encode(case.text).ids]
    start += encoder.suffix_ids
    expected = []
    for label in encoder.label_ids:
        ids = torch.tensor([[*start, *label]])
        mask = torch.zeros(1, ids.shape[1], 1, 4, dtype=torch.long)
        mask[:, len(encoder.prefix_ids) :, :, : int(inputs["aspect_ratio_mask"].sum())] = 1
        picture = {k: inputs[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        with torch.no_grad():
            logits = model(input_ids=ids, cross_attention_mask=mask, **picture).logits[0]
        rows = logits[len(start) - 1 : -1, list(encoder.label_vocabulary)].log_softmax(dim=-1)
        columns = [encoder.label_vocabulary.index(token) for token in label]
        expected.append(float(rows[range(len(label)), columns].sum()))
    np.testing.assert_allclose(scores[0], expected, rtol=0, atol=1e-4)


def test_a_directory_that_lacks_a_tensor_is_refused(llama: Path, tmp_path: Path) -> None:
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_speaker(tmp_path)


def test_what_cannot_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint, a Hugging Face directory"):
        open_speaker(tmp_path)


def test_a_checkpoint_keeps_its_own_labels(tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="a checkpoint has its own"):
        open_speaker(tiny_checkpoint, LABELS)


@pytest.mark.parametrize("model", ["checkpoint", "directory"])
def test_the_command_ends_with_one_json_document(
    model: str, tiny_checkpoint: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint if model == "checkpoint" else llama
    assert main(["baseline", str(folder), "synthetic:4:1", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["n"] == 4
    assert report["model"] == str(folder)
    assert any(line.startswith("free text, None") for line in table)


def test_the_command_refuses_a_part_without_a_split(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["baseline", str(tiny_checkpoint), "synthetic:4:1", "--part", "test"]) == 2
    assert "found no --split" in capsys.readouterr().err

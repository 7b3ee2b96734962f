"""mdf_training.model: label scores equal plain teacher forcing, and both roads are used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mdf_sdk.prompt import PromptEncoder
from mdf_training.backbone import CrossAttentionFeed
from mdf_training.checkpoint import Checkpoint, load_checkpoint
from mdf_training.model import MDFModel, PromptTensors, build_model

TEXTS = [
    "A man.",
    "A 61-year-old woman with diabetes, blurred vision <|eot_id|> for two years.",
    "Night blindness",
]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint)


def pixels(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 3, 48, 48, generator=generator),
        torch.randn(count, 3, 128, 128, generator=generator),
    )


def plain_score(
    model: MDFModel, encoder: PromptEncoder, states: dict[int, Tensor], text: str
) -> list[float]:
    """Score each label by a forward of its own: no packing, no padding, a causal mask."""
    prompt = [*encoder.prefix_ids, encoder.image_id, *encoder.encode(text).ids, *encoder.suffix_ids]
    columns = {token: i for i, token in enumerate(encoder.label_vocabulary)}
    scores = []
    for label in encoder.label_ids:
        ids = torch.tensor([[*prompt, *label]])
        sees = (torch.arange(ids.shape[1]) >= len(encoder.prefix_ids)).float()[None, :, None]
        hidden = model.backbone.model.language_model(
            input_ids=ids,
            cross_attention_states=CrossAttentionFeed(states, sees),
            full_text_row_masked_out_mask=sees[:, None],
            use_cache=False,
        ).last_hidden_state
        logits = model.backbone.lm_head(hidden)[0, len(prompt) - 1 : -1]
        log_probs = logits[:, list(encoder.label_vocabulary)].log_softmax(dim=-1)
        scores.append(sum(log_probs[i, columns[token]].item() for i, token in enumerate(label)))
    return scores


@pytest.mark.parametrize("count", [2, 12])
@torch.no_grad()
def test_packed_label_scores_equal_plain_teacher_forcing(
    checkpoint: Checkpoint, twelve_labels: tuple[str, ...], count: int
) -> None:
    labels = twelve_labels[:count]
    encoder = PromptEncoder(checkpoint.tokenizer_json, checkpoint.config.prompt, labels)
    lengths = {len(ids) for ids in encoder.label_ids}
    if count == 12:
        assert min(lengths) == 2  # one token and its end token
        assert max(lengths) > 4
        first = [ids[0] for ids in encoder.label_ids]
        assert len(set(first)) < len(first)  # some share their first token
    model = checkpoint.model
    packed = encoder.pack([encoder.encode(text) for text in TEXTS])
    prompt = PromptTensors.from_packed(packed, encoder, "cpu")
    output = model(*pixels(0, 3), prompt)
    states = model.encode_image(*pixels(0, 3)).states
    for row, text in enumerate(TEXTS):
        own = {layer: s[row : row + 1] for layer, s in states.items()}
        expected = plain_score(model, encoder, own, text)
        np.testing.assert_allclose(output.scores[row], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_labels_exhaust_the_probability_of_their_own_tokens(checkpoint: Checkpoint) -> None:
    """One token and an end token each: scores are log-probabilities of different answers."""
    encoder = checkpoint.prompt_encoder()
    prompt = PromptTensors.from_packed(encoder.pack([encoder.encode("A man.")]), encoder, "cpu")
    scores = checkpoint.model(*pixels(1, 1), prompt).scores
    assert 0 < scores.exp().sum() <= 1


@torch.no_grad()
def test_a_closed_fusion_gate_leaves_the_vision_states_as_they_were() -> None:
    torch.manual_seed(0)
    model = build_model("nano").eval()
    image = model.encode_image(*pixels(2, 1))
    for layer in model.config.fusion.layers:
        assert torch.equal(image.states[layer], image.vision_states)


@torch.no_grad()
def test_an_open_fusion_gate_carries_the_unet_into_its_own_layer(checkpoint: Checkpoint) -> None:
    tower, unet = pixels(3, 2)
    model = checkpoint.model
    first = model.encode_image(tower, unet).states
    second = model.encode_image(tower, unet.flip(0)).states
    for layer in model.config.fusion.layers:
        assert (first[layer] - second[layer]).abs().max() > 1e-3
    shallow, deep = model.config.fusion.layers[0], model.config.fusion.layers[-1]
    assert not torch.equal(first[shallow], first[deep])


@torch.no_grad()
def test_the_text_reaches_the_mask_through_film(checkpoint: Checkpoint) -> None:
    encoder = checkpoint.prompt_encoder()
    masks = []
    for text in TEXTS[:2]:
        prompt = PromptTensors.from_packed(encoder.pack([encoder.encode(text)]), encoder, "cpu")
        masks.append(checkpoint.model(*pixels(4, 1), prompt).mask_logits)
    assert masks[0].shape == (1, 3, 128, 128)
    assert (masks[0] - masks[1]).abs().max() > 1e-4


def test_every_parameter_that_can_learn_gets_a_gradient(checkpoint: Checkpoint) -> None:
    model, encoder = checkpoint.model, checkpoint.prompt_encoder()
    prompt = PromptTensors.from_packed(encoder.pack([encoder.encode(TEXTS[1])]), encoder, "cpu")
    output = model(*pixels(5, 1), prompt)
    (output.scores.sum() + output.mask_logits.mean()).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad(set_to_none=True)
    assert dead == []

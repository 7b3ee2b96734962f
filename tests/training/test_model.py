"""mdf_training.model: label scores equal plain teacher forcing, and both roads are used."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdf_sdk.prompt import PromptEncoder
from mdf_training.backbone import CrossAttentionFeed
from mdf_training.checkpoint import Checkpoint, load_checkpoint
from mdf_training.model import ImageFeatures, MDFModel, ModelOutput, PromptTensors, build_model
from mdf_training.recipes import PARTS

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


def make_variant(checkpoint: Checkpoint, **fields: Any) -> MDFModel:
    """The checkpoint's weights in a model with another fusion."""
    fusion = dataclasses.replace(checkpoint.config.fusion, **fields)
    model = build_model(dataclasses.replace(checkpoint.config, fusion=fusion)).eval()
    model.load_state_dict(checkpoint.model.state_dict())  # every variant has the same tensors
    return model


def run_variant(checkpoint: Checkpoint, **fields: Any) -> tuple[ImageFeatures, ModelOutput]:
    model, encoder = make_variant(checkpoint, **fields), checkpoint.prompt_encoder()
    prompt = PromptTensors.from_packed(encoder.pack([encoder.encode(TEXTS[1])]), encoder, "cpu")
    inputs = pixels(6, 1)
    return model.encode_image(*inputs), model(*inputs, prompt)


@torch.no_grad()
def test_a_depth_that_is_not_fused_leaves_its_layer_the_vision_states(
    checkpoint: Checkpoint,
) -> None:
    image, _ = run_variant(checkpoint, depths=(1,))
    whole, _ = run_variant(checkpoint)
    for depth, layer in enumerate(checkpoint.config.fusion.layers):
        expected = whole.states[layer] if depth == 1 else image.vision_states
        assert torch.equal(image.states[layer], expected)


@torch.no_grad()
def test_without_film_the_text_does_not_reach_the_mask(checkpoint: Checkpoint) -> None:
    model, encoder = make_variant(checkpoint, film=False), checkpoint.prompt_encoder()
    masks = []
    for text in TEXTS[:2]:
        prompt = PromptTensors.from_packed(encoder.pack([encoder.encode(text)]), encoder, "cpu")
        masks.append(model(*pixels(4, 1), prompt).mask_logits)
    assert torch.equal(masks[0], masks[1])


@torch.no_grad()
def test_without_any_fusion_the_scores_ignore_the_u_net_and_the_mask_the_tower(
    checkpoint: Checkpoint,
) -> None:
    model, encoder = make_variant(checkpoint, depths=(), film=False), checkpoint.prompt_encoder()
    prompt = PromptTensors.from_packed(encoder.pack([encoder.encode(TEXTS[1])]), encoder, "cpu")
    (tower, unet), (other_tower, other_unet) = pixels(7, 1), pixels(8, 1)
    first = model(tower, unet, prompt)
    assert torch.equal(model(tower, other_unet, prompt).scores, first.scores)
    assert torch.equal(model(other_tower, unet, prompt).mask_logits, first.mask_logits)
    assert not torch.equal(model(other_tower, unet, prompt).scores, first.scores)


@torch.no_grad()
def test_a_skip_that_asks_goes_on_with_its_patches(checkpoint: Checkpoint) -> None:
    image, output = run_variant(checkpoint, query="skip", depths=(0, 2))
    _, vision_asks = run_variant(checkpoint, depths=(0, 2))
    layers, grid = checkpoint.config.fusion.layers, checkpoint.config.fusion.grid
    lengths = [image.states[layer].shape[1] for layer in layers]
    vision = image.vision_states.shape[1]
    assert lengths == [grid * grid, vision, grid * grid, vision]
    skip = dataclasses.replace(checkpoint.config.fusion, query="skip", depths=(0, 2))
    config = dataclasses.replace(checkpoint.config, fusion=skip)
    assert dict(zip(layers, lengths, strict=True)) == config.state_rows()
    assert not torch.allclose(output.scores, vision_asks.scores, atol=1e-4)


@torch.no_grad()
def test_a_skip_that_asks_is_answered_by_the_vision_states(checkpoint: Checkpoint) -> None:
    model = make_variant(checkpoint, query="skip")
    vision_states, skips = model.encode_vision(pixels(9, 2)[0]), model.encode_unet(pixels(9, 1)[1])
    same_skip = skips[0][0].expand(2, -1, -1, -1)
    fused = model.fusion[0](vision_states, same_skip)
    assert not torch.allclose(fused[0], fused[1], atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "silent"),
    [
        ({"film": False}, ("film.",)),
        ({"depths": (3,)}, ("fusion.0.", "fusion.1.", "fusion.2.")),
        ({"alpha": 0.0}, ("fusion.",)),
        ({"query": "skip"}, ()),
    ],
    ids=str,
)
def test_what_a_variant_leaves_out_gets_no_gradient(
    checkpoint: Checkpoint, fields: dict[str, Any], silent: tuple[str, ...]
) -> None:
    model, encoder = make_variant(checkpoint, **fields), checkpoint.prompt_encoder()
    prompt = PromptTensors.from_packed(encoder.pack([encoder.encode(TEXTS[1])]), encoder, "cpu")
    output = model(*pixels(5, 1), prompt)
    (output.scores.sum() + output.mask_logits.mean()).backward()
    for name, parameter in model.named_parameters():
        if silent and name.startswith(silent):
            assert not parameter.requires_grad
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_every_parameter_belongs_to_one_part(checkpoint: Checkpoint) -> None:
    parts = checkpoint.model.parts()
    assert tuple(parts) == PARTS
    owned = [id(p) for modules in parts.values() for m in modules for p in m.parameters()]
    assert sorted(owned) == sorted(id(p) for p in checkpoint.model.parameters())

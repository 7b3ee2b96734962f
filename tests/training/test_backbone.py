"""mdf_training.backbone: transformers' Mllama, each cross-attention layer with its own states."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration

from mdf_sdk.errors import CheckpointError
from mdf_training.backbone import (
    TILE_TABLES,
    CrossAttentionFeed,
    build_backbone,
    graft_llama,
    load_smollm2,
    slice_tile_table,
)
from mdf_training.config import load_preset
from mdf_training.model import build_model


def test_llama_preset_has_transformers_parameters_but_for_the_tile_tables() -> None:
    config = load_preset("llama-3.2-11b")
    with torch.device("meta"):
        ours = build_model("llama-3.2-11b").backbone
        stock = MllamaForConditionalGeneration(
            # Llama 3.2 11B Vision's own config.json: transformers' defaults at 560 px
            MllamaConfig(
                vision_config={"image_size": 560},
                text_config={"rope_parameters": dict(config.text["rope_parameters"])},
            )
        )
    found = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    expected = {name: tuple(p.shape) for name, p in stock.named_parameters()}
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == set(TILE_TABLES)
    assert sum(p.numel() for p in stock.parameters()) == 10_670_220_835  # as the published weights


def test_sliced_tables_are_the_one_tile_models_shapes_and_the_square_ratios_values() -> None:
    models = {}
    for tiles in (1, 4):
        vision = {"hidden_size": 32, "image_size": 28, "patch_size": 14, "max_num_tiles": tiles}
        vision |= {"num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
        vision |= {
            "intermediate_size": 32,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        }
        if tiles == 1:
            vision["supported_aspect_ratios"] = [[1, 1]]
        text = {
            "vocab_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        text |= {"num_key_value_heads": 1, "intermediate_size": 32, "cross_attention_layers": []}
        text |= {"pad_token_id": 0}
        model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
        models[tiles] = model.eval()
    with torch.no_grad():
        for name, parameter in models[4].named_parameters():
            if "tile" in name or name.endswith("gate"):
                parameter.normal_()
    state = models[4].state_dict()
    sliced = {name: slice_tile_table(state[name], tiles=4) for name in TILE_TABLES}
    models[1].load_state_dict(state | sliced)

    one = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        embedded = []
        for tiles in (1, 4):
            vision = models[tiles].model.vision_model
            patches = torch.randn(1, tiles, 5, 32, generator=torch.Generator().manual_seed(tiles))
            patches[:, 0] = torch.arange(160.0).view(5, 32) / 160
            x = vision.pre_tile_positional_embedding(patches, one)
            x = vision.gated_positional_embedding(x, one)
            embedded.append(vision.post_tile_positional_embedding(x, one)[:, 0])
    torch.testing.assert_close(embedded[0], embedded[1], rtol=0, atol=0)


def test_a_feed_of_equal_states_gives_what_stock_mllama_gives() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(load_preset("nano")).eval()
    ids = torch.randint(0, 600, (2, 9))
    states = torch.randn(2, 37, 128)
    text = backbone.model.language_model
    layers = text.cross_attention_layers
    with torch.no_grad():
        stock = text(
            input_ids=ids, cross_attention_states=states, use_cache=False
        ).last_hidden_state
        feed = CrossAttentionFeed(dict.fromkeys(layers, states), torch.ones(1, 9, 1))
        fed = text(input_ids=ids, cross_attention_states=feed, use_cache=False).last_hidden_state
    assert torch.equal(stock, fed)


def test_the_vision_tower_is_bidirectional_and_cross_attention_is_not_causal() -> None:
    """The last vision token reaches the first text row; transformers' SDPA path would mask it."""
    torch.manual_seed(0)
    backbone = build_backbone(load_preset("nano")).eval()
    text = backbone.model.language_model
    states = torch.randn(1, 37, 128)
    changed = states.clone()
    changed[:, -1] += 10
    with torch.no_grad():
        first, second = (
            text(
                input_ids=torch.tensor([[5, 6, 7]]),
                cross_attention_states=CrossAttentionFeed(
                    dict.fromkeys(text.cross_attention_layers, s), torch.ones(1, 3, 1)
                ),
                use_cache=False,
            ).last_hidden_state
            for s in (states, changed)
        )
    assert (first[:, 0] - second[:, 0]).abs().max() > 1e-4


def test_stock_mllama_lets_rows_before_the_image_see_it_and_ours_does_not() -> None:
    """Why FusedCrossAttention multiplies its output: transformers opens the masked rows instead."""
    torch.manual_seed(0)
    backbone = build_backbone(load_preset("nano")).eval()
    text = backbone.model.language_model
    sees = torch.tensor([0.0, 0, 1, 1])[None, :, None]

    def hidden(states: torch.Tensor, feed: bool) -> torch.Tensor:
        layers = text.cross_attention_layers
        mask = torch.zeros(
            1, 1, 4, 37
        )  # what transformers' own mask preparation gives for such rows
        with torch.no_grad():
            return text(
                input_ids=torch.tensor([[5, 6, 7, 8]]),
                cross_attention_states=CrossAttentionFeed(dict.fromkeys(layers, states), sees)
                if feed
                else states,
                cross_attention_mask=None if feed else mask,
                full_text_row_masked_out_mask=sees[:, None],
                use_cache=False,
            ).last_hidden_state

    one, other = torch.randn(1, 37, 128), torch.randn(1, 37, 128)
    assert not torch.equal(hidden(one, feed=False)[:, :2], hidden(other, feed=False)[:, :2])
    assert torch.equal(hidden(one, feed=True)[:, :2], hidden(other, feed=True)[:, :2])
    assert not torch.equal(hidden(one, feed=True)[:, 2:], hidden(other, feed=True)[:, 2:])


@pytest.mark.slow
def test_smol_with_closed_gates_gives_exactly_smollm2s_text_logits() -> None:
    llama = load_smollm2().eval()
    model = build_model("smol-135m").eval()
    text = model.backbone.model.language_model
    ids = torch.randint(0, 49152, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = llama(ids, use_cache=False).logits
        states = torch.randn(2, 257, 576)
        feed = CrossAttentionFeed(
            dict.fromkeys(text.cross_attention_layers, states), torch.ones(1, 24, 1)
        )
        hidden = text(input_ids=ids, cross_attention_states=feed, use_cache=False).last_hidden_state
        found = model.backbone.lm_head(hidden)
    assert expected.std() > 1  # real weights, not a constant
    assert torch.equal(found, expected)


def test_grafting_a_llama_of_another_depth_names_both_depths() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=640, hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    )
    with pytest.raises(CheckpointError, match="found 3 layers, expected 4"):
        graft_llama(build_backbone(load_preset("nano")), llama)

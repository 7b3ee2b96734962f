"""mdf_benchmarks.latency.peers: what the rivals compute is what a user's own call computes."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdf_benchmarks.inputs import DECODED_PX, photograph
from mdf_benchmarks.latency.peer_process import NotAvailableError, PeerOptions
from mdf_benchmarks.latency.peers import STOCK_TILES, FourTiles, Fused, Int4, Nf4, OneTile, Stock
from mdf_training.checkpoint import load_checkpoint

TEXT = "Blurred vision for two years."


@pytest.fixture
def options(tiny_engine: Path, tiny_checkpoint: Path) -> PeerOptions:
    return PeerOptions(tiny_engine, tiny_checkpoint, "cpu", 1, (TEXT, "Another."))


def recorded(peer: Stock) -> list[torch.Tensor]:
    """The logits of each forward from now on."""
    logits: list[torch.Tensor] = []
    peer.mllama.register_forward_hook(lambda *a: logits.append(a[-1].logits.float()))
    return logits


@pytest.mark.parametrize(("kind", "tiles"), [(OneTile, 1), (FourTiles, STOCK_TILES)])
def test_looking_and_answering_is_one_forward_of_the_stock_model(
    options: PeerOptions, kind: Callable[[PeerOptions], Stock], tiles: int
) -> None:
    torch.manual_seed(0)
    peer = kind(options)
    logits = recorded(peer)
    inputs = peer.prepare(photograph(40))  # smaller than a tile, as 512 px are at 11B
    assert inputs.pixel_values.shape == (1, 1, tiles, 3, 48, 48)
    assert inputs.aspect_ratio_mask.tolist() == [[[1] + [0] * (tiles - 1)]]  # the rest is padding
    peer.look(inputs)
    peer.answer(TEXT)
    ids = peer.token_ids(TEXT)
    image_at = ids[0].tolist().index(peer.encoder.image_id)
    sees = (torch.arange(ids.shape[1]) >= image_at).long()[None, :, None, None]
    with torch.inference_mode():
        whole = peer.mllama(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs.pixel_values.bfloat16(),
            aspect_ratio_ids=inputs.aspect_ratio_ids,
            aspect_ratio_mask=inputs.aspect_ratio_mask,
            cross_attention_mask=sees * inputs.aspect_ratio_mask[:, None],
        ).logits[:, -1:]
    assert logits[0].isfinite().all()
    torch.testing.assert_close(logits[0], whole.float())


def test_a_stock_model_sees_its_photograph(options: PeerOptions) -> None:
    peer = OneTile(options)
    logits = recorded(peer)
    for picture in (photograph(DECODED_PX), 255 - photograph(DECODED_PX)):
        peer.look(peer.prepare(picture))
        peer.answer(TEXT)
    assert not torch.equal(*logits)


def test_the_checkpoint_in_pytorch_keeps_what_depends_on_the_photograph(
    options: PeerOptions, tiny_checkpoint: Path
) -> None:
    peer = Fused(replace(options, device="cuda"))  # which it leaves to others
    assert peer.peak_device_bytes() is None
    peer.look(peer.prepare(photograph(DECODED_PX)))
    kept = peer.features
    peer.answer(TEXT)
    assert peer.features is kept
    model = load_checkpoint(tiny_checkpoint).model
    with torch.inference_mode():
        expected = model.encode_image(*peer.prepare(photograph(DECODED_PX)))
    torch.testing.assert_close(kept.vision_states, expected.vision_states)


def test_a_linear_is_replaced_in_the_language_model_alone_once_it_has_its_weight(
    options: PeerOptions,
) -> None:
    seen: list[torch.nn.Linear] = []

    def replace(linear: torch.nn.Linear) -> torch.nn.Module:
        assert float(linear.weight.std()) == pytest.approx(0.02, rel=0.1)
        seen.append(linear)
        return linear

    peer = Stock(options, tiles=1, replace=replace)
    linears = [m for m in peer.language.modules() if isinstance(m, torch.nn.Linear)]
    assert set(linears) == set(seen)
    assert len(seen) == 8 * 7  # four projections and three of the MLP in each of nano's layers
    assert not any(parameter.is_meta for parameter in peer.mllama.parameters())


@pytest.mark.parametrize(("kind", "package"), [(Nf4, "bitsandbytes"), (Int4, "torchao")])
def test_a_peer_whose_package_is_missing_is_not_available(
    options: PeerOptions,
    monkeypatch: pytest.MonkeyPatch,
    kind: Callable[[PeerOptions], Stock],
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotAvailableError, match=f"pip install {package}"):
        kind(options)


def test_a_card_that_is_not_there_is_told(options: PeerOptions) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    on_card = PeerOptions(options.engine, None, "cuda", None, options.texts)
    with pytest.raises(NotAvailableError, match="found no card"):
        OneTile(on_card)

"""mdf_export.gptq: rounding that knows the inputs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mdf_export.gptq
from mdf_export.gptq import Hessian, gptq
from mdf_export.quantize import (
    W8A8_BITS,
    QuantizedWeight,
    as_w8a8,
    round_to_nearest,
    search_scales,
    to_w8a8,
)
from mdf_sdk.errors import CheckpointError

DATA = Path(__file__).parent / "data"
METHODS = [(False, False), (False, True), (True, False), (True, True)]  # act_order, search
N, K = 32, 256


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """The weight (32, 256) that data/make_gptq_fixtures.py gave the library."""
    return torch.from_numpy(np.random.RandomState(7).standard_normal((N, K)).astype(np.float32))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """The inputs (1024, 256), correlated, of skewed energy, that it gave with it."""
    random = np.random.RandomState(7)
    random.standard_normal((N, K))
    energy = np.exp(random.standard_normal(K))
    x = random.standard_normal((1024, K)) @ random.standard_normal((K, K)) / 16 * energy
    return torch.from_numpy(x.astype(np.float32))


@pytest.fixture(scope="module")
def hessian(inputs: Tensor) -> Tensor:
    moments = Hessian(K)
    moments.add(inputs)
    return moments.mean()


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T), the mean squared error of the outputs over the calibration set."""
    error = weight - rounded
    return float(((error @ hessian) * error).sum())


def library_result(name: str) -> tuple[Tensor, Tensor]:
    """Codes (K, N) and scales (K / group, N) that GPTQModel 7.7 found."""
    with np.load(DATA / "gptq_plain_linears.npz") as recorded:
        return tuple(torch.from_numpy(recorded[f"{name}/{part}"]) for part in ("codes", "scales"))


def library_scales(groups: Tensor, bits: int) -> Tensor:
    """GPTQModel's rule: the largest magnitude is 7.5 of 4 bits."""
    return groups.abs().amax(-1) * 2 / (2**bits - 1)


@pytest.mark.parametrize(("name", "block_size"), [("128", 128), ("32_act_order", 32)])
def test_given_its_scale_rule_the_codes_are_a_librarys(
    name: str,
    block_size: int,
    weight: Tensor,
    hessian: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mdf_export.gptq, "widest_scales", library_scales)
    act_order = name.endswith("act_order")
    ours = gptq(weight, hessian, 4, block_size, act_order=act_order, search=False)
    codes, scales = library_result(name)
    torch.testing.assert_close(ours.scales, scales, rtol=1e-3, atol=0)
    assert (ours.codes == codes).float().mean() > 0.99


@pytest.mark.parametrize(("name", "block_size"), [("128", 128), ("32", 32), ("32_act_order", 32)])
def test_the_loss_is_at_most_a_librarys(
    name: str, block_size: int, weight: Tensor, hessian: Tensor
) -> None:
    act_order = name.endswith("act_order")
    theirs = loss(weight, QuantizedWeight(*library_result(name), 4).dequantize(), hessian)
    plain, searched = (
        loss(
            weight,
            gptq(weight, hessian, 4, block_size, act_order=act_order, search=s).dequantize(),
            hessian,
        )
        for s in (False, True)
    )
    assert plain < 1.05 * theirs
    assert searched < 0.9 * theirs


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize(("act_order", "search"), METHODS)
def test_the_loss_is_well_below_round_to_nearests(
    bits: int, block_size: int, act_order: bool, search: bool, weight: Tensor, hessian: Tensor
) -> None:
    nearest = round_to_nearest(weight, bits, block_size).dequantize()
    ours = gptq(weight, hessian, bits, block_size, act_order=act_order, search=search)
    assert loss(weight, ours.dequantize(), hessian) < 0.8 * loss(weight, nearest, hessian)


@pytest.mark.parametrize("search", [False, True])
def test_act_order_pays_where_few_features_carry_the_energy(
    search: bool, weight: Tensor, hessian: Tensor
) -> None:
    in_order, by_energy = (
        gptq(weight, hessian, 4, 32, act_order=act_order, search=search).dequantize()
        for act_order in (False, True)
    )
    assert loss(weight, by_energy, hessian) < 0.95 * loss(weight, in_order, hessian)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_search_lowers_the_loss(act_order: bool, weight: Tensor, hessian: Tensor) -> None:
    widest, searched = (
        gptq(weight, hessian, 4, 64, act_order=act_order, search=search).dequantize()
        for search in (False, True)
    )
    assert loss(weight, searched, hessian) < 0.95 * loss(weight, widest, hessian)


def test_the_rounding_carries_over_to_inputs_that_it_never_saw(
    weight: Tensor, inputs: Tensor
) -> None:
    seen, unseen = Hessian(K), Hessian(K)
    seen.add(inputs[:512])
    unseen.add(inputs[512:])
    ours = gptq(weight, seen.mean(), 4, 32, act_order=True, search=True).dequantize()
    nearest = round_to_nearest(weight, 4, 32).dequantize()
    assert loss(weight, ours, unseen.mean()) < 0.5 * loss(weight, nearest, unseen.mean())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("search", [False, True])
def test_uncorrelated_inputs_of_one_energy_leave_round_to_nearest(
    act_order: bool, search: bool, weight: Tensor
) -> None:
    ours = gptq(weight, 3 * torch.eye(K), 4, 32, act_order=act_order, search=search)
    nearest = round_to_nearest(weight, 4, 32, search=search)
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(ours.scales, nearest.scales)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_search_weighs_uncorrelated_features_by_their_energy(
    act_order: bool, weight: Tensor
) -> None:
    energy = torch.from_numpy(np.random.RandomState(2).exponential(size=K) ** 3).float()
    ours = gptq(weight, torch.diag(energy), 4, 32, act_order=act_order, search=True)
    damped = (energy + 0.01 * energy.mean()).reshape(-1, 32)
    expected = search_scales(weight.reshape(N, -1, 32), 4, damped)
    assert (expected == ours.scales.T).float().mean() > 0.99


def test_it_is_the_papers_algorithm(weight: Tensor, hessian: Tensor) -> None:
    """Frantar et al., section 3, steps 1 to 3, in double precision, one column at a time."""
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K)).double()
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, rounded = weight.double(), torch.zeros(N, K, dtype=torch.float64)
    for i in range(K):
        if i % 64 == 0:
            scales = mdf_export.gptq.widest_scales(left[:, i : i + 64].float(), 4).double()
        rounded[:, i] = (left[:, i] / scales).round().clamp(-8, 7) * scales
        error = (left[:, i] - rounded[:, i]) / inverse[i, i]
        left = left - error[:, None] * inverse[i] * (torch.arange(K) >= i)
    ours = gptq(weight, hessian, 4, 64, act_order=False, search=False).dequantize()
    assert (ours == rounded.float()).float().mean() > 0.99


@pytest.mark.parametrize(("act_order", "search"), METHODS)
def test_codes_and_scales_are_what_an_engine_can_store(
    act_order: bool, search: bool, weight: Tensor, hessian: Tensor
) -> None:
    ours = gptq(weight, hessian, 4, 32, act_order=act_order, search=search)
    assert ours.codes.dtype == torch.int8
    assert ours.codes.shape == (K, N)
    assert (ours.codes.min(), ours.codes.max()) == (-8, 7)
    assert ours.scales.shape == (K // 32, N)
    assert (ours.scales > 0).all()
    assert torch.equal(ours.scales.half().float(), ours.scales)
    assert ours.order is None


@pytest.mark.parametrize(("act_order", "search"), METHODS)
def test_outputs_do_not_touch_each_other(
    act_order: bool, search: bool, weight: Tensor, hessian: Tensor
) -> None:
    def rounded(rows: Tensor) -> QuantizedWeight:
        return gptq(rows, hessian, 4, 32, act_order=act_order, search=search)

    joined = rounded(weight)
    changed = rounded(torch.cat([weight[:16], 5 * weight[16:].flip(0)]))
    assert torch.equal(changed.codes[:, :16], joined.codes[:, :16])
    assert torch.equal(changed.scales[:, :16], joined.scales[:, :16])
    # Apart they are the same up to the order in which a product is summed.
    alone = rounded(weight[:16])
    assert (alone.codes == joined.codes[:, :16]).float().mean() > 0.99


def test_for_w8a8_the_loss_is_below_round_to_nearests_and_sums_fit_16_bits(
    weight: Tensor, hessian: Tensor
) -> None:
    found = as_w8a8(gptq(weight, hessian, W8A8_BITS, K, act_order=True, search=True))
    plain = to_w8a8(weight)
    losses = [loss(weight, (w.codes * w.scales).T, hessian) for w in (found, plain)]
    assert losses[0] < 0.5 * losses[1]
    # Of two products with an unsigned byte.
    assert 2 * 255 * int(found.codes.int().abs().max()) < 2**15


def test_a_feature_that_was_always_zero_is_rounded_plainly(weight: Tensor, inputs: Tensor) -> None:
    dead = torch.arange(K) % 7 == 3
    moments = Hessian(K)
    moments.add(inputs.masked_fill(dead, 0.0))
    ours = gptq(weight, moments.mean(), 8, 32, act_order=True, search=False).dequantize()
    nearest = round_to_nearest(weight, 8, 32).dequantize()
    assert torch.equal(ours[:, dead], nearest[:, dead])


def test_inputs_that_were_all_zero_leave_round_to_nearest(weight: Tensor) -> None:
    ours = gptq(weight, torch.zeros(K, K), 4, 32, act_order=False, search=False)
    assert torch.equal(ours.codes, round_to_nearest(weight, 4, 32).codes)


def test_fewer_rows_than_features_suffice(weight: Tensor, inputs: Tensor) -> None:
    moments = Hessian(K)
    moments.add(inputs[:3])
    ours = gptq(weight, moments.mean(), 4, 32, act_order=True, search=True).dequantize()
    nearest = round_to_nearest(weight, 4, 32).dequantize()
    assert loss(weight, ours, moments.mean()) < loss(weight, nearest, moments.mean())


def test_a_hessian_that_rounding_made_indefinite_is_damped_more(
    weight: Tensor, hessian: Tensor
) -> None:
    lowest = 0.2 * hessian.diagonal().mean()
    ours = gptq(weight, hessian - lowest * torch.eye(K), 4, 32, act_order=True, search=False)
    nearest = round_to_nearest(weight, 4, 32).dequantize()
    assert loss(weight, ours.dequantize(), hessian) < loss(weight, nearest, hessian)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_an_error(value: float, weight: Tensor) -> None:
    moments = Hessian(K)
    moments.add(torch.full((2, K), value))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        gptq(weight, moments.mean(), 4, 32, act_order=True, search=True)


def test_a_matrix_that_is_no_second_moment_is_an_error(weight: Tensor) -> None:
    with pytest.raises(CheckpointError, match="not positive semidefinite"):
        gptq(weight, -torch.eye(K) * 1e9 + 1, 4, 32, act_order=False, search=False)


@pytest.mark.parametrize("block_size", [8, 24, 192])
def test_a_block_size_beside_the_usual_ones_works(block_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 2 * 192, generator=generator)
    moments = Hessian(2 * 192)
    moments.add(torch.randn(99, 2 * 192, generator=generator).cumsum(1))
    ours = gptq(weight, moments.mean(), 4, block_size, act_order=False, search=True)
    nearest = round_to_nearest(weight, 4, block_size)
    assert ours.block_size == block_size
    assert loss(weight, ours.dequantize(), moments.mean()) < loss(
        weight, nearest.dequantize(), moments.mean()
    )


@pytest.mark.parametrize("convert", [torch.Tensor.half, torch.Tensor.bfloat16])
def test_a_weight_in_half_precision_is_rounded_in_float32(
    convert: Callable[[Tensor], Tensor], weight: Tensor, hessian: Tensor
) -> None:
    low = convert(weight)
    ours = gptq(low, hessian, 4, 32, act_order=True, search=True)
    same = gptq(low.float(), hessian, 4, 32, act_order=True, search=True)
    assert torch.equal(ours.codes, same.codes)


def test_a_weight_and_a_hessian_stay_as_they_were(weight: Tensor, hessian: Tensor) -> None:
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, 4, 32, act_order=False, search=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_the_hessian_is_the_mean_of_all_rows_however_they_come(inputs: Tensor) -> None:
    moments = Hessian(K)
    moments.add(inputs[:600].reshape(2, 300, K))
    moments.add(inputs[600:601, None].half())
    moments.add(inputs[601:].requires_grad_())
    expected = inputs.detach().double().T @ inputs.detach().double() / len(inputs)
    assert moments.rows == len(inputs)
    assert moments.mean().dtype == torch.float32
    assert not moments.mean().requires_grad
    torch.testing.assert_close(moments.mean().double(), expected, rtol=1e-3, atol=1e-3)


def test_many_rows_are_added_in_chunks(monkeypatch: pytest.MonkeyPatch, inputs: Tensor) -> None:
    whole, chunked = Hessian(K), Hessian(K)
    whole.add(inputs)
    monkeypatch.setattr(mdf_export.gptq, "CHUNK_ROWS", 100)
    chunked.add(inputs)
    torch.testing.assert_close(chunked.mean(), whole.mean())

"""mdf_export.quantize: symmetric integers by groups along K."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from mdf_export.quantize import (
    QuantizedWeight,
    pack_int4,
    round_to_nearest,
    search_scales,
    to_w8a8,
    unpack_int4,
    widest_scales,
)

BLOCK = 8
# A scale is rounded to float16, by at most 2 ** -11 of itself; the largest code is 8 of them.
HALF_SCALE = 0.5 + 8 * 2**-11


def float_arrays(largest: float) -> st.SearchStrategy[npt.NDArray[np.float32]]:
    """Weights (N, K), K one to five blocks."""
    elements = st.floats(-largest, largest, width=32, allow_subnormal=False)
    return array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=5).flatmap(
        lambda shape: arrays(np.float32, (shape[0], shape[1] * BLOCK), elements=elements)
    )


@given(float_arrays(1e3), st.sampled_from([4, 8]))
@example(np.full((1, BLOCK), 1e-5, np.float32), 8)  # its scale is below float16's normal numbers
def test_the_error_is_at_most_half_a_scale(array: npt.NDArray[np.float32], bits: int) -> None:
    weight = torch.from_numpy(array)
    quantized = round_to_nearest(weight, bits, BLOCK)
    error = (quantized.dequantize() - weight).abs().T
    largest = HALF_SCALE * quantized.scales
    assert (quantized.scales > 0).all()
    assert (error <= largest.repeat_interleave(BLOCK, dim=0)).all()


@given(float_arrays(1e3), st.sampled_from([4, 8]))
def test_codes_and_scales_are_what_an_engine_can_store(
    array: npt.NDArray[np.float32], bits: int
) -> None:
    for search in (False, True):
        quantized = round_to_nearest(torch.from_numpy(array), bits, BLOCK, search=search)
        assert quantized.codes.dtype == torch.int8
        assert int(quantized.codes.min()) >= -(2 ** (bits - 1))
        assert int(quantized.codes.max()) < 2 ** (bits - 1)
        assert torch.equal(quantized.scales.half().float(), quantized.scales)
        assert quantized.block_size == BLOCK


@given(float_arrays(1e3))
def test_w8a8_is_off_by_at_most_half_a_scale_and_fits_16_bits(
    array: npt.NDArray[np.float32],
) -> None:
    weight = torch.from_numpy(array)
    rounded = to_w8a8(weight)
    assert (rounded.scales > 0).all()
    error = (rounded.codes.double() * rounded.scales - weight.double().T).abs()
    assert (error <= 0.5001 * rounded.scales).all()
    # Of two products with an unsigned byte.
    assert 2 * 255 * int(rounded.codes.abs().max()) < 2**15


@given(st.integers(0, 2**32 - 1))
def test_rounding_what_is_rounded_changes_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (BLOCK, 3), generator=generator, dtype=torch.int8)
    codes[0] = -8  # so that the widest scale is the one that was used
    scales = (torch.rand(1, 3, generator=generator) + 0.1).half().float()
    weight = QuantizedWeight(codes, scales, 4).dequantize()
    again = round_to_nearest(weight, 4, BLOCK)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scales, scales)


def test_a_group_of_zeros_stays_zero() -> None:
    assert not round_to_nearest(torch.zeros(2, BLOCK), 4, BLOCK).dequantize().any()


def test_a_search_lowers_the_squared_error(weight: Tensor) -> None:
    def error(search: bool) -> float:
        rounded = round_to_nearest(weight, 4, 32, search=search).dequantize()
        return float((rounded - weight).square().sum())

    assert error(search=True) < 0.95 * error(search=False)


def test_a_search_never_does_worse_than_the_widest_scale(weight: Tensor) -> None:
    groups = weight.reshape(-1, 32)

    def errors(scales: Tensor) -> Tensor:
        levels = (groups / scales[:, None]).round().clamp(-8, 7)
        return (levels * scales[:, None] - groups).square().sum(-1)

    assert (errors(search_scales(groups, 4)) <= errors(widest_scales(groups, 4))).all()


def test_a_search_listens_to_the_importance_of_a_weight(weight: Tensor) -> None:
    groups = weight.reshape(-1, 32)
    importance = torch.ones(32)
    importance[5] = 1e4
    scales = search_scales(groups, 4, importance)
    error = (groups[:, 5] / scales).round().clamp(-8, 7) * scales - groups[:, 5]
    plain = search_scales(groups, 4)
    plain_error = (groups[:, 5] / plain).round().clamp(-8, 7) * plain - groups[:, 5]
    assert error.square().sum() < 0.3 * plain_error.square().sum()


def test_an_order_puts_features_back_in_their_places() -> None:
    order = torch.tensor([2, 0, 3, 1])
    codes = torch.tensor([[1], [2], [3], [4]], dtype=torch.int8)
    quantized = QuantizedWeight(codes, torch.ones(2, 1), 4, order)
    x = torch.tensor([[10.0, 200.0, 3000.0, 40000.0]])
    expected = x[:, order] @ codes.float()
    assert torch.equal(x @ quantized.dequantize().T, expected)


@given(arrays(np.int8, st.tuples(st.integers(1, 5), st.just(6)), elements=st.integers(-8, 7)))
def test_packing_and_unpacking_is_the_identity(array: npt.NDArray[np.int8]) -> None:
    codes = torch.from_numpy(array)
    packed = pack_int4(codes)
    assert packed.numel() * 2 == codes.numel()
    assert torch.equal(unpack_int4(packed, codes.shape[1]), codes)


def test_the_first_value_lies_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, -1], [-8, 7]], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [0xF1, 0x78]


@pytest.fixture
def weight() -> Tensor:
    """A weight (16, 128)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, 128, generator=generator)

"""mdf_export.quantize: symmetric INT4 by blocks along K."""

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mdf_export.quantize import dequantize_int4, pack_int4, quantize_int4, unpack_int4

BLOCK = 8
weights = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=5).flatmap(
    lambda s: arrays(
        np.float32,
        (s[0] * BLOCK, s[1]),
        elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
    )
)


@given(weights)
def test_the_error_is_at_most_half_a_scale(weight: npt.NDArray[np.float32]) -> None:
    codes, scales = quantize_int4(weight, BLOCK)
    error = np.abs(dequantize_int4(codes, scales) - weight)
    assert (scales > 0).all()
    assert (error <= scales.repeat(BLOCK, axis=0) * 0.5001).all()


@given(weights)
def test_packing_and_unpacking_is_the_identity(weight: npt.NDArray[np.float32]) -> None:
    codes, _ = quantize_int4(weight, BLOCK)
    assert codes.min() >= -8
    assert codes.max() <= 7
    packed = pack_int4(codes)
    assert len(packed) == -(-codes.size // 2)
    np.testing.assert_array_equal(unpack_int4(packed, codes.shape), codes)


def test_the_first_value_lies_in_the_low_nibble() -> None:
    assert pack_int4(np.array([[1, -1], [-8, 7]], np.int8)) == bytes([0xF1, 0x78])


def test_a_block_of_zeros_stays_zero() -> None:
    codes, scales = quantize_int4(np.zeros((BLOCK, 2), np.float32), BLOCK)
    assert not dequantize_int4(codes, scales).any()

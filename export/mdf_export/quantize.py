"""A float weight in, symmetric integer codes and one scale per group along K out, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = {"int4": 4, "int8": 8}
# Levels of W8A8 on either side of zero. Processors without VNNI add two products of an unsigned and
# a signed byte in 16 bits: 2 * 255 * 64 fits, 2 * 255 * 127 would not, and would be clipped unseen.
W8A8_ROW_LEVELS, W8A8_WEIGHT_LEVELS = 127, 64
W8A8_BITS = 7  # whose range, [-64, 63], GPTQ keeps to
# Shrinkages of a group's widest scale that a search tries: clipping an outlier can pay, and where
# one feature's activations dwarf the others', the scale that suits it can be far smaller.
SHRINKAGES = torch.linspace(1.0, 0.2, 33)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (K, N) as integers: x[..., order] @ (codes * scales) is what the engine computes.

    Attributes:
        codes: int8 (K, N) in [-2 ** (bits - 1), 2 ** (bits - 1) - 1].
        scales: float32 (K / block_size, N), positive as TensorRT demands, and exactly
            representable in float16, as an engine stores them.
        bits: 4 or 8; of W8A8, W8A8_BITS in one group.
        order: int64 (K,), the input feature that each row of the codes belongs to; None where
            they stand in their own order.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    order: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.codes.shape[0] // self.scales.shape[0]

    def dequantize(self) -> Tensor:
        """Return the weight that it stands for: float32 (N, K), features in their own order."""
        weight = (self.codes * self.scales.repeat_interleave(self.block_size, dim=0)).T
        weight = weight if self.order is None else weight[:, self.order.argsort()]
        return weight.contiguous()  # or a product would round by where the codes came from


@dataclass(frozen=True)
class Float8Weight:
    """A weight (K, N) and its input in FLOAT8E4M3FN (Micikevicius et al., 2022).

    Attributes:
        codes: float8_e4m3fn (K, N).
        scales: float32 (N,), positive.
        input_scale: of x, for the whole tensor: x / input_scale fits the type.
    """

    codes: Tensor
    scales: Tensor
    input_scale: float


@dataclass(frozen=True)
class W8A8Weight:
    """A weight (K, N) in INT8 whose input is rounded to INT8 as well, when the engine runs.

    Each row of the input and each output feature of the weight has a scale of its own (ZeroQuant,
    Yao et al., 2022).

    Attributes:
        codes: int8 (K, N) in [-64, 64].
        scales: float32 (N,), positive.
    """

    codes: Tensor
    scales: Tensor


def to_w8a8(weight: Tensor) -> W8A8Weight:
    """Round a weight (N, K) to the nearest of 129 levels for each output feature."""
    scales = w8a8_scales(weight)
    codes = (weight.float() / scales[:, None]).round().T.contiguous()
    return W8A8Weight(codes.to(torch.int8), scales)


def w8a8_scales(weight: Tensor) -> Tensor:
    """Return the scales (N,) that clip nothing of a weight (N, K)."""
    scales = weight.float().abs().amax(dim=1) / W8A8_WEIGHT_LEVELS
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def as_w8a8(weight: QuantizedWeight) -> W8A8Weight:
    """Take a weight of W8A8_BITS in one group along K for the product of integers."""
    return W8A8Weight(weight.codes, weight.scales[0])


def to_float8(weight: Tensor, input_max: float) -> Float8Weight:
    """Scale a weight (N, K) by output feature, and its input by the largest magnitude seen."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = _storable(weight.float().abs().amax(dim=1) / largest)  # (N,)
    codes = (weight.float() / scales[:, None]).clamp(-largest, largest).T.contiguous()
    return Float8Weight(codes.to(torch.float8_e4m3fn), scales, max(input_max, 1e-3) / largest)


def round_to_nearest(
    weight: Tensor, bits: int, block_size: int, *, search: bool = False
) -> QuantizedWeight:
    """Round each weight to the nearest level of its group.

    Args:
        weight: float (N, K), finite; K a multiple of block_size.
        bits: 4 or 8.
        block_size: weights along K that share a scale.
        search: take for each group the scale with the least squared error, instead of the one that
            clips nothing.
    """
    n, k = weight.shape
    groups = weight.float().reshape(n, k // block_size, block_size)
    scales = search_scales(groups, bits) if search else widest_scales(groups, bits)
    codes = round_to_levels(groups, scales[..., None], bits).to(torch.int8).reshape(n, k)
    return QuantizedWeight(codes.T.contiguous(), scales.T.contiguous(), bits)


def widest_scales(groups: Tensor, bits: int) -> Tensor:
    """Return the smallest scales (...) that clip nothing of the groups (..., block_size)."""
    high = 2 ** (bits - 1)
    scales = torch.maximum(groups.amax(-1) / (high - 1), groups.amin(-1) / -high)
    return _storable(scales)


def search_scales(groups: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Return the scales (...) of least squared error among shrunken ones.

    Args:
        groups: float32 (..., block_size).
        bits: 4 or 8.
        importance: weight of each squared error, broadcastable to the groups.
    """
    widest = widest_scales(groups, bits)
    best, least = widest, torch.full_like(widest, torch.inf)
    for shrinkage in SHRINKAGES.tolist():
        scales = _storable(widest * shrinkage)
        levels = round_to_levels(groups, scales[..., None], bits)
        error = levels.mul_(scales[..., None]).sub_(groups).square_()
        error = (error if importance is None else error.mul_(importance)).sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def round_to_levels(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the codes of a weight, still in its float type, given scales that broadcast to it."""
    high = 2 ** (bits - 1)
    return (weight / scales).round_().clamp_(-high, high - 1)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] (K, N) as ONNX does: uint8 (K * N / 2,), the first in the low
    nibble; K * N is even."""
    nibbles = codes.reshape(-1).view(torch.uint8) & 0x0F
    return nibbles[::2] | nibbles[1::2] << 4


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """Inverse of pack_int4: int8 (K, columns)."""
    nibbles = torch.stack([packed & 0x0F, packed >> 4], dim=-1)
    return ((nibbles ^ 8).to(torch.int8) - 8).reshape(-1, columns)


def _storable(scales: Tensor) -> Tensor:
    """Positive, and what float16 can hold: an engine's scales are float16.

    Below its normal numbers they are rounded up: down could halve a scale, and clip its group.
    """
    step = 2.0**-24
    small = (scales / step).ceil() * step
    scales = torch.where(scales < 2.0**-14, small, scales.half().float())
    return torch.where(scales > 0, scales, torch.ones_like(scales))

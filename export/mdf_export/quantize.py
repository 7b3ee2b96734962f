"""A float weight in, symmetric INT4 codes and scales per group along K out, and back."""

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]


def quantize_int4(weight: Float32, block_size: int) -> tuple[Int8, Float32]:
    """Round to the nearest of 16 levels, with no zero point and nothing clipped.

    Args:
        weight: float32 (K, N), finite; K a multiple of block_size.
        block_size: weights along K that share a scale.

    Returns:
        codes: int8 (K, N) in [-8, 7].
        scales: float32 (K / block_size, N), positive as TensorRT demands; |weight - code * scale|
            <= scale / 2.
    """
    k, n = weight.shape
    blocks = weight.reshape(k // block_size, block_size, n)
    scales = np.maximum(blocks.max(axis=1) / 7, -blocks.min(axis=1) / 8)  # (K / block_size, N)
    scales = np.where(scales > 0, scales, 1.0).astype(np.float32)
    codes = np.clip(np.rint(blocks / scales[:, None]), -8, 7).astype(np.int8)
    return codes.reshape(k, n), scales


def dequantize_int4(codes: Int8, scales: Float32) -> Float32:
    """Return float32 (K, N): codes times the scale of their block."""
    return codes * scales.repeat(codes.shape[0] // scales.shape[0], axis=0)


def pack_int4(codes: Int8) -> bytes:
    """Pack int8 codes in [-8, 7] as ONNX does: two to a byte, the first in the low nibble."""
    nibbles = (codes.reshape(-1) & 0x0F).astype(np.uint8)
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return (nibbles[::2] | nibbles[1::2] << 4).tobytes()


def unpack_int4(packed: bytes, shape: tuple[int, int]) -> Int8:
    """Inverse of pack_int4."""
    bytes_ = np.frombuffer(packed, np.uint8)
    nibbles = np.stack([bytes_ & 0x0F, bytes_ >> 4], axis=1).reshape(-1)[: shape[0] * shape[1]]
    return ((nibbles ^ 8).astype(np.int8) - 8).reshape(shape)

"""A card's memory played by the host's: what the CUDA backend does to it runs without a card."""

from math import prod
from typing import Any

import numpy as np

from mdf_sdk.sessions.device_memory import Array, DeviceArray, Tensor


class HostMemory:
    """`free_bytes` and `total_bytes` may be set; nothing is taken from them.

    `written` lists the addresses that were copied to.
    """

    kind = "cpu"
    card = "a card played by the host"
    compute_capability = "8.9"

    def __init__(self, free_bytes: int = 8_000_000_000, total_bytes: int = 8_000_000_000) -> None:
        self.free_bytes, self.total_bytes = free_bytes, total_bytes
        self.written: list[int] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        owner = np.full(max(1, prod(shape) * dtype.itemsize), 0xFF, np.uint8)  # NaN
        return DeviceArray(owner.ctypes.data, shape, dtype, owner)

    def write(self, *copies: tuple[DeviceArray, Tensor]) -> None:
        for target, source in copies:
            assert (target.shape, target.dtype) == (source.shape, source.dtype)
            self.written.append(target.pointer)
            _view(target)[...] = _view(source) if isinstance(source, DeviceArray) else source

    def to_host(self, source: DeviceArray) -> Array:
        return _view(source).copy()

    def free_and_total_bytes(self) -> tuple[int, int]:
        return self.free_bytes, self.total_bytes


def _view(array: DeviceArray) -> Array:
    assert isinstance(array.owner, np.ndarray)
    start = array.pointer - array.owner.ctypes.data
    return array.owner[start : start + array.nbytes].view(array.dtype).reshape(array.shape)

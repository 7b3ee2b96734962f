"""A card's memory played by the host's: what the CUDA backend does to it runs without a card."""

import copy
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from math import prod
from typing import Any, Self

import numpy as np

from mdf_sdk.clock import HostMark
from mdf_sdk.sessions.device_memory import Array, DeviceArray, Tensor

_STREAMS = count(77)


class HostMemory:
    """`free_bytes` and `total_bytes` may be set; nothing is taken from them.

    `written` lists the addresses that were copied to. What one queue made, and was not waited for,
    another must not read.
    """

    kind = "cpu"
    card = "a card played by the host"
    compute_capability = "8.9"

    def __init__(self, free_bytes: int = 8_000_000_000, total_bytes: int = 8_000_000_000) -> None:
        self.free_bytes, self.total_bytes = free_bytes, total_bytes
        self.written: list[int] = []
        self.trimmed = 0
        self.stream = next(_STREAMS)
        self._queued: dict[int, int] = {}  # streams by address

    def beside(self) -> Self:
        other = copy.copy(self)
        other.stream = next(_STREAMS)
        return other

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        owner = np.full(max(1, prod(shape) * dtype.itemsize), 0xFF, np.uint8)  # NaN
        self._queued[owner.ctypes.data] = self.stream
        return DeviceArray(owner.ctypes.data, shape, dtype, owner)

    def write(self, *copies: tuple[DeviceArray, Tensor]) -> None:
        for target, source in copies:
            assert (target.shape, target.dtype) == (source.shape, source.dtype)
            self.written.append(target.pointer)
            self.check(target.pointer)
            self._queued[target.pointer] = self.stream
            if isinstance(source, DeviceArray):
                self.check(source.pointer)
                source = _view(source)
            _view(target)[...] = source

    def empty_pixels(self, size: int) -> Array:
        return np.full(size, np.nan, np.float32)

    def check(self, pointer: int) -> None:
        assert self._queued.get(pointer, self.stream) == self.stream, "another queue may write it"

    def to_host(self, source: DeviceArray) -> Array:
        self.check(source.pointer)
        self.wait()
        return _view(source).copy()

    def wait(self) -> None:
        for pointer, stream in list(self._queued.items()):
            if stream == self.stream:
                del self._queued[pointer]

    def mark(self) -> HostMark:
        return HostMark()

    def capturing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def trim(self) -> None:
        self.trimmed += 1

    def free_and_total_bytes(self) -> tuple[int, int]:
        return self.free_bytes, self.total_bytes


def _view(array: DeviceArray) -> Array:
    assert isinstance(array.owner, np.ndarray)
    start = array.pointer - array.owner.ctypes.data
    return array.owner[start : start + array.nbytes].view(array.dtype).reshape(array.shape)

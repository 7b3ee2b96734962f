"""Arrays in a card's memory: what one block gives the next without passing through the host."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from mdf_sdk.clock import Mark

Array = npt.NDArray[Any]

_ALIGNMENT = 256  # of what CUDA allocates
# Of keys: masked attention to 160 ran in ONNX Runtime's fused kernel, to 167 it did not (H100).
_ROWS_STEP = 32


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A C-contiguous array in a card's memory; `owner` frees it when no array refers to it."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> "DeviceArray":
        """Take rows of the first axis; the memory is shared."""
        start, stop, _ = rows.indices(self.shape[0])
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return DeviceArray(self.pointer + start * row_bytes, shape, self.dtype, self.owner)


Tensor = Array | DeviceArray


class DeviceMemory(Protocol):
    """The memory of one card, and a queue of work in it: what is queued is done in this order."""

    @property
    def kind(self) -> str:
        """What ONNX Runtime calls the device, e.g. "cuda"."""

    @property
    def card(self) -> str:
        """E.g. "NVIDIA RTX 4090 (8.9)"."""

    @property
    def compute_capability(self) -> str:
        """E.g. "8.9"."""

    @property
    def stream(self) -> int:
        """The queue, as a cudaStream_t."""

    def beside(self) -> Self:
        """The same memory with another queue: what is in different ones may overlap.

        What one queue made another may use after a `wait`.
        """

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Allocate, for what is queued from now on; the content is undefined."""

    def write(self, *copies: tuple[DeviceArray, Tensor]) -> None:
        """Queue copies to each target from a source of the same shape and dtype.

        A source on the host has been read when the call returns; of `empty_pixels`, after a `wait`.
        """

    def empty_pixels(self, size: int) -> Array:
        """Allocate float32 (size,) on the host, from where the card copies by itself."""

    def to_host(self, source: DeviceArray) -> Array:
        """Copy to a new array on the host, once all that is queued is done."""

    def wait(self) -> None:
        """Wait until all that is queued is done."""

    def mark(self) -> Mark:
        """The moment at which all that is queued is done."""

    def capturing(self) -> AbstractContextManager[object]:
        """While the queue is captured as a graph: nothing is freed, whichever thread drops it."""

    def trim(self) -> None:
        """Give what is free back to the card; after an error of the card nothing."""

    def free_and_total_bytes(self) -> tuple[int, int]:
        """Of the whole card, whichever process uses it."""


def concatenate(memory: DeviceMemory, arrays: Sequence[DeviceArray]) -> DeviceArray:
    """Join along the first axis into new memory; of one array it makes a copy."""
    first = arrays[0]
    shape = (sum(array.shape[0] for array in arrays), *first.shape[1:])
    joined, at, copies = memory.empty(shape, first.dtype), 0, list[tuple[DeviceArray, Tensor]]()
    for array in arrays:
        copies.append((joined[at : at + array.shape[0]], array))
        at += array.shape[0]
    memory.write(*copies)
    return joined


def empty_all(
    memory: DeviceMemory, kinds: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
) -> dict[str, DeviceArray]:
    """Allocate named arrays of a shape and dtype each, one behind the other in one piece."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in kinds.values()]
    steps = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    whole = memory.empty((sum(steps),), np.dtype(np.uint8))
    places = accumulate(steps, initial=whole.pointer)
    return {
        name: DeviceArray(pointer, shape, dtype, whole.owner)
        for pointer, (name, (shape, dtype)) in zip(places, kinds.items(), strict=False)
    }


def copy_all(memory: DeviceMemory, arrays: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
    """Copy named arrays to memory of their own; in one copy where they lie as that does."""
    own = empty_all(memory, {name: (array.shape, array.dtype) for name, array in arrays.items()})
    copies = [(own[name], array) for name, array in arrays.items()]
    (target, source), (last, _) = copies[0], copies[-1]
    moved = source.pointer - target.pointer
    if all(a.owner is source.owner and a.pointer - o.pointer == moved for o, a in copies):
        span, byte = (last.pointer + last.nbytes - target.pointer,), np.dtype(np.uint8)
        copies = [
            (replace(target, shape=span, dtype=byte), replace(source, shape=span, dtype=byte))
        ]
    memory.write(*copies)
    return own


class CardBackend:
    """What every backend on a card is and does."""

    slots = 1
    overlaps = True

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self.card = memory.card

    def text_rows(self, rows: int) -> int:
        return -(-rows // _ROWS_STEP) * _ROWS_STEP

    def empty_pixels(self, size: int) -> Array:
        return self._memory.empty_pixels(size)

    def to_host(self, tensor: Tensor) -> Array:
        return self._memory.to_host(tensor) if isinstance(tensor, DeviceArray) else tensor

    def mark(self) -> Mark:
        return self._memory.mark()

    def free_and_total_bytes(self) -> tuple[int, int]:
        return self._memory.free_and_total_bytes()

    def device_bytes(self) -> int:
        free, total = self._memory.free_and_total_bytes()
        return total - free

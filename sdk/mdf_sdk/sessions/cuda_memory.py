"""The memory of an NVIDIA card and its queues of work, through cuda-python."""

import copy
import os
import threading
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np

from mdf_sdk.errors import BackendRunError, BackendUnavailableError, DeviceMemoryError
from mdf_sdk.sessions.device_memory import Array, DeviceArray, Tensor

_KEPT_BYTES = 512 * 2**20
# In a queue a copy from pageable memory may wait for all before it. So a text, which comes while
# the tower runs, lands beside it first; a photograph's pixels come first, and would leave holes.
_LANDING_BYTES = 2 * 2**20
_PAGE_LOCKED = 12  # photographs' pixels in such memory at most: no other program can have it
_OLDEST_CARD = (7, 5)


class CudaMemory:
    """The memory of the first visible NVIDIA card, through cuda-python.

    CUDA_VISIBLE_DEVICES chooses another card.
    """

    kind = "cuda"

    def __init__(self) -> None:
        """Raises:
        BackendUnavailableError: no cuda-python, driver or card, or one that takes no work, such
            as another process's in exclusive mode.
        DeviceMemoryError: no memory for a context.
        """
        try:
            from cuda.bindings import driver, runtime
        except ImportError as error:
            raise BackendUnavailableError(
                f"device 'cuda': found no working cuda-bindings ({error}), expected it installed. "
                "Install it: pip install 'mdf-mllm[cuda]'"
            ) from error
        self._call = _Calls(runtime)
        status, count = runtime.cudaGetDeviceCount()
        if status != 0 or count == 0:
            raise BackendUnavailableError(
                f"device 'cuda': found {_driver(runtime)} and no usable NVIDIA card "
                f"({status.name}), expected one with a driver for CUDA 13 (580 or later). Install "
                "or update the NVIDIA driver, then look with: nvidia-smi"
            )
        properties = self._call("cudaGetDeviceProperties", 0)
        name = properties.name.decode() if isinstance(properties.name, bytes) else properties.name
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self.card = self._call.card = f"{name} ({self.compute_capability})"
        if (properties.major, properties.minor) < _OLDEST_CARD:
            raise BackendUnavailableError(
                f"device 'cuda': found {self.card}, expected a card of compute capability "
                "7.5 (Turing, 2018) or later, the oldest of CUDA 13. Choose another with "
                "CUDA_VISIBLE_DEVICES, or the CPU: pip install 'mdf-mllm[cpu]'"
            )
        try:
            self._queue, self._uploads = self._open_stream(), self._open_stream()
            self._pool = self._call("cudaDeviceGetDefaultMemPool", 0)
            attributes = runtime.cudaMemPoolAttr
            for attribute, value in (
                # What is freed stays in the pool: a cudaMalloc takes as long as a block.
                (attributes.cudaMemPoolAttrReleaseThreshold, driver.cuuint64_t(_KEPT_BYTES)),
                # Or an upload may be given memory for which it must wait until a block is done.
                (attributes.cudaMemPoolReuseAllowInternalDependencies, 0),
            ):
                self._call("cudaMemPoolSetAttribute", self._pool, attribute, value)
        except BackendRunError as error:
            raise BackendUnavailableError(f"device 'cuda': {self.card}: {error}") from error
        # What is made beside goes to the blocks of this queue, which are the last to read it.
        self._last, self._freeing = self._queue, threading.RLock()
        self._page_locked = _PageLocked(self._call)

    @property
    def stream(self) -> int:
        return self._queue.handle

    def beside(self) -> Self:
        other = copy.copy(self)
        other._queue, other._uploads = self._open_stream(), self._open_stream()
        return other

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        return self._empty(shape, dtype, made_in=self._queue, read_last_in=self._last)

    def write(self, *copies: tuple[DeviceArray, Tensor]) -> None:
        for target, source in copies:
            if isinstance(source, DeviceArray):
                self._copy(target.pointer, source.pointer, target.nbytes, self._queue)
            elif source.nbytes <= _LANDING_BYTES:
                landed = self._land(source)
                self._copy(target.pointer, landed.pointer, target.nbytes, self._queue)
            else:
                # Pageable, it has been read when the call returns; else its owner keeps it.
                held = np.ascontiguousarray(source)
                self._copy(target.pointer, held.ctypes.data, held.nbytes, self._queue)

    def empty_pixels(self, size: int) -> Array:
        with self._freeing:  # CUDA locks no pages while a queue is captured
            return self._page_locked.empty(size)

    def to_host(self, source: DeviceArray) -> Array:
        target = np.empty(source.shape, source.dtype)
        self._copy(target.ctypes.data, source.pointer, source.nbytes, self._queue)
        self.wait()
        return target

    def wait(self) -> None:
        self._queue.wait()

    def mark(self) -> "_Event":
        event = _Event(self._call("cudaEventCreate"), self._call)
        self._call("cudaEventRecord", event.handle, self.stream)
        return event

    def capturing(self) -> AbstractContextManager[object]:
        return self._freeing

    def trim(self) -> None:
        self._call.runtime.cudaStreamSynchronize(self._last.handle)  # what is freed is queued
        self._call.runtime.cudaMemPoolTrimTo(self._pool, 0)
        with self._freeing:
            self._page_locked.trim()

    def free_and_total_bytes(self) -> tuple[int, int]:
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def _open_stream(self) -> "_Stream":
        stream = self._call("cudaStreamCreateWithFlags", 1)  # cudaStreamNonBlocking
        return _Stream(int(stream), self._call)

    def _land(self, source: Array) -> DeviceArray:
        """Copy an array of the host to memory of its own, whatever the queue is at."""
        held = np.ascontiguousarray(source)
        landed = self._empty(
            held.shape, held.dtype, made_in=self._uploads, read_last_in=self._queue
        )
        self._copy(landed.pointer, held.ctypes.data, held.nbytes, self._uploads)
        self._uploads.wait()
        return landed

    def _empty(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        made_in: "_Stream",
        read_last_in: "_Stream",
    ) -> DeviceArray:
        size = max(1, prod(shape) * dtype.itemsize)
        pointer = int(self._call("cudaMallocAsync", size, made_in.handle))
        return DeviceArray(pointer, shape, dtype, _Allocation(pointer, read_last_in, self._freeing))

    def _copy(self, target: int, source: int, size: int, stream: "_Stream") -> None:
        direction = self._call.runtime.cudaMemcpyKind.cudaMemcpyDefault  # by the addresses
        self._call("cudaMemcpyAsync", target, source, size, direction, stream.handle)


class _Calls:
    """CUDA's functions, whose failures are our errors.

    Streams refer to it, not to the memory: in a ring they would wait for a garbage collection.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime, self.card, self.process = runtime, "the card", os.getpid()

    def __call__(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self.runtime, name)(*arguments)
        if status == self.runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise DeviceMemoryError(
                f"{name}: found too little free memory on {self.card}, expected what the engine "
                "needs. See what uses the card: nvidia-smi. See the need: mdf info ENGINE"
            )
        if status != 0:
            raise BackendRunError(
                f"{name}: found {status.name}, expected success. Look at the card with nvidia-smi; "
                "after an error in a kernel only a new process can use it again"
            )
        return values[0] if len(values) == 1 else tuple(values)


@dataclass(frozen=True)
class _Stream:
    handle: int
    call: _Calls

    def wait(self) -> None:
        self.call("cudaStreamSynchronize", self.handle)

    def __del__(self) -> None:
        self.call.runtime.cudaStreamDestroy(self.handle)


@dataclass(frozen=True)
class _Allocation:
    """Memory that is free again when `stream` has done what is in it by then."""

    pointer: int
    stream: _Stream
    freeing: threading.RLock

    def __del__(self) -> None:
        if os.getpid() != self.stream.call.process:
            return  # a forked child has none of it, and the lock may be held for ever there
        with self.freeing:
            self.stream.call.runtime.cudaFreeAsync(self.pointer, self.stream.handle)


class _PageLocked:
    """Memory of the host that the card reads by itself, while the host goes on.

    Locking and unlocking pages takes CUDA milliseconds, so what was dropped is lent again.
    """

    def __init__(self, call: _Calls) -> None:
        self._call = call
        self._free = deque["_Pages"]()
        self._made = 0

    def empty(self, size: int) -> Array:
        """Undefined float32 (size,); common memory where no more can be locked."""
        if self._free and self._free[0].size == size:
            return np.asarray(_Lent(self._free.popleft(), self._free))
        if self._made < _PAGE_LOCKED:
            status, pointer = self._call.runtime.cudaHostAlloc(size * np.float32().nbytes, 0)
            if status == 0:
                self._made += 1
                return np.asarray(_Lent(_Pages(int(pointer), size, self._call), self._free))
        return np.empty(size, np.float32)

    def trim(self) -> None:
        """Give what was dropped back to the system."""
        while self._free:
            self._free.popleft()
            self._made -= 1


@dataclass(frozen=True)
class _Pages:
    pointer: int
    size: int
    call: _Calls

    def __del__(self) -> None:
        self.call.runtime.cudaFreeHost(self.pointer)


class _Lent:
    """What arrays of these pages refer to; when the last is dropped, in any thread, they are free.

    https://numpy.org/doc/stable/reference/arrays.interface.html
    """

    def __init__(self, pages: _Pages, free: deque[_Pages]) -> None:
        self._pages, self._free = pages, free
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(np.float32).str,
            "shape": (pages.size,),
            "data": (pages.pointer, False),
        }

    def __del__(self) -> None:
        self._free.append(self._pages)


@dataclass(frozen=True)
class _Event:
    """A mark in a stream."""

    handle: Any
    call: _Calls

    def ms_since(self, earlier: Self) -> float:
        self.call("cudaEventSynchronize", self.handle)
        return float(self.call("cudaEventElapsedTime", earlier.handle, self.handle))

    def __del__(self) -> None:
        self.call.runtime.cudaEventDestroy(self.handle)


def _driver(runtime: Any) -> str:
    status, version = runtime.cudaDriverGetVersion()
    if status != 0 or version == 0:
        return "no NVIDIA driver"
    return f"a driver for CUDA {version // 1000}.{version % 1000 // 10}"

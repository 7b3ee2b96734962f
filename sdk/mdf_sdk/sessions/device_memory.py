"""Arrays in a card's memory: what one block gives the next without passing through the host."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mdf_sdk.errors import BackendRunError, BackendUnavailableError, DeviceMemoryError

Array = npt.NDArray[Any]

_KEPT_BYTES = 512 * 2**20
_ALIGNMENT = 256  # of what CUDA allocates
_OLDEST_CARD = (7, 5)
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


class Stream(Protocol):
    """A queue of work on the card; what lies in different ones may overlap."""

    @property
    def handle(self) -> int:
        """Its cudaStream_t."""

    def synchronize(self) -> None:
        """Wait until all of its work is done."""


class DeviceMemory(Protocol):
    """The memory of one card."""

    @property
    def kind(self) -> str:
        """What ONNX Runtime calls the device, e.g. "cuda"."""

    @property
    def card(self) -> str:
        """E.g. "NVIDIA RTX 4090 (8.9)"."""

    @property
    def compute_capability(self) -> str:
        """E.g. "8.9"."""

    def open_stream(self) -> Stream:
        """Make a stream; it lives as long as the object."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """Allocate; the content is undefined. Other streams may use it after the next `write`."""

    def write(self, *copies: tuple[DeviceArray, Tensor]) -> None:
        """Copy to each target a source of the same shape and dtype; done when the call returns."""

    def to_host(self, source: DeviceArray) -> Array:
        """Copy to a new array on the host."""

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

    def to_host(self, tensor: Tensor) -> Array:
        return self._memory.to_host(tensor) if isinstance(tensor, DeviceArray) else tensor

    def free_and_total_bytes(self) -> tuple[int, int]:
        return self._memory.free_and_total_bytes()

    def device_bytes(self) -> int:
        free, total = self._memory.free_and_total_bytes()
        return total - free


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
        self._runtime: Any = runtime
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
        self.card = f"{name} ({self.compute_capability})"
        if (properties.major, properties.minor) < _OLDEST_CARD:
            raise BackendUnavailableError(
                f"device 'cuda': found {self.card}, expected a card of compute capability "
                "7.5 (Turing, 2018) or later, the oldest of CUDA 13. Choose another with "
                "CUDA_VISIBLE_DEVICES, or the CPU: pip install 'mdf-mllm[cpu]'"
            )
        try:
            self._stream = self._call("cudaStreamCreateWithFlags", 1)  # cudaStreamNonBlocking
            # What is freed stays in the pool: a cudaMalloc takes as long as a block.
            pool = self._call("cudaDeviceGetDefaultMemPool", 0)
            threshold = runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
            self._call("cudaMemPoolSetAttribute", pool, threshold, driver.cuuint64_t(_KEPT_BYTES))
        except BackendRunError as error:
            raise BackendUnavailableError(f"device 'cuda': {self.card}: {error}") from error

    def open_stream(self) -> Stream:
        stream = self._call("cudaStreamCreateWithFlags", 1)  # cudaStreamNonBlocking
        return _CudaStream(stream, self._call, self._runtime.cudaStreamDestroy)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        size = max(1, prod(shape) * dtype.itemsize)
        pointer = int(self._call("cudaMallocAsync", size, self._stream))
        return DeviceArray(pointer, shape, dtype, _Allocation(pointer, self._free))

    def write(self, *copies: tuple[DeviceArray, Tensor]) -> None:
        held = []  # until the copies are done
        for target, source in copies:
            if isinstance(source, DeviceArray):
                pointer = source.pointer
            else:
                held.append(np.ascontiguousarray(source))
                pointer = held[-1].ctypes.data
            self._copy(target.pointer, pointer, target.nbytes)
        self._call("cudaStreamSynchronize", self._stream)

    def to_host(self, source: DeviceArray) -> Array:
        target = np.empty(source.shape, source.dtype)
        self._copy(target.ctypes.data, source.pointer, source.nbytes)
        self._call("cudaStreamSynchronize", self._stream)
        return target

    def free_and_total_bytes(self) -> tuple[int, int]:
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def _free(self, pointer: int) -> None:
        self._runtime.cudaFreeAsync(pointer, self._stream)

    def _copy(self, target: int, source: int, size: int) -> None:
        direction = self._runtime.cudaMemcpyKind.cudaMemcpyDefault  # by the addresses
        self._call("cudaMemcpyAsync", target, source, size, direction, self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._runtime, name)(*arguments)
        if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
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


class _Allocation:
    def __init__(self, pointer: int, free: Callable[[int], Any]) -> None:
        self._pointer, self._free = pointer, free

    def __del__(self) -> None:
        self._free(self._pointer)


class _CudaStream:
    def __init__(
        self, stream: Any, call: Callable[..., Any], destroy: Callable[[Any], Any]
    ) -> None:
        self._stream, self._call, self._destroy = stream, call, destroy
        self.handle = int(stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def __del__(self) -> None:
        self._destroy(self._stream)


def _driver(runtime: Any) -> str:
    status, version = runtime.cudaDriverGetVersion()
    if status != 0 or version == 0:
        return "no NVIDIA driver"
    return f"a driver for CUDA {version // 1000}.{version % 1000 // 10}"

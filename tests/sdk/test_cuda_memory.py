"""CUDA's own memory, with a runtime that notes what it is asked: which queue, and what waits."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mdf_sdk.sessions.cuda_memory import CudaMemory
from mdf_sdk.sessions.device_memory import DeviceArray

FLOATS = np.dtype(np.float32)


class Runtime(SimpleNamespace):
    """`cuda.bindings.runtime` as far as it is used; `calls` are names with their arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._next = 1000
        self._pages, self.locked = list[Any](), list[int]()
        self.lockable = sys.maxsize
        super().__init__(
            cudaError_t=SimpleNamespace(cudaErrorMemoryAllocation=2),
            cudaMemcpyKind=SimpleNamespace(cudaMemcpyDefault=4),
            cudaMemPoolAttr=SimpleNamespace(
                cudaMemPoolAttrReleaseThreshold=4, cudaMemPoolReuseAllowInternalDependencies=3
            ),
            cudaGetDeviceCount=lambda: (0, 1),
            cudaHostAlloc=self._lock_pages,
            cudaGetDeviceProperties=lambda _: (0, SimpleNamespace(name=b"Toy", major=9, minor=0)),
        )

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            self._next += 1
            return 0, 1.5 if name == "cudaEventElapsedTime" else self._next

        return call

    def _lock_pages(self, size: int, flags: int) -> tuple[int, int]:
        if size > self.lockable:
            return 2, 0
        self._pages.append((ctypes.c_char * size)())
        self.locked.append(ctypes.addressof(self._pages[-1]))
        return 0, self.locked[-1]

    def asked(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for found, *arguments in self.calls if found == name]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime, bindings = Runtime(), ModuleType("cuda.bindings")
    vars(bindings).update(runtime=runtime, driver=SimpleNamespace(cuuint64_t=int))
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return runtime


@pytest.fixture
def memory(runtime: Runtime) -> CudaMemory:
    return CudaMemory()


def test_a_text_from_the_host_does_not_wait_for_the_queue(
    runtime: Runtime, memory: CudaMemory
) -> None:
    target, other = memory.empty((2, 3), FLOATS), memory.empty((4,), FLOATS)
    runtime.calls.clear()
    memory.write((target, np.ones((2, 3), np.float32)), (other, memory.empty((4,), FLOATS)))
    up, first, second = runtime.asked("cudaMemcpyAsync")
    uploads = up[-1]
    assert uploads != memory.stream
    assert runtime.asked("cudaStreamSynchronize") == [[uploads]]
    assert first == [target.pointer, up[0], 24, 4, memory.stream]
    assert second[0] == other.pointer
    assert second[-1] == memory.stream


def test_pixels_from_the_host_take_no_memory_beside_their_place(
    runtime: Runtime, memory: CudaMemory
) -> None:
    pixels = np.zeros((3, 560, 560), np.float32)
    target = memory.empty(pixels.shape, FLOATS)
    runtime.calls.clear()
    memory.write((target, pixels))
    assert runtime.calls == [
        ("cudaMemcpyAsync", target.pointer, pixels.ctypes.data, pixels.nbytes, 4, memory.stream)
    ]


def test_dropped_pixels_are_lent_again_once_no_array_refers_to_them(memory: CudaMemory) -> None:
    whole = memory.empty_pixels(24)
    address, part = whole.ctypes.data, whole[4:].reshape(4, 5)[None]
    assert (whole.dtype, whole.shape) == (np.float32, (24,))
    del whole
    others = [memory.empty_pixels(24), memory.empty_pixels(24)]
    assert address not in [pixels.ctypes.data for pixels in others]
    part[...] = 7
    assert all((pixels == 0).all() for pixels in others)  # as the toy makes them
    del part
    assert memory.empty_pixels(24).ctypes.data == address


def test_few_pages_are_locked_and_all_are_given_back(runtime: Runtime, memory: CudaMemory) -> None:
    lent = [memory.empty_pixels(24) for _ in range(20)]
    lent += [memory.empty_pixels(26)]
    assert len(runtime.locked) == 12
    lent.clear()
    lent = [memory.empty_pixels(24) for _ in range(12)]
    assert len(runtime.locked) == 12
    assert {pixels.ctypes.data for pixels in lent} == set(runtime.locked)
    assert runtime.asked("cudaFreeHost") == []
    lent.clear()
    memory.trim()
    assert sorted(runtime.asked("cudaFreeHost")) == [
        [address] for address in sorted(runtime.locked)
    ]
    memory.empty_pixels(26)
    assert len(runtime.locked) == 13


def test_pages_that_outlive_the_memory_are_given_back_when_they_are_dropped(
    runtime: Runtime,
) -> None:
    memory = CudaMemory()
    pixels = memory.empty_pixels(24)
    del memory
    assert runtime.asked("cudaFreeHost") == []
    address = pixels.ctypes.data
    del pixels
    assert runtime.asked("cudaFreeHost") == [[address]]


def test_pixels_lie_in_common_memory_where_no_pages_can_be_locked(
    runtime: Runtime, memory: CudaMemory
) -> None:
    runtime.lockable = 100
    pixels = memory.empty_pixels(26)
    assert pixels.shape == (26,)
    del pixels
    assert runtime.asked("cudaFreeHost") == []


def test_no_pages_are_locked_while_a_queue_is_captured(memory: CudaMemory) -> None:
    lent: list[Any] = []
    asking = threading.Thread(target=lambda: lent.append(memory.empty_pixels(24)))
    with memory.capturing():
        asking.start()
        asking.join(0.2)
        assert not lent
    asking.join(20)
    assert len(lent) == 1


def test_memory_is_freed_behind_what_reads_it_last_whichever_queue_made_it(
    runtime: Runtime, memory: CudaMemory
) -> None:
    beside = memory.beside()
    assert beside.stream != memory.stream
    array = beside.empty((4,), FLOATS)
    assert runtime.asked("cudaMallocAsync") == [[16, beside.stream]]
    pointer = array.pointer
    del array
    assert runtime.asked("cudaFreeAsync") == [[pointer, memory.stream]]
    beside.write((beside.empty((4,), FLOATS), np.ones(4, np.float32)))
    upload = runtime.asked("cudaMemcpyAsync")[0][0]
    assert [upload, beside.stream] in runtime.asked("cudaFreeAsync")


def test_nothing_is_freed_while_a_queue_is_captured(runtime: Runtime, memory: CudaMemory) -> None:
    arrays: list[DeviceArray] = [memory.beside().empty((4,), FLOATS)]
    dropping = threading.Thread(target=arrays.clear)
    with memory.capturing():
        dropping.start()
        dropping.join(0.2)
        assert dropping.is_alive()
        assert runtime.asked("cudaFreeAsync") == []
    dropping.join(20)
    assert len(runtime.asked("cudaFreeAsync")) == 1


def test_what_is_free_goes_back_to_the_card_once_it_is_freed(
    runtime: Runtime, memory: CudaMemory
) -> None:
    runtime.calls.clear()
    memory.trim()
    pool = runtime.calls[1][1]
    assert runtime.calls == [
        ("cudaStreamSynchronize", memory.stream),
        ("cudaMemPoolTrimTo", pool, 0),
    ]


def test_a_forked_child_frees_nothing_and_waits_for_no_lock(
    runtime: Runtime, memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [memory.empty((4,), FLOATS)]
    dropping = threading.Thread(target=arrays.clear, daemon=True)
    with memory.capturing(), monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        dropping.start()
        dropping.join(20)
        assert not dropping.is_alive()
    assert runtime.asked("cudaFreeAsync") == []


def test_a_time_between_marks_is_the_cards(runtime: Runtime, memory: CudaMemory) -> None:
    start, end = memory.mark(), memory.mark()
    assert [stream for _, stream in runtime.asked("cudaEventRecord")] == 2 * [memory.stream]
    assert runtime.asked("cudaEventSynchronize") == []
    assert end.ms_since(start) == 1.5
    assert runtime.asked("cudaEventElapsedTime") == [[start.handle, end.handle]]


def test_streams_and_events_go_with_their_objects(runtime: Runtime) -> None:
    memory = CudaMemory()
    beside = memory.beside()
    beside.mark()
    assert len(runtime.asked("cudaEventDestroy")) == 1
    array = beside.empty((4,), FLOATS)
    del memory, beside
    assert runtime.asked("cudaFreeAsync") == []  # and its queue is there still
    freed = len(runtime.calls)
    del array
    assert runtime.calls[freed][0] == "cudaFreeAsync"
    assert len(runtime.asked("cudaStreamDestroy")) == 4

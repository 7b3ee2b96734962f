"""ONNX Runtime on the processor: numpy arrays in and out."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdf_sdk.clock import HostMark
from mdf_sdk.errors import InputError
from mdf_sdk.machine import cpu_name, usable_cores
from mdf_sdk.manifest import Manifest
from mdf_sdk.sessions import Array, Tensor, host_memory
from mdf_sdk.sessions.onnxruntime_load import (
    import_onnxruntime,
    load_graph,
    mapped_errors,
    session_options,
)

# Or the threads of a block that is done spin on, and take the cores from the next.
_CONFIG = {"session.force_spinning_stop": "1"}


class OnnxRuntimeCpu:
    """ONNX Runtime's CPU execution provider."""

    device = "cpu"
    overlaps = False  # one block uses all threads

    def __init__(self, engine_dir: Path, manifest: Manifest, threads: int | None) -> None:
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads: found {threads}, expected at least 1, or None")
        self._runtime = import_onnxruntime("cpu")
        self._directory, self._blocks = engine_dir, manifest.blocks
        self._threads = threads or 0
        self.name = f"onnxruntime {self._runtime.__version__}"
        self.card = cpu_name()
        cores = usable_cores()
        self.slots = max(1, cores // (threads or cores))

    def files(self, block: str) -> tuple[str, ...]:
        return (self._blocks[block].file,)

    def open(self, block: str, rows: Iterable[int] = ()) -> "OnnxRuntimeCpuSession":
        spec = self._blocks[block]
        options = session_options(self._runtime, _CONFIG)
        options.intra_op_num_threads = self._threads
        path = self._directory / spec.file
        session = load_graph(
            self._runtime, block, path, spec, options, "CPUExecutionProvider", provider_options={}
        )
        return OnnxRuntimeCpuSession(block, session)

    def text_rows(self, rows: int) -> int:
        return rows

    def empty_pixels(self, size: int) -> Array:
        return np.empty(size, np.float32)

    def to_host(self, tensor: Tensor) -> Array:
        assert isinstance(tensor, np.ndarray)
        return tensor

    def mark(self) -> HostMark:
        return HostMark()

    def free_and_total_bytes(self) -> tuple[int, int] | None:
        return host_memory.free_and_total_bytes()

    def device_bytes(self) -> None:
        return None


class OnnxRuntimeCpuSession:
    """One block; calls may run at the same time."""

    def __init__(self, block: str, session: Any) -> None:
        self._block = block
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with mapped_errors(self._block, "run"):
            values = self._session.run(self._outputs, dict(inputs))
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        self._session = None

"""The seam to the runtimes below: a `Backend` opens an engine's blocks as `Session`s.

Nothing above this package knows which runtime computes, or whether a tensor lies on the host or on
a card; a new runtime is a module here and a line in `open_backend`.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from mdf_sdk.clock import Mark
from mdf_sdk.errors import BackendUnavailableError
from mdf_sdk.manifest import PROCESSORS_ALONE, Manifest
from mdf_sdk.sessions.device_memory import Array, DeviceArray, Tensor

__all__ = [
    "DEVICES",
    "Array",
    "Backend",
    "DeviceArray",
    "Session",
    "Tensor",
    "open_backend",
]

DEVICES = ("auto", "tensorrt", "cuda", "cpu")  # after "auto", the fastest first


class Session(Protocol):
    """One loaded block. One call at a time."""

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute all outputs; the inputs have the names and dtypes of the block's spec.

        On a card they may be queued: `to_host` waits for them.
        """

    def close(self) -> None:
        """Free the block's memory; a second call does nothing."""


class Backend(Protocol):
    """A runtime on a device of this machine, for one engine.

    Attributes:
        name: e.g. "onnxruntime 1.31.1".
        device: one of DEVICES, never "auto".
        card: e.g. "NVIDIA RTX 4090 (8.9)"; the processor's name on the CPU.
        slots: predictions that may run at the same time.
        overlaps: whether independent blocks gain by running at the same time.
    """

    name: str
    device: str
    card: str
    slots: int
    overlaps: bool

    def files(self, block: str) -> tuple[str, ...]:
        """Names of the files that `open` parses."""

    def open(self, block: str, rows: Iterable[int] = ()) -> Session:
        """Load a block and check its bindings against the manifest.

        Args:
            rows: how many of them its products will have, of a block where that varies.
        """

    def text_rows(self, rows: int) -> int:
        """To how many rows a prompt of `rows` is padded, the prefix included: few shapes occur."""

    def empty_pixels(self, size: int) -> Array:
        """Undefined float32 (size,) on the host, for pixels that `run` will read.

        To be kept until `to_host` has given what came of them.
        """

    def to_host(self, tensor: Tensor) -> Array:
        """The tensor as a numpy array."""

    def mark(self) -> Mark:
        """The moment at which all that `run` has queued is done."""

    def free_and_total_bytes(self) -> tuple[int, int] | None:
        """Of the card's memory, or the host's on the CPU, by all processes; None where unknown."""

    def device_bytes(self) -> int | None:
        """Bytes in use on the card, by all processes; None on the CPU."""


def open_backend(
    device: str,
    engine_dir: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    reproducible: bool = False,
) -> Backend:
    """Open a device's backend.

    Args:
        device: one of DEVICES but "auto", which `Engine` resolves.
        threads: CPU threads of one block; None leaves it to the runtime.
        reproducible: as MDFClassifier takes it.

    Raises:
        BackendUnavailableError: no such device, or its backend does not work here; says why.
    """
    openers: dict[str, Callable[[], Backend]] = {
        "tensorrt": lambda: _tensorrt(engine_dir, manifest),
        "cuda": lambda: _cuda(engine_dir, manifest, reproducible),
        "cpu": lambda: _cpu(engine_dir, manifest, threads),
    }
    if manifest.precision in PROCESSORS_ALONE and device in ("tensorrt", "cuda"):
        raise BackendUnavailableError(
            f"device {device!r}: found an engine in {manifest.precision}, which processors alone "
            "compute in, expected one in int4 or fp16. Export the checkpoint for a card: mdf "
            "export CHECKPOINT ENGINE --precision int4"
        )
    if device not in openers:
        raise BackendUnavailableError(
            f"device: found {device!r}, expected one of {', '.join(DEVICES)}. "
            "The CPU works everywhere: pip install 'mdf-mllm[cpu]'"
        )
    return openers[device]()


def _cpu(engine_dir: Path, manifest: Manifest, threads: int | None) -> Backend:
    from mdf_sdk.sessions.onnxruntime_cpu import OnnxRuntimeCpu

    return OnnxRuntimeCpu(engine_dir, manifest, threads)


def _cuda(engine_dir: Path, manifest: Manifest, reproducible: bool) -> Backend:
    from mdf_sdk.sessions.cuda_memory import CudaMemory
    from mdf_sdk.sessions.onnxruntime_cuda import OnnxRuntimeCuda

    return OnnxRuntimeCuda(engine_dir, manifest, CudaMemory(), reproducible)


def _tensorrt(engine_dir: Path, manifest: Manifest) -> Backend:
    from mdf_sdk.sessions.cuda_memory import CudaMemory
    from mdf_sdk.sessions.tensorrt import TensorRTBackend

    return TensorRTBackend(engine_dir, manifest, CudaMemory())

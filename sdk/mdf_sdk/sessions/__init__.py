"""The seam to the runtimes below: a `Backend` opens a block's graph as a `Session`, which runs it.

Nothing above this package knows which runtime computes; a new one is a module here and a line in
`open_backend`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from mdf_sdk.errors import BackendUnavailableError
from mdf_sdk.manifest import BlockSpec

Array = npt.NDArray[Any]

DEVICES = ("auto", "cpu")


class Session(Protocol):
    """One loaded block."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute all outputs; the inputs have the names and dtypes of the block's spec."""

    def close(self) -> None:
        """Free the block's memory; a second call does nothing."""


class Backend(Protocol):
    """A runtime on a device of this machine."""

    @property
    def name(self) -> str:
        """E.g. "onnxruntime 1.31.1"."""

    @property
    def device(self) -> str:
        """One of DEVICES, never "auto"."""

    def open(self, block: str, path: Path, spec: BlockSpec) -> Session:
        """Load a block's graph and check its bindings against the spec."""


def open_backend(device: str = "auto", *, threads: int | None = None) -> Backend:
    """Choose the backend for a device.

    Args:
        device: "cpu", or "auto" for the best that works here.
        threads: CPU threads of one block; None leaves it to the runtime.

    Raises:
        BackendUnavailableError: no such device, or its backend is not installed.
    """
    if device not in DEVICES:
        raise BackendUnavailableError(
            f"device: found {device!r}, expected one of {', '.join(DEVICES)}. "
            "The CPU works everywhere: pip install 'mdf-mllm[cpu]'"
        )
    from mdf_sdk.sessions.onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(threads)

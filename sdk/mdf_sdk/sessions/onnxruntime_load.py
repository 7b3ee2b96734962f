"""What ONNX Runtime's two backends share: its import, a loaded graph that fits, its errors."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mdf_sdk.errors import (
    BackendRunError,
    BackendUnavailableError,
    DeviceMemoryError,
    ManifestError,
)
from mdf_sdk.manifest import BlockSpec, TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
# Words of ONNX Runtime's allocators, the C++ library, CUDA, cuBLAS and cuDNN.
_OUT_OF_MEMORY = (
    "Failed to allocate memory",
    "smaller than requested bytes",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "cudaErrorMemoryAllocation",
    "ALLOC_FAILED",
)


def import_onnxruntime(extra: str) -> Any:
    """Import it, quiet and without its collection of usage data.

    Raises:
        BackendUnavailableError: not installed, or broken.
    """
    # It collects usage data under the user's home and reads this once, when it is imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise BackendUnavailableError(
            f"device {extra!r}: found no working onnxruntime ({error}), expected it installed. "
            f"Install it: pip install 'mdf-mllm[{extra}]'"
        ) from error
    return onnxruntime


def session_options(runtime: Any, config: Mapping[str, str]) -> Any:
    """Make SessionOptions with these entries, that print nothing."""
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors reach us as exceptions
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options


def load_graph(
    runtime: Any,
    block: str,
    path: Path,
    spec: BlockSpec,
    options: Any,
    provider: str,
    provider_options: Mapping[str, str],
) -> Any:
    """Make an InferenceSession on the provider asked for, and no other.

    Raises:
        BackendRunError: the graph does not load, or not on that provider.
        ManifestError: its bindings are not the manifest's.
    """
    with mapped_errors(block, "load"):
        session = runtime.InferenceSession(
            path,
            options,
            providers=[(provider, dict(provider_options))],
            enable_fallback=0,  # else what fails is printed, and all of it tried on the processor
        )
        # A provider whose libraries are missing is left out without an error.
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"found only {', '.join(session.get_providers())}")
    check_bindings(block, "inputs", session.get_inputs(), spec.inputs)
    check_bindings(block, "outputs", session.get_outputs(), spec.outputs)
    return session


def check_bindings(
    block: str, kind: str, found: Sequence[Any], expected: Sequence[TensorSpec]
) -> None:
    actual = {binding.name: _DTYPES.get(binding.type, binding.type) for binding in found}
    declared = {tensor.name: tensor.dtype for tensor in expected}
    if actual != declared:
        wrong = sorted(set(actual.items()) ^ set(declared.items()))
        raise ManifestError(
            f"block {block}: found {kind} of the graph that differ from the manifest's: {wrong}, "
            "expected the same. Export it again: mdf export CHECKPOINT ENGINE"
        )


@contextmanager
def mapped_errors(block: str, action: str) -> Iterator[None]:
    try:
        yield
    except DeviceMemoryError:
        raise
    except Exception as error:
        reason = _reason(error)
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise DeviceMemoryError(
                f"block {block}: found too little memory to {action} it ({reason}), expected what "
                "this engine needs, other programs' use aside. See its need: mdf info ENGINE"
            ) from error
        raise BackendRunError(
            f"block {block}: ONNX Runtime could not {action} it ({type(error).__name__}: "
            f"{reason}), expected it to {action}. Check the engine and this machine: mdf verify "
            "ENGINE"
        ) from error


def _reason(error: Exception) -> str:
    """The first line, and of CUDA's errors what stands behind the C++ signature."""
    first = (str(error).splitlines() or [""])[0]
    return first[max(0, first.find("CUDA failure")) :][:300]

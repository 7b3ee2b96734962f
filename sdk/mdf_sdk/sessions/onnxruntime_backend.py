"""ONNX Runtime behind the seam; the only module that knows it, and where its errors are mapped."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mdf_sdk.errors import BackendRunError, BackendUnavailableError, InputError, ManifestError
from mdf_sdk.manifest import BlockSpec, TensorSpec
from mdf_sdk.sessions import Array

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU execution provider."""

    device = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        # It collects usage data under the user's home and reads this once, when it is imported.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError as error:
            raise BackendUnavailableError(
                f"device 'cpu': found no working onnxruntime ({error}), expected it installed. "
                "Install it: pip install 'mdf-mllm[cpu]'"
            ) from error
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads: found {threads}, expected at least 1, or None")
        self._runtime = onnxruntime
        self._threads = threads or 0
        self.name = f"onnxruntime {onnxruntime.__version__}"

    def open(self, block: str, path: Path, spec: BlockSpec) -> "OnnxRuntimeSession":
        options = self._runtime.SessionOptions()
        options.log_severity_level = 4  # errors reach us as exceptions
        options.intra_op_num_threads = self._threads
        with _errors(block, "load"):
            session = self._runtime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        _check_bindings(block, "inputs", session.get_inputs(), spec.inputs)
        _check_bindings(block, "outputs", session.get_outputs(), spec.outputs)
        return OnnxRuntimeSession(block, session)


class OnnxRuntimeSession:
    """One block loaded in ONNX Runtime."""

    def __init__(self, block: str, session: Any) -> None:
        self._block = block
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with _errors(self._block, "run"):
            values = self._session.run(self._outputs, dict(inputs))
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        self._session = None


def _check_bindings(
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
def _errors(block: str, action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise BackendRunError(
            f"block {block}: ONNX Runtime could not {action} it ({type(error).__name__}: "
            f"{reason}), expected it to {action}. Check the engine and this machine: mdf verify "
            "ENGINE"
        ) from error

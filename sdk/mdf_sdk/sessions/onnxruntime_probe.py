"""Whether an execution provider of ONNX Runtime works on this machine, proved on a tiny product."""

import base64
import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from mdf_sdk.errors import BackendUnavailableError

# ONNX, opset 13: y = MatMul(x, x), float32 (2, 2). Needs a library that only a card's driver has,
# and cuBLAS and cuDNN to load.
_PRODUCT = base64.b64decode(
    "CAg6QAoRCgF4CgF4EgF5IgZNYXRNdWwSAWdaEwoBeBIOCgwIARIICgIIAgoCCAJiEwoBeRIOCgwIARIICgIIAgoCCAJC"
    "BAoAEA0="
)
_CURES = {
    "CPUExecutionProvider": ("cpu", "pip install --force-reinstall 'mdf-mllm[cpu]'"),
    "CUDAExecutionProvider": (
        "cuda",
        "pip install --force-reinstall 'mdf-mllm[cuda]' brings CUDA's and cuDNN's libraries; "
        "libcuda and nvcuda come with the NVIDIA driver, 580 or later",
    ),
}


def check_provider(runtime: Any, provider: str) -> None:
    """Compute with a provider; one whose libraries are missing is left out without an error.

    Raises:
        BackendUnavailableError: it does not compute; names the library that does not load.
    """
    device, cure = _CURES[provider]
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # we say it ourselves
    try:
        session = runtime.InferenceSession(
            _PRODUCT, options, providers=[provider], enable_fallback=0
        )
        if session.get_providers()[0] != provider:
            raise RuntimeError(_missing_library(runtime) or "it was left out")
        (product,) = session.run(None, {"x": np.full((2, 2), 3, np.float32)})
        if not (product == 18).all():
            raise RuntimeError(f"3 * 3 + 3 * 3 gave {product[0, 0]}")
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise BackendUnavailableError(
            f"device {device!r}: found {provider} of onnxruntime {runtime.__version__}, which does "
            f"not compute ({reason}), expected it to. Install what it needs: {cure}"
        ) from error


def _missing_library(runtime: Any) -> str:
    """Load the CUDA provider as the runtime does; say what is missing, or nothing if it loads."""
    names = "onnxruntime_providers_cuda.dll", "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(Path(runtime.__file__).parent / "capi" / names[os.name != "nt"]))
    except OSError as error:
        return str(error)
    return ""

"""A device in, the rates at which it copies and multiplies out.

As a module (`python -m mdf_benchmarks.latency.rates DEVICE`) it is a process of its own: PyTorch,
which measures a card, neither stands in the engine's memory nor on its card.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mdf_sdk.machine import usable_cores

_REPEATS = 5
_HOST_COPY_BYTES = 2**28
_HOST_SIDE = 2048
_CARD_COPY_BYTES = 2**31
_CARD_SIDE = 8192
_FAILURE_CHARACTERS = 300


def measure_rates(device: str) -> dict[str, Any]:
    """Measure in a process of its own.

    Args:
        device: "cpu", or a card's name for PyTorch.

    Returns:
        JSON types: `copy_bytes_per_s`, read and written by a large copy; `product_flop_per_s` of a
        large product of square matrices; `product_type` of their elements; `measured_by`. The best
        of five each. Where that failed, all are None and `reason` says why.
    """
    done = subprocess.run(
        [sys.executable, "-m", "mdf_benchmarks.latency.rates", device],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        rates: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**rates, "reason": None}
    words = done.stderr.strip()[-_FAILURE_CHARACTERS:].splitlines() or ["it said nothing"]
    names = ("copy_bytes_per_s", "product_flop_per_s", "product_type", "measured_by")
    reason = f"found exit code {done.returncode} ({words[-1]}), expected rates of {device}"
    if "No module named 'torch'" in reason:
        reason = "found no PyTorch to measure the card with: pip install 'mdf-mllm[training]'"
    return {**dict.fromkeys(names), "reason": reason}


def _host_rates() -> dict[str, Any]:
    """All cores: one copies not as fast as all do."""
    workers = usable_cores()
    source = np.ones(_HOST_COPY_BYTES // 4, np.float32)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(target, workers), np.array_split(source, workers), strict=True))
    with ThreadPoolExecutor(workers) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(*part), parts))

        copy_s = _best_s(copy)
    one = np.ones((_HOST_SIDE, _HOST_SIDE), np.float32)
    product = np.empty_like(one)
    product_s = _best_s(lambda: np.matmul(one, one, out=product))
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy_s,
        "product_flop_per_s": 2 * _HOST_SIDE**3 / product_s,
        "product_type": "float32",
        "measured_by": f"numpy {np.__version__}",
    }


def _card_rates(device: str) -> dict[str, Any]:
    import torch

    dtype = (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )
    source = torch.ones(_CARD_COPY_BYTES // 2, dtype=dtype, device=device)
    target = torch.empty_like(source)
    one = torch.randn(_CARD_SIDE, _CARD_SIDE, device=device).to(dtype)

    def timed(work: Callable[[], object]) -> float:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return _best_s(run)

    return {
        "copy_bytes_per_s": 2 * _CARD_COPY_BYTES / timed(lambda: target.copy_(source)),
        "product_flop_per_s": 2 * _CARD_SIDE**3 / timed(lambda: one @ one),
        "product_type": str(dtype).removeprefix("torch."),
        "measured_by": f"torch {torch.__version__}",
    }


def _best_s(work: Callable[[], object]) -> float:
    work()
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    device_ = sys.argv[1]
    print(json.dumps(_host_rates() if device_ == "cpu" else _card_rates(device_)))

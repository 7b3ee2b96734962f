"""An engine's graphs and the machine's rates in, how near each block comes to the limit out."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdf_benchmarks.latency.rates import measure_rates
from mdf_benchmarks.latency.work import Work, count_work

# What runs for a new photograph. The two encoders may overlap; the others wait for them.
GROUPS = (("vision", "unet_encoder"), ("fusion",), ("decoder",))
NO_ONNX = "found no package onnx to count the graphs with: pip install 'mdf-mllm[export]'"


def measure_floor(
    engine_dir: Path,
    stages: Mapping[str, Mapping[str, Any]],
    *,
    device: str,
    text_rows: int,
    prefix_rows: int,
) -> dict[str, Any]:
    """Set each block's median beside the least time that this machine needs for its work.

    Args:
        engine_dir: the engine.
        stages: of a new photograph, as `Times.summarize_stages` gives them.
        device: "cpu", or a card's.
        text_rows, prefix_rows: of the question, without padding: fed, and carried as constants.

    Returns:
        JSON types. `rates`, as `measure_rates` gives them; `blocks`: for each `flop`,
        `moved_bytes`, `bytes_ms`, `arithmetic_ms`, `floor_ms` (the larger of the two), `bound`
        ("bytes" or "arithmetic"), `p50_ms` and `times_floor`; `total`: `floor_ms`, `p50_ms` and
        `times_floor` of all. What cannot be had is None, and `reason` says why.
    """
    rates = measure_rates("cpu" if device == "cpu" else "cuda")
    reasons = [rates["reason"]] if rates["reason"] else []
    if importlib.util.find_spec("onnx") is None:
        return {
            "rates": rates,
            "blocks": None,
            "total": None,
            "reason": "; ".join([NO_ONNX, *reasons]),
        }
    dims = {"B": 1, "T": text_rows, "S": prefix_rows + text_rows}
    work = {
        name: count_work(engine_dir / f"{name}.onnx", dims) for group in GROUPS for name in group
    }
    blocks = {
        name: to_floor([counted], rates, stages[name]["p50_ms"]) for name, counted in work.items()
    }
    total = None
    if not reasons:
        least_ms = sum(
            to_floor([work[name] for name in group], rates, 0.0)["floor_ms"] for group in GROUPS
        )
        measured_ms = stages["without_image"]["p50_ms"]
        total = {
            "floor_ms": least_ms,
            "p50_ms": measured_ms,
            "times_floor": measured_ms / least_ms,
        }
    return {"rates": rates, "blocks": blocks, "total": total, "reason": "; ".join(reasons) or None}


def to_floor(work: Sequence[Work], rates: Mapping[str, Any], p50_ms: float) -> dict[str, Any]:
    """Divide the work of blocks that may overlap by the machine's rates."""
    flop, moved = sum(w.flop for w in work), sum(w.moved_bytes for w in work)
    known: dict[str, Any] = {"flop": flop, "moved_bytes": moved, "p50_ms": p50_ms}
    if rates["reason"]:
        names = ("bytes_ms", "arithmetic_ms", "floor_ms", "bound", "times_floor")
        return known | dict.fromkeys(names)
    bytes_ms = 1e3 * moved / rates["copy_bytes_per_s"]
    arithmetic_ms = 1e3 * flop / rates["product_flop_per_s"]
    floor_ms = max(bytes_ms, arithmetic_ms)
    return known | {
        "bytes_ms": bytes_ms,
        "arithmetic_ms": arithmetic_ms,
        "floor_ms": floor_ms,
        "bound": "bytes" if bytes_ms > arithmetic_ms else "arithmetic",
        "times_floor": p50_ms / floor_ms,
    }

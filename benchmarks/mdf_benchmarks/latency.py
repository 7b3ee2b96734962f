"""An engine directory in, single-stream latency, stages and peak memory out."""

import resource
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mdf_sdk import MDFClassifier, Prediction
from mdf_sdk.machine import machine_card

WARM_UP = 5
PHOTOGRAPH_PX = 512
TEXTS = (
    "A 34-year-old woman, difficulty seeing in the dark since childhood; her brother is affected.",
    "A 67-year-old man with diabetes for 20 years, blurred vision in both eyes.",
)


def measure(
    engine_dir: Path, *, queries: int = 1024, device: str = "auto", threads: int | None = None
) -> dict[str, Any]:
    """Time one query after another, as a clinic's workstation asks them.

    Args:
        engine_dir: the engine.
        queries: of each kind: a new image every time; the same image with a new text.
        device, threads: as MDFClassifier takes them.

    Returns:
        JSON types. Times are wall-clock milliseconds of `predict` on a decoded array (no JPEG
        decoding); `peak_host_bytes` is the process's largest resident set, Python included.
    """
    start = time.perf_counter()
    with MDFClassifier(engine_dir, device=device, threads=threads) as classifier:
        load_ms = 1e3 * (time.perf_counter() - start)
        image = _photograph()

        def new_image(i: int) -> Prediction:
            image[:2, :2] = (i % 256, i // 256 % 256, 7)  # another picture, as the cache sees it
            return classifier.predict(image, TEXTS[0])

        def new_text(i: int) -> Prediction:
            return classifier.predict(image, TEXTS[i % 2])

        new, new_stages = _time(new_image, queries)
        same, same_stages = _time(new_text, queries)
        manifest, identity = classifier.manifest, classifier.identity
    return {
        "model": manifest.model,
        "precision": manifest.precision,
        "backend": identity.backend,
        "device": identity.device,
        "size_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "load_ms": load_ms,
        "latency": {"new_image": new, "same_image_new_text": same},
        "stages_p50_ms": {"new_image": new_stages, "same_image_new_text": same_stages},
        "peak_host_bytes": peak_host_bytes(),
        "warm_up_queries": WARM_UP,
        "threads": threads,
        "machine": machine_card(("mdf-mllm", "numpy", "onnxruntime")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def summarize(samples_ms: npt.NDArray[np.float64]) -> dict[str, float]:
    """Percentiles by nearest rank (each is a time that occurred), minimum and count."""
    p50, p90, p99 = np.percentile(samples_ms, [50, 90, 99], method="inverted_cdf")
    return {
        "min_ms": float(samples_ms.min()),
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "n": len(samples_ms),
    }


def peak_host_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def _time(
    query: Callable[[int], Prediction], queries: int
) -> tuple[dict[str, float], dict[str, float]]:
    for i in range(WARM_UP):
        query(i)
    samples, stages = np.empty(queries), []
    for i in range(queries):
        start = time.perf_counter()
        prediction = query(WARM_UP + i)
        samples[i] = 1e3 * (time.perf_counter() - start)
        stages.append(prediction.latency_ms)
    return summarize(samples), {k: float(np.median([s[k] for s in stages])) for k in stages[0]}


def _photograph() -> npt.NDArray[np.uint8]:
    """A round field of noise: latency does not depend on what is seen. uint8 (H, W, 3)."""
    rng = np.random.default_rng(0)
    image = rng.integers(60, 200, (PHOTOGRAPH_PX, PHOTOGRAPH_PX, 3), np.uint8)
    from_center = np.arange(PHOTOGRAPH_PX) - PHOTOGRAPH_PX / 2
    distance = np.hypot(from_center[:, None], from_center)
    image[distance > 0.48 * PHOTOGRAPH_PX] = 0
    return image

"""An engine directory in, single-stream latency, stages, cold start and peak memory out."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mdf_benchmarks.inputs import (
    DECODED_PX,
    ENCODED_PX,
    TEXTS,
    jpeg,
    numbered,
    photograph,
    texts_of,
)
from mdf_benchmarks.latency.cold_start import measure_cold_start
from mdf_benchmarks.latency.reference import compare_with_reference
from mdf_benchmarks.memory import peak_host_bytes
from mdf_sdk import InputError, MDFClassifier, Prediction, check_files, load_manifest
from mdf_sdk.machine import machine_card
from mdf_sdk.manifest import TOKENIZER_NAME
from mdf_sdk.prompt import PromptEncoder

WARM_UP = 5
BATCHES = (2, 8)
_FEWER = 8  # batches and encoded photographs are asked an eighth as often
_PHOTOGRAPHS = 8  # encoded ones, in turn, so that none is still kept when it comes again
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt")


def measure(
    engine_dir: Path,
    *,
    queries: int = 1024,
    device: str = "auto",
    threads: int | None = None,
    reference: Path | None = None,
    text_tokens: int | None = None,
) -> dict[str, Any]:
    """Time one call after another, as a clinic's workstation asks them.

    Args:
        engine_dir: the engine.
        queries: calls with a new photograph each time, and with the same one and a new text;
            batches and encoded photographs are called an eighth as often.
        device, threads: as MDFClassifier takes them.
        reference: the checkpoint that the engine was exported from: PyTorch answers the same
            questions in turn with the engine.
        text_tokens: of the clinical texts; None takes two sentences of usual length.

    Returns:
        JSON types. `latency` holds wall-clock milliseconds of whole calls by kind, on decoded
        photographs of 512 px; batches per call. `stages` splits each kind, per case;
        `without_image` is the total without squaring the photograph. `prompt_tokens` counts the
        instruction, which the engine carries as constants, the text, the question and the labels.
        `decode_and_square` is the stage `image` of a JPEG of 1411 px, in no other figure.
        `peak_host_bytes` is the process's largest resident set before any batch, Python included,
        `peak_host_bytes_batch_8` after them; None where the system does not tell.
        `peak_device_bytes` is the largest reading between kinds, None on a CPU.

    Raises:
        InputError: the reference has other labels or picture sizes than the engine, or the texts
            cannot be had.
        MissingExtraError: the reference needs the training extra.
    """
    if reference is not None and text_tokens is not None:
        raise InputError("found a reference and text_tokens, expected one: PyTorch is asked TEXTS")
    encoder = _prompt_encoder(engine_dir)
    texts = TEXTS if text_tokens is None else texts_of(text_tokens, encoder)
    tokens = len(encoder.encode(texts[0]).ids)
    cold_start = measure_cold_start(
        engine_dir, device=device, threads=threads, runs=3 if queries > 100 else 1
    )
    few = max(1, queries // _FEWER)
    latency: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    device_bytes: list[int | None] = []
    start = time.perf_counter()
    with MDFClassifier(engine_dir, device=device, threads=threads) as classifier:
        load_ms = 1e3 * (time.perf_counter() - start)
        image = photograph(DECODED_PX)

        def new_image(i: int) -> Prediction:
            return classifier.predict(numbered(image, i), texts[0])

        def new_text(i: int) -> Prediction:
            return classifier.predict(image, texts[i % 2])

        def time_kind(kind: str, query: Callable[[int], Prediction], n: int) -> None:
            latency[kind], stages[kind] = _time(query, n)
            device_bytes.append(classifier.device_bytes())

        compared = None
        if reference is not None:
            calls = {"new_image": new_image, "same_image_new_text": new_text}
            compared = compare_with_reference(classifier, reference, calls, queries, threads)
        time_kind("new_image", new_image, queries)
        time_kind("same_image_new_text", new_text, queries)
        decode_and_square = _time_decoding(classifier, few)
        single_bytes = peak_host_bytes()
        for size in BATCHES:

            def batch(i: int, size: int = size) -> Prediction:
                images = [numbered(image, size * i + j) for j in range(size)]
                return classifier.predict_batch(images, [texts[j % 2] for j in range(size)])[0]

            kind = f"batch_{size}"
            time_kind(kind, batch, few)
            latency[kind]["p50_ms_per_case"] = latency[kind]["p50_ms"] / size
        manifest, identity = classifier.manifest, classifier.identity
    known_bytes = [value for value in device_bytes if value is not None]
    return {
        "model": manifest.model,
        "precision": manifest.precision,
        "backend": identity.backend,
        "device": identity.device,
        "card": identity.card,
        "size_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "text_tokens": tokens,
        "prompt_tokens": len(encoder.prefix_ids) + encoder.count_rows(tokens),
        "load_ms": load_ms,
        "cold_start": cold_start,
        "latency": latency,
        "stages": stages,
        "decode_and_square": decode_and_square,
        "peak_host_bytes": single_bytes,
        "peak_host_bytes_batch_8": peak_host_bytes(),
        "peak_device_bytes": max(known_bytes, default=None),
        "reference": compared,
        "warm_up_queries": WARM_UP,
        "threads": threads,
        "machine": machine_card(("mdf-mllm", "numpy", *_installed(_RUNTIMES))),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _prompt_encoder(engine_dir: Path) -> PromptEncoder:
    manifest = load_manifest(engine_dir)
    check_files(engine_dir, manifest)
    tokenizer_json = (engine_dir / TOKENIZER_NAME).read_text(encoding="utf-8")
    return PromptEncoder(tokenizer_json, manifest.prompt, manifest.labels)


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


def _time(
    query: Callable[[int], Prediction], queries: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Summaries of whole calls, and of each stage."""
    for i in range(WARM_UP):
        query(i)
    samples, stages = np.empty(queries), []
    for i in range(queries):
        start = time.perf_counter()
        prediction = query(WARM_UP + i)
        samples[i] = 1e3 * (time.perf_counter() - start)
        times = prediction.latency_ms
        stages.append({**times, "without_image": times["total"] - times["image"]})
    by_stage = {name: summarize(np.array([s[name] for s in stages])) for name in stages[0]}
    kept = ("p50_ms", "p99_ms")
    return summarize(samples), {
        name: {key: summary[key] for key in kept} for name, summary in by_stage.items()
    }


def _time_decoding(classifier: MDFClassifier, queries: int) -> dict[str, float]:
    files = [jpeg(photograph(ENCODED_PX, number)) for number in range(_PHOTOGRAPHS)]

    def encoded(i: int) -> Prediction:
        return classifier.predict(files[i % _PHOTOGRAPHS], TEXTS[0])

    samples = [encoded(i).latency_ms["image"] for i in range(-WARM_UP, queries)]
    return {
        **summarize(np.array(samples[WARM_UP:])),
        "side_px": ENCODED_PX,
        "file_bytes": len(files[0]),
    }


def _installed(packages: tuple[str, ...]) -> list[str]:
    found = {distribution.name for distribution in metadata.distributions()}
    return [name for name in packages if name in found]

"""An engine directory in; latency, stages, sweeps, cold start, memory, floor and rivals out."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mdf_benchmarks.inputs import (
    DECODED_PX,
    ENCODED_PX,
    TEXTS,
    jpeg,
    numbered,
    photograph,
    texts_of,
)
from mdf_benchmarks.latency.against import KINDS, time_peer, with_ratios
from mdf_benchmarks.latency.card import Card
from mdf_benchmarks.latency.cold_start import measure_cold_start
from mdf_benchmarks.latency.floor import measure_floor
from mdf_benchmarks.latency.peer_process import (
    NEEDS_CHECKPOINT,
    PeerOptions,
    check_peers,
    check_reference,
)
from mdf_benchmarks.latency.statistics import summarize
from mdf_benchmarks.latency.timing import ROUNDS, WARM_UP, Question, time_rounds
from mdf_benchmarks.latency.watch import Watch
from mdf_benchmarks.machine import describe_machine
from mdf_benchmarks.memory import peak_host_bytes
from mdf_sdk import MDFClassifier, Prediction, check_files, load_manifest
from mdf_sdk.manifest import TOKENIZER_NAME
from mdf_sdk.prompt import PromptEncoder

FORMAT = "mdf benchmark, 2"
BATCHES = (1, 2, 4, 8)
CALLERS = (1, 2, 4, 8)
_FEWER = 8  # sweeps and encoded photographs are asked an eighth as often
_LEAST_CALLS = 3  # of a batch, or of each caller
_PHOTOGRAPHS = 8  # encoded ones, in turn, so that none is still kept when it comes again
POLICY = (
    f"{ROUNDS} rounds, in each a tenth of the calls of every kind; {WARM_UP} calls of each kind "
    "before the first round and one where a kind's turn begins do not count, all others do"
)


@dataclass(frozen=True)
class Plan:
    """How much is asked.

    Attributes:
        queries: of a new photograph, and of the same one with a new text.
        least_s: seconds that the calls with a new photograph take together at least.
        cold_starts: processes started.
    """

    queries: int
    least_s: float
    cold_starts: int


FULL = Plan(queries=1024, least_s=60.0, cold_starts=3)  # MLPerf's single stream
QUICK = Plan(queries=50, least_s=0.0, cold_starts=1)


def measure(
    engine_dir: Path,
    plan: Plan = FULL,
    *,
    device: str = "auto",
    threads: int | None = None,
    against: Sequence[str] = (),
    checkpoint: Path | None = None,
    text_tokens: int | None = None,
    classifier_type: Callable[..., MDFClassifier] = MDFClassifier,
) -> dict[str, Any]:
    """Time one call after another, as a clinic's workstation asks them.

    Args:
        engine_dir: the engine.
        plan: how much is asked.
        device, threads: as MDFClassifier takes them.
        against: peers, asked in turn with the engine where it runs on the processor. On a card they
            wait until it has left (`against.add_peers`): the report's `peers` is empty.
        checkpoint: what the engine was exported from, for the peer that runs it.
        text_tokens: of the clinical texts; None takes two sentences of usual length.
        classifier_type: makes the classifier.

    Returns:
        JSON types; docs/benchmark.md says what each key holds.

    Raises:
        InputError: an unknown peer, another model's checkpoint, or texts that cannot be had.
        EngineError, BackendError: as MDFClassifier.
    """
    manifest = load_manifest(engine_dir)
    check_files(engine_dir, manifest)
    check_peers(against)
    if NEEDS_CHECKPOINT in against:
        check_reference(checkpoint, manifest)
    encoder, texts = texts_for(engine_dir, text_tokens)
    cold_start = measure_cold_start(
        engine_dir, device=device, threads=threads, runs=plan.cold_starts
    )
    card = Card.open() if device != "cpu" else None
    few = max(1, plan.queries // _FEWER)
    with Watch(card) as watch:
        with watch.phase("load"):
            start = time.perf_counter()
            classifier = classifier_type(engine_dir, device=device, threads=threads)
            load_ms = 1e3 * (time.perf_counter() - start)
        with classifier, watch.following(classifier.device_bytes):
            identity = classifier.identity
            if identity.device == "cpu":
                watch.leave_card()
            questions = _questions(classifier, texts)
            with watch.phase("single stream"):
                stream = time_rounds(questions, plan.queries, least_s=plan.least_s)
            single_host_bytes, single_device_bytes = peak_host_bytes(), watch.most_device_bytes()
            with watch.phase("encoded photographs"):
                decoding = _time_decoding(classifier, few)
            with watch.phase("batches"):
                batches = [_time_batches(classifier, size, few, texts) for size in BATCHES]
            with watch.phase("callers"):
                callers = [_time_callers(classifier, n, few, texts[0]) for n in CALLERS]
            options = PeerOptions(engine_dir, checkpoint, "cpu", threads, texts)
            peers = [
                time_peer(name, options, plan.queries, questions)
                for name in against
                if identity.device == "cpu"
            ]
    latency = {kind: found.report() for kind, found in stream.times.items()}
    stages = {kind: found.stages() for kind, found in stream.times.items()}
    tokens = len(encoder.encode(texts[0]).ids)
    asked = sum(WARM_UP + ROUNDS + found["n"] for found in latency.values())
    return {
        "format": FORMAT,
        "notice": manifest.notice,
        "model": manifest.model,
        "precision": manifest.precision,
        "backend": identity.backend,
        "device": identity.device,
        "card": identity.card,
        "manifest_sha256": identity.manifest_sha256,
        "size_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "machine": describe_machine(None if identity.device == "cpu" else card),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "policy": POLICY,
        "quick": plan.queries < FULL.queries,
        "warm_up_queries": WARM_UP,
        "text_tokens": tokens,
        "instruction_tokens": len(encoder.prefix_ids),
        "prompt_tokens": len(encoder.prefix_ids) + encoder.count_rows(tokens),
        "load_ms": load_ms,
        "cold_start": cold_start,
        "pace": stream.report_pace(),
        "latency": latency,
        "stages": stages,
        "decode_and_square": decoding,
        "batches": batches,
        "callers": callers,
        "memory": {
            "peak_host_bytes": single_host_bytes,
            "steady_host_bytes": watch.median_bytes("single stream", "host"),
            "peak_device_bytes": single_device_bytes,
            "steady_device_bytes": watch.median_bytes("single stream", "device"),
            "peak_after_sweeps_host_bytes": peak_host_bytes(),
            "peak_after_sweeps_device_bytes": watch.most_device_bytes(),
            **watch.memory(),
        },
        "card_state": watch.card_state("single stream", asked),
        "floor": measure_floor(
            engine_dir,
            stages["new_image"] | {"without_image": latency["new_image"]["without_image"]},
            device=identity.device,
            text_rows=encoder.count_rows(tokens),
            prefix_rows=len(encoder.prefix_ids),
        ),
        "peers": [with_ratios(peer, latency) for peer in peers],
    }


def texts_for(engine_dir: Path, tokens: int | None) -> tuple[PromptEncoder, tuple[str, str]]:
    """Return an engine's prompt encoder, and the two texts that are asked.

    Raises:
        InputError: no text has so many tokens.
    """
    manifest = load_manifest(engine_dir)
    tokenizer_json = (engine_dir / TOKENIZER_NAME).read_text(encoding="utf-8")
    encoder = PromptEncoder(tokenizer_json, manifest.prompt, manifest.labels)
    return encoder, TEXTS if tokens is None else texts_of(tokens, encoder)


def _questions(classifier: MDFClassifier, texts: tuple[str, str]) -> dict[str, Question]:
    picture = photograph(DECODED_PX)

    def new_image(i: int) -> Callable[[], Prediction]:
        other = numbered(picture, i)
        return lambda: classifier.predict(other, texts[0])

    def same_image_new_text(i: int) -> Callable[[], Prediction]:
        return lambda: classifier.predict(picture, texts[i % 2])

    return dict(zip(KINDS, (new_image, same_image_new_text), strict=True))


def _time_decoding(classifier: MDFClassifier, queries: int) -> dict[str, Any]:
    files = [jpeg(photograph(ENCODED_PX, number)) for number in range(_PHOTOGRAPHS)]

    def encoded(i: int) -> float:
        return classifier.predict(files[i % _PHOTOGRAPHS], TEXTS[0]).latency_ms["image"]

    samples = [encoded(i) for i in range(-WARM_UP, queries)][WARM_UP:]
    return {
        **summarize(np.array(samples)),
        "side_px": ENCODED_PX,
        "file_bytes": len(files[0]),
    }


def _time_batches(
    classifier: MDFClassifier, size: int, cases: int, texts: tuple[str, str]
) -> dict[str, Any]:
    """Time `predict_batch` with as many new photographs in all, whatever the size."""
    calls = max(_LEAST_CALLS, cases // size)
    picture, spent_ms = photograph(DECODED_PX), []
    for i in range(-1, calls):
        pictures = [numbered(picture, size * i + j) for j in range(size)]
        start = time.perf_counter()
        classifier.predict_batch(pictures, [texts[j % 2] for j in range(size)])
        spent_ms.append(1e3 * (time.perf_counter() - start))
    summary = summarize(np.array(spent_ms[1:]))
    return {
        "batch": size,
        **summary,
        "p50_ms_per_case": summary["p50_ms"] / size,
        "per_s": 1e3 * size * calls / sum(spent_ms[1:]),
    }


def _time_callers(classifier: MDFClassifier, callers: int, cases: int, text: str) -> dict[str, Any]:
    """Time threads that share so many questions, each asking one after another."""
    calls = max(_LEAST_CALLS, cases // callers)
    picture = photograph(DECODED_PX)

    def call(caller: int) -> list[float]:
        spent_ms = []
        for i in range(calls):
            other = numbered(picture, caller * calls + i)
            start = time.perf_counter()
            classifier.predict(other, text)
            spent_ms.append(1e3 * (time.perf_counter() - start))
        return spent_ms

    with ThreadPoolExecutor(callers) as pool:
        start = time.perf_counter()
        samples = [ms for spent_ms in pool.map(call, range(callers)) for ms in spent_ms]
        elapsed_s = time.perf_counter() - start
    return {"callers": callers, **summarize(np.array(samples)), "per_s": len(samples) / elapsed_s}

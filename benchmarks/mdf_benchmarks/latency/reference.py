"""A checkpoint in, the times and memory of PyTorch on the engine's own questions out.

As a module (`python -m mdf_benchmarks.latency.reference`) it is the process that runs PyTorch, so
that its memory is its own: a JSON request a line in, a JSON answer a line out.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from mdf_benchmarks.inputs import DECODED_PX, TEXTS, numbered, photograph
from mdf_benchmarks.memory import peak_host_bytes
from mdf_sdk import MDFClassifier, Prediction, errors
from mdf_sdk.extras import import_extra
from mdf_sdk.machine import machine_card
from mdf_sdk.preprocessing import to_pixels

ROUNDS = 20
_WARM_UP = 3


def compare_with_reference(
    classifier: MDFClassifier,
    checkpoint_dir: Path,
    calls: Mapping[str, Callable[[int], Prediction]],
    queries: int,
    threads: int | None,
) -> dict[str, Any]:
    """Ask engine and PyTorch in turn, a few questions each, so that noise hits both.

    Args:
        calls: the engine's, by kind: "new_image", "same_image_new_text".
        queries: of each kind; at most 100 are asked, in 20 rounds.
        threads: of PyTorch.

    Returns:
        JSON types. By kind: medians of both in milliseconds, also of processor time (all threads
        of the process: what others do on the machine hardly moves it), and how many times as long
        as the engine PyTorch takes: median, least and most of the rounds. `memory_share`: the
        engine's process's peak over that of PyTorch's, after the same questions.
    """
    each = max(1, min(queries, 100) // ROUNDS)
    with ReferenceProcess(checkpoint_dir, threads) as reference:
        reference.check_same_task(classifier)
        kinds = {
            kind: _interleave(call, partial(reference.ask, kind), each)
            for kind, call in calls.items()
        }
        ours, theirs = peak_host_bytes(), reference.peak_host_bytes()
        return {
            **reference.about,
            "rounds": ROUNDS,
            "queries_a_round": each,
            "latency": kinds,
            "peak_host_bytes": theirs,
            "engine_peak_host_bytes": ours,
            "memory_share": ours / theirs if ours and theirs else None,
        }


class ReferenceProcess:
    """The process that runs PyTorch; a context manager that ends it.

    Attributes:
        about: what runs there, for the report.
    """

    def __init__(self, checkpoint_dir: Path, threads: int | None) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mdf_benchmarks.latency.reference",
                str(checkpoint_dir),
                str(threads or 0),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._task, self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, kind: str, number: int) -> tuple[float, float]:
        """Return the milliseconds that PyTorch took over one question: wall clock, processor."""
        wall_ms, cpu_ms = self._request(kind, number)
        return wall_ms, cpu_ms

    def peak_host_bytes(self) -> int | None:
        """Largest resident set of that process so far."""
        peak: int | None = self._request("peak_host_bytes", 0)
        return peak

    def check_same_task(self, classifier: MDFClassifier) -> None:
        """Raise InputError where the engine was made of another model."""
        manifest = classifier.manifest
        expected = _task(manifest.model, manifest.labels, manifest.image.unet_px)
        if self._task != expected:
            raise errors.InputError(
                f"reference: found a checkpoint of {self._task}, expected {expected}: the one that "
                "the engine was exported from"
            )

    def close(self) -> None:
        """End the process; a second call does nothing."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def _request(self, kind: str, number: int) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([kind, number]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise errors.BackendRunError(
                f"reference: the process that runs PyTorch ended, exit code {self._process.wait()},"
                " expected an answer. What it printed stands above"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"]["type"])(answer["error"]["message"])
        return answer["value"]


def _interleave(
    engine: Callable[[int], Prediction],
    reference: Callable[[int], tuple[float, float]],
    each: int,
) -> dict[str, Any]:
    """Time both in turn; `each` questions of one, then of the other."""
    for i in range(_WARM_UP):
        engine(i)
        reference(i)
    ours, theirs = np.empty((2, ROUNDS, each)), np.empty((2, ROUNDS, each))
    for round_ in range(ROUNDS):
        numbers = range(_WARM_UP + round_ * each, _WARM_UP + (round_ + 1) * each)
        for column, i in enumerate(numbers):
            ours[:, round_, column] = _timed_ms(partial(engine, i))
        for column, i in enumerate(numbers):
            theirs[:, round_, column] = reference(i)
    ratios = np.median(theirs[0], axis=1) / np.median(ours[0], axis=1)
    return {
        "engine_p50_ms": float(np.median(ours[0])),
        "reference_p50_ms": float(np.median(theirs[0])),
        "engine_min_ms": float(ours[0].min()),
        "reference_min_ms": float(theirs[0].min()),
        "engine_cpu_p50_ms": float(np.median(ours[1])),
        "reference_cpu_p50_ms": float(np.median(theirs[1])),
        "ratio_median": float(np.median(ratios)),
        "ratio_least": float(ratios.min()),
        "ratio_most": float(ratios.max()),
    }


def _timed_ms(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of a call: wall clock, and processor time of all threads."""
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu_start)


def _task(model: str, labels: tuple[str, ...], unet_px: int) -> str:
    return f"{model}, {unet_px} px, {', '.join(labels)}"


class _PyTorch:
    """The fused model in float32, eager, as a user runs it: inference mode, SDPA attention."""

    def __init__(self, checkpoint_dir: Path, threads: int) -> None:
        import_extra("mdf_training.evaluation.checkpoint_scorer", "training")
        import torch

        from mdf_training.checkpoint import load_checkpoint

        if threads:
            torch.set_num_threads(threads)
        start = time.perf_counter()
        checkpoint = load_checkpoint(checkpoint_dir)
        self.load_ms = 1e3 * (time.perf_counter() - start)
        self._model, self._encoder = checkpoint.model, checkpoint.prompt_encoder()
        self._image = photograph(DECODED_PX)
        config = checkpoint.config
        self.task = _task(config.preset, config.labels, config.image.unet_px)
        self.about = {
            "model": "PyTorch float32, eager",
            "load_ms": self.load_ms,
            "threads": torch.get_num_threads(),
            "versions": machine_card(("torch", "transformers"))["versions"],
        }
        self._features: Any = None
        self.ask("new_image", 0)

    def ask(self, kind: str, number: int) -> None:
        """Answer a question, from the decoded photograph to label scores.

        What depends on the photograph alone is kept for the next text, as the engine keeps it.
        """
        import torch

        image = numbered(self._image, number)
        with torch.inference_mode():
            if kind == "new_image":
                pixels = to_pixels(image, self._model.config.image)
                tower, unet = (torch.from_numpy(p)[None] for p in pixels)
                self._features = self._model.encode_image(tower, unet)
            self._decode(TEXTS[number % 2 if kind == "same_image_new_text" else 0])

    def _decode(self, text: str) -> None:
        from mdf_training.model import PromptTensors

        packed = self._encoder.pack([self._encoder.encode(text)])
        prompt = PromptTensors.from_packed(packed, self._encoder, "cpu")
        hidden, _ = self._model.decode_text(self._features.states, prompt)
        self._model.score_labels(hidden, prompt).numpy()


def _serve(checkpoint_dir: Path, threads: int, requests: IO[str], answers: IO[str]) -> None:
    """Be the process: answer until the requests end."""

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        model = _PyTorch(checkpoint_dir, threads)
    except errors.MDFError as error:
        answer(error={"type": type(error).__name__, "message": str(error)})
        return
    answer(value=[model.task, model.about])
    for line in requests:
        kind, number = json.loads(line)
        if kind == "peak_host_bytes":
            answer(value=peak_host_bytes())
        else:
            answer(value=_timed_ms(partial(model.ask, kind, number)))


if __name__ == "__main__":
    answers_, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    _serve(Path(sys.argv[1]), int(sys.argv[2]), sys.stdin, answers_)

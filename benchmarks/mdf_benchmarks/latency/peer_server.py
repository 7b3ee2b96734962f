"""The process of a peer: a JSON request a line in, a JSON answer a line out."""

import importlib
import json
import os
import sys
import time
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from mdf_benchmarks.inputs import DECODED_PX, numbered, photograph
from mdf_benchmarks.latency.peer_process import NotAvailableError, PeerOptions, Status
from mdf_benchmarks.machine import versions_of
from mdf_benchmarks.memory import peak_host_bytes

_REASON_CHARACTERS = 400
# PyTorch's exception; CUDA's words and cuBLAS'; PyTorch's on the processor.
_OUT_OF_MEMORY = ("outofmemory", "out of memory", "alloc_failed", "allocate memory")
_PACKAGES = ("torch", "transformers", "bitsandbytes", "torchao")


class Peer(Protocol):
    """A rival, made with PeerOptions.

    Attributes:
        model: what it is, in words.
    """

    model: str

    def prepare(self, picture: npt.NDArray[np.uint8]) -> Any:
        """Make a decoded photograph, uint8 (H, W, 3) RGB, what the model reads; on the host."""

    def look(self, prepared: Any) -> None:
        """Compute what depends on the photograph alone, and keep it."""

    def answer(self, text: str) -> None:
        """Score a text about the photograph that was last looked at, down to numbers on the
        host."""

    def forget_peak(self) -> None:
        """Count the card's memory from now on: rivals load in many ways."""

    def peak_device_bytes(self) -> int | None:
        """The most that it held on the card; None on the processor."""


def serve(factory: str, options: PeerOptions, requests: IO[str], answers: IO[str]) -> None:
    """Answer until the requests end, or one fails."""

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        module, name = factory.split(":")
        start = time.perf_counter()
        peer: Peer = getattr(importlib.import_module(module), name)(options)
        load_ms = 1e3 * (time.perf_counter() - start)
        picture = photograph(DECODED_PX)

        def ask(kind: str, number: int) -> tuple[float, float, float]:
            """Return milliseconds: whole, preparing the photograph, of the processor."""
            other = numbered(picture, number)
            text = options.texts[number % 2 if kind == "same_image_new_text" else 0]
            start, cpu_start = time.perf_counter(), time.process_time()
            prepared_at = start
            if kind == "new_image":
                prepared = peer.prepare(other)
                prepared_at = time.perf_counter()
                peer.look(prepared)
            peer.answer(text)
            end, cpu_end = time.perf_counter(), time.process_time()
            return 1e3 * (end - start), 1e3 * (prepared_at - start), 1e3 * (cpu_end - cpu_start)

        first_ms, *_ = ask("new_image", 0)
        peer.forget_peak()
        versions = versions_of(_PACKAGES)
        answer(
            value={
                "model": peer.model,
                "load_ms": load_ms,
                "first_answer_ms": first_ms,
                "versions": versions,
            }
        )
        for line in requests:
            kind, number = json.loads(line)
            if kind == "memory":
                held = {"peak_device_bytes": peer.peak_device_bytes()}
                answer(value=held | {"peak_host_bytes": peak_host_bytes()})
            else:
                answer(value=ask(kind, number))
    except Exception as error:  # whatever a rival raises is told, and the others go on
        answer(failure={"status": _status(error), "reason": _reason(error)})


def _status(error: Exception) -> Status:
    if isinstance(error, NotAvailableError | ImportError):
        return "not_available"
    words = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or any(sign in words for sign in _OUT_OF_MEMORY):
        return "out_of_memory"
    return "failed"


def _reason(error: Exception) -> str:
    if isinstance(error, NotAvailableError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"found no package {error.name}: pip install 'mdf-mllm[training]'"
    return f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]


if __name__ == "__main__":
    # What libraries print is no answer, nor is what their C code and their compilers do.
    answers_, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    serve(sys.argv[1], PeerOptions.from_json(sys.argv[2]), sys.stdin, answers_)

"""The process of a peer: a JSON request a line in, a JSON answer a line out."""

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from mdf_benchmarks.inputs import DECODED_PX, numbered, photograph
from mdf_benchmarks.latency.peer_process import NotAvailableError, PeerOptions, Status
from mdf_benchmarks.machine import versions_of
from mdf_benchmarks.memory import peak_host_bytes

_REASON_CHARACTERS = 400
_PACKAGES = ("torch", "transformers", "bitsandbytes", "torchao")


class Peer(Protocol):
    """A rival. Every call ends when its result is there, on the host where it is the last."""

    model: str

    def prepare(self, picture: npt.NDArray[np.uint8]) -> Any:
        """Make a decoded photograph, uint8 (H, W, 3) RGB, what the model reads."""

    def look(self, prepared: Any) -> None:
        """Compute what depends on the photograph alone, and keep it."""

    def answer(self, text: str) -> None:
        """Score a text about the photograph that was last looked at."""


def serve(factory: str, options: PeerOptions, requests: IO[str], answers: IO[str]) -> None:
    """Answer until the requests end, or one fails."""

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        start = time.perf_counter()
        peer, synchronize = _load(factory, options)
        load_ms = 1e3 * (time.perf_counter() - start)
        server = _Server(peer, options, synchronize)
        first_ms, *_ = server.ask("new_image", 0)
        about = {
            "model": peer.model,
            "load_ms": load_ms,
            "first_answer_ms": first_ms,
            "versions": versions_of(_PACKAGES),
        }
        server.forget_peak()
        answer(value=about)
        for line in requests:
            kind, number = json.loads(line)
            answer(value=server.memory() if kind == "memory" else server.ask(kind, number))
    except Exception as error:  # whatever a rival raises is told, and the others go on
        answer(failure={"status": _status(error), "reason": _reason(error)})


class _Server:
    def __init__(self, peer: Peer, options: PeerOptions, synchronize: Callable[[], None]) -> None:
        self._peer, self._options, self._synchronize = peer, options, synchronize
        self._picture = photograph(DECODED_PX)

    def ask(self, kind: str, number: int) -> tuple[float, float, float]:
        """Time one question: whole, preparing the photograph, processor time of all threads."""
        import torch

        picture = numbered(self._picture, number)
        text = self._options.texts[number % 2 if kind == "same_image_new_text" else 0]
        start, cpu_start = time.perf_counter(), time.process_time()
        prepared_at = start
        with torch.inference_mode():
            if kind == "new_image":
                prepared = self._peer.prepare(picture)
                prepared_at = time.perf_counter()
                self._peer.look(prepared)
            self._peer.answer(text)
        self._synchronize()
        end, cpu_end = time.perf_counter(), time.process_time()
        return 1e3 * (end - start), 1e3 * (prepared_at - start), 1e3 * (cpu_end - cpu_start)

    def forget_peak(self) -> None:
        """What loading took on the card is no part of the peak: others load in other ways."""
        if self._options.device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int | None]:
        device_bytes = None
        if self._options.device == "cuda":
            import torch

            device_bytes = torch.cuda.max_memory_reserved()
        return {"peak_host_bytes": peak_host_bytes(), "peak_device_bytes": device_bytes}


def _load(factory: str, options: PeerOptions) -> tuple[Peer, Callable[[], None]]:
    """Make the peer, and what waits for the card."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise NotAvailableError("found no card that PyTorch can use, expected one")
    module, name = factory.split(":")
    peer: Peer = getattr(importlib.import_module(module), name)(options)
    return peer, torch.cuda.synchronize if options.device == "cuda" else lambda: None


def _status(error: Exception) -> Status:
    if isinstance(error, NotAvailableError | ImportError):
        return "not_available"
    words = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or "outofmemory" in words or "allocate memory" in words:
        return "out_of_memory"
    return "failed"


def _reason(error: Exception) -> str:
    if isinstance(error, NotAvailableError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"found no package {error.name}: pip install 'mdf-mllm[training]'"
    return f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]


if __name__ == "__main__":
    answers_, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    serve(sys.argv[1], PeerOptions.from_json(sys.argv[2]), sys.stdin, answers_)

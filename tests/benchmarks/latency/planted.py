"""Peers of known behavior, for the process that asks them."""

import os
import signal
import sys
import time
from typing import Any

from mdf_benchmarks.latency.peer_process import NotAvailableError, PeerOptions

ANSWER_S = 0.02


class Steady:
    """Prepares for 10 ms, looks for 10 ms and answers in 20."""

    model = "planted"

    def __init__(self, options: PeerOptions) -> None:
        self.options = options
        print("what a library prints is no answer")
        os.write(1, b"what its C code prints is none either\n")

    def prepare(self, picture: Any) -> Any:
        time.sleep(ANSWER_S / 2)
        return picture

    def look(self, prepared: Any) -> None:
        time.sleep(ANSWER_S / 2)

    def answer(self, text: str) -> None:
        time.sleep(ANSWER_S)

    def forget_peak(self) -> None: ...

    def peak_device_bytes(self) -> int | None:
        return 7


class Quick(Steady):
    """Takes next to no time."""

    def prepare(self, picture: Any) -> Any: ...

    def look(self, prepared: Any) -> None: ...

    def answer(self, text: str) -> None: ...


class Missing(Quick):
    """A package of it is missing."""

    def __init__(self, options: PeerOptions) -> None:
        import no_such_package  # noqa: F401


class Cardless(Quick):
    """Wants a card."""

    def __init__(self, options: PeerOptions) -> None:
        raise NotAvailableError("found no card, expected one")


class Greedy(Quick):
    """Has memory for some answers, and then no more: as PyTorch says it of a card."""

    left = 4

    def answer(self, text: str) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. OutOfMemoryError")


class Crashing(Quick):
    """Ends as a library does that calls abort()."""

    def look(self, prepared: Any) -> None:
        print("terminate called", file=sys.stderr, flush=True)
        os._exit(3)


class Spent(Quick):
    """Has no memory, as CUDA says it where PyTorch's allocator does not ask."""

    def answer(self, text: str) -> None:
        raise RuntimeError("CUDA error: out of memory")


class Killed(Quick):
    """Meets the system's killer, which comes when memory is full."""

    def look(self, prepared: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Raising(Quick):
    """Has a bug."""

    def answer(self, text: str) -> None:
        raise KeyError("cross_attention_states")


class Stuck(Quick):
    """Never ends."""

    def answer(self, text: str) -> None:
        time.sleep(3600)

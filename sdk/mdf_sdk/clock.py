"""How long each stage of a prediction takes, on the host or in a device's queue of work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, Self


class Mark(Protocol):
    """A moment, which on a device may be still to come."""

    def ms_since(self, earlier: Self) -> float:
        """Milliseconds from another mark of the kind to this one; waits until both have come."""


class HostMark:
    """The moment at which it is made."""

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def ms_since(self, earlier: Self) -> float:
        return 1000 * (self._seconds - earlier._seconds)


class Clock:
    """Adds up the milliseconds of each stage; any number of threads may use it."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def __call__(self, stage: str, mark: Callable[[], Mark] = HostMark) -> Iterator[None]:
        """Time what is done, or is queued, meanwhile; what fails is not counted."""
        start = mark()
        yield
        self._spans.append((stage, start, mark()))

    def ms(self) -> dict[str, float]:
        """The milliseconds so far; waits for what is queued."""
        total: dict[str, float] = {}
        for stage, start, end in self._spans:
            total[stage] = total.get(stage, 0.0) + end.ms_since(start)
        return total

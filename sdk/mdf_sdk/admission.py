"""A bounded queue before the device: who may run, who waits, who is turned away."""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from mdf_sdk.errors import BusyError, ClosedError, InputError


class Admission:
    """At most `slots` calls run at a time and at most `max_waiting` more wait for their turn.

    Who came first runs first: without that, a thread that leaves and enters again would always be
    quicker than those that have to wake up.
    """

    def __init__(self, slots: int, max_waiting: int) -> None:
        self._slots, self._max_waiting = slots, max_waiting
        self._running = 0
        self._queue = deque[object]()  # one entry for each that waits
        self._closed = False
        self._changed = threading.Condition()
        self._process = os.getpid()

    @contextmanager
    def enter(self, timeout_s: float | None = None, *, again: bool = False) -> Iterator[None]:
        """Wait for a slot, and hold it until the block ends.

        Args:
            timeout_s: longest wait; None has no end.
            again: for the next case of a call that was let in: a full queue does not turn it away,
                or what it has computed would be lost.

        Raises:
            InputError: the time is no number from 0.
            BusyError: the queue is full, or no slot came free in time.
            ClosedError: it was closed, or belongs to the process that this one was forked from.
        """
        self.check_open()
        if timeout_s is not None and not (isinstance(timeout_s, int | float) and timeout_s >= 0):
            raise InputError(f"timeout_s: found {timeout_s!r}, expected seconds from 0, or None")
        ticket = object()
        with self._changed:
            full = self._running + len(self._queue) >= self._slots + self._max_waiting
            if full and not again:
                raise BusyError(
                    f"found {self._running} predictions running and {len(self._queue)} waiting, "
                    f"expected at most {self._max_waiting} to wait. Try again later, or allow "
                    "more: MDFClassifier(..., max_waiting=...)"
                )
            self._queue.append(ticket)
            try:
                free = self._changed.wait_for(
                    lambda: (
                        self._closed or (self._running < self._slots and self._queue[0] is ticket)
                    ),
                    # Python's locks know no infinity.
                    None if timeout_s is None or timeout_s >= threading.TIMEOUT_MAX else timeout_s,
                )
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()  # another is first now
            if self._closed:
                raise _closed()
            if not free:
                raise BusyError(
                    f"found no free slot within {timeout_s:g} s, expected one. Try again later, or "
                    "wait longer: predict(..., timeout_s=...)"
                )
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def check_open(self) -> None:
        """Raise ClosedError where nothing can run any more."""
        if os.getpid() != self._process:  # first: a fork may have copied a held lock
            raise ClosedError(
                "found a classifier that the parent process made, expected one of this process. A "
                "forked process cannot use its threads or its card: make the classifier after the "
                "fork, or start processes with multiprocessing's 'spawn'"
            )
        if self._closed:
            raise _closed()

    def close(self) -> bool:
        """Turn everyone away, and return when the last running call has ended.

        Returns:
            Whether there is something to free: False in a forked process.
        """
        if os.getpid() != self._process:
            return False
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._running == 0)


def _closed() -> ClosedError:
    return ClosedError(
        "the classifier is closed, expected an open one. Make another: MDFClassifier(engine_dir)"
    )

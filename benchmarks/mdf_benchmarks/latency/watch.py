"""A run in, its memory over time and how the card fared out: a thread looks ten times a second."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from types import TracebackType
from typing import Any, Self

from mdf_benchmarks.latency.card import Card
from mdf_benchmarks.memory import resident_bytes

_PERIOD_S = 0.1
_MOST_SAMPLES = 2000  # kept: of a longer run every second one goes, again and again


class Watch:
    """A context manager that samples until it ends."""

    def __init__(self, card: Card | None) -> None:
        self._card = card
        self._device_bytes: Callable[[], int | None] = _nothing
        self._start = time.perf_counter()
        self._samples: list[dict[str, Any]] = []
        self._phases: list[dict[str, Any]] = []
        self._looking = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what runs now; the card's energy is read at both ends."""
        entry: dict[str, Any] = {"name": name, "start_s": self._now_s()}
        before_j = self._energy_j()
        self.look()
        yield
        self.look()
        after_j = self._energy_j()
        entry["end_s"] = self._now_s()
        entry["energy_j"] = None if before_j is None or after_j is None else after_j - before_j
        self._phases.append(entry)

    @contextmanager
    def following(self, device_bytes: Callable[[], int | None]) -> Iterator[None]:
        """Take an open engine's word for the card's memory where NVML does not tell."""
        self._device_bytes = device_bytes
        try:
            yield
        finally:
            self._device_bytes = _nothing

    def leave_card(self) -> None:
        """Forget the card: what is measured does not run on it."""
        with self._looking:  # or the thread adds a sample that it has begun
            self._card = None
            for sample in self._samples:
                sample["device"] = sample["card"] = None

    def look(self) -> None:
        """Take a sample now."""
        with self._looking:
            card = None if self._card is None else self._card.sample()
            used = self._device_bytes() if card is None else card["used_bytes"]
            self._samples.append(
                {"at_s": self._now_s(), "host": resident_bytes(), "device": used, "card": card}
            )

    def memory(self) -> dict[str, Any]:
        """JSON types: samples in the order of time, and the phases."""
        end_s = max((phase["end_s"] for phase in self._phases), default=0.0)
        samples = [s for s in self._ordered() if s["at_s"] <= end_s]
        return {
            "at_s": [round(s["at_s"], 3) for s in samples],
            "host_bytes": [s["host"] for s in samples],
            "device_bytes": [s["device"] for s in samples],
            "phases": [{k: p[k] for k in ("name", "start_s", "end_s")} for p in self._phases],
        }

    def median_bytes(self, phase: str, where: str) -> int | None:
        """Of "host" or "device", the median over a phase's samples."""
        known = [s[where] for s in self._during(phase) if s[where] is not None]
        return int(median(known)) if known else None

    def most_device_bytes(self) -> int | None:
        return max((s["device"] for s in self._samples if s["device"] is not None), default=None)

    def card_state(self, phase: str, predictions: int) -> dict[str, Any] | None:
        """How the card fared in a phase of so many predictions; None where no card tells."""
        samples = [s["card"] for s in self._during(phase) if s["card"] is not None]
        if not samples:
            return None
        energy_j = next(p["energy_j"] for p in self._phases if p["name"] == phase)
        state: dict[str, Any] = {
            "phase": phase,
            "energy_j_per_prediction": None if energy_j is None else energy_j / predictions,
        }
        for name in ("power_w", "sm_clock_mhz", "temperature_c"):
            known = [s[name] for s in samples if s[name] is not None]
            state[f"median_{name}"] = median(known) if known else None
            state[f"least_{name}"] = min(known, default=None)
            state[f"most_{name}"] = max(known, default=None)
        braked = [s["throttled_by"] for s in samples]
        state["throttled_share"] = sum(map(bool, braked)) / len(braked)
        state["throttled_by"] = sorted({reason for reasons in braked for reason in reasons})
        return state

    def _keep_looking(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            self.look()

    def _during(self, phase: str) -> list[dict[str, Any]]:
        (entry,) = (p for p in self._phases if p["name"] == phase)
        return [s for s in self._samples if entry["start_s"] <= s["at_s"] <= entry["end_s"]]

    def _ordered(self) -> list[dict[str, Any]]:
        samples = sorted(self._samples, key=lambda s: s["at_s"])
        while len(samples) > _MOST_SAMPLES:
            samples = samples[::2]
        return samples

    def _now_s(self) -> float:
        return time.perf_counter() - self._start

    def _energy_j(self) -> float | None:
        return None if self._card is None else self._card.energy_j()


def _nothing() -> None:
    return None

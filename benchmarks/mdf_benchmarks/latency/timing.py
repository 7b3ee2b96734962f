"""Questions in, the times of calls and of their stages out: the one clock of the benchmark."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from mdf_benchmarks.latency.statistics import Samples, rounds_interval, summarize
from mdf_sdk import Prediction

ROUNDS = 10
WARM_UP = 5
_PACES = 3  # a turn
_PACE_STEPS = 100_000  # some 3 ms

# Prepares a question by its number, untimed, and returns the call that is timed.
Question = Callable[[int], Callable[[], Prediction]]


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one call.

    Attributes:
        whole_ms: by the wall clock.
        cpu_ms: processor time of all threads of the process.
        stages_ms: what the answer says of its stages, "image" (decoding, squaring) among them.
    """

    whole_ms: float
    cpu_ms: float
    stages_ms: Mapping[str, float]

    @property
    def without_image_ms(self) -> float:
        return self.whole_ms - self.stages_ms["image"]


def timed(call: Callable[[], Prediction]) -> Sample:
    """Time one call."""
    start, cpu_start = time.perf_counter(), time.process_time()
    prediction = call()
    end, cpu_end = time.perf_counter(), time.process_time()
    return Sample(1e3 * (end - start), 1e3 * (cpu_end - cpu_start), prediction.latency_ms)


@dataclass
class Times:
    """The samples of one kind of call, in rounds."""

    rounds: list[list[Sample]] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        """All, in the order of the calls."""
        return [sample for samples in self.rounds for sample in samples]

    def report(self) -> dict[str, Any]:
        """JSON types: `summarize` of whole calls, the same `without_image`, and what it rests on.

        `p50_rounds_interval_ms` is `rounds_interval`. `samples_ms` and
        `without_image_samples_ms` hold every call in order, to a microsecond; `round_sizes` cuts
        them into rounds.
        """
        whole = [np.array([s.whole_ms for s in samples]) for samples in self.rounds]
        rest = [np.array([s.without_image_ms for s in samples]) for samples in self.rounds]
        return {
            **_summarize_rounds(whole),
            "without_image": _summarize_rounds(rest),
            "cpu_p50_ms": float(np.median([s.cpu_ms for s in self.samples])),
            "samples_ms": _to_microseconds(whole),
            "without_image_samples_ms": _to_microseconds(rest),
            "round_sizes": [len(samples) for samples in self.rounds],
        }

    def stages(self) -> dict[str, Any]:
        """By stage, as `summarize` has it."""
        samples = self.samples
        return {
            name: summarize(np.array([s.stages_ms[name] for s in samples]))
            for name in samples[0].stages_ms
        }


class Stream(NamedTuple):
    """What single calls took.

    Attributes:
        times: by kind.
        pace: of each round, what `time_pace` gave at the beginning of every turn, milliseconds.
    """

    times: dict[str, Times]
    pace: list[Samples]

    def report_pace(self) -> dict[str, Any]:
        """JSON types, as a kind's report has them."""
        return {
            **_summarize_rounds(self.pace),
            "samples_ms": _to_microseconds(self.pace),
            "round_sizes": [len(samples) for samples in self.pace],
        }


def time_pace() -> float:
    """Time the same plain work on one core, milliseconds: what others do on the machine shows."""
    start = time.perf_counter()
    total = 0
    for number in range(_PACE_STEPS):
        total += number
    return 1e3 * (time.perf_counter() - start)


def time_rounds(kinds: Mapping[str, Question], queries: int, *, least_s: float = 0.0) -> Stream:
    """Ask one question after another: in each of ten rounds a tenth of every kind's.

    What disturbs the machine for a while then meets every kind, and shows in the differences
    between rounds. Calls that do not count: five of each kind before the first round, and one where
    a kind's turn begins, which finds what another kind left. None after it is left out.

    Args:
        kinds: questions by name; each gets numbers that rise without gap.
        queries: of each kind, at least.
        least_s: and for so many seconds of the first kind, as MLPerf's single stream has it.
    """
    times, pace = {kind: Times() for kind in kinds}, list[Samples]()
    numbers = {kind: count() for kind in kinds}
    for kind, question in kinds.items():
        for _ in range(WARM_UP):
            question(next(numbers[kind]))()
    first, each = next(iter(kinds)), -(-queries // ROUNDS)
    for _ in range(ROUNDS):
        paces: list[float] = []
        for kind, question in kinds.items():
            paces += [time_pace() for _ in range(_PACES)]
            least_ms = 1e3 * least_s / ROUNDS if kind == first else 0.0
            question(next(numbers[kind]))()
            samples: list[Sample] = []
            spent_ms = 0.0
            while len(samples) < each or spent_ms < least_ms:
                samples.append(timed(question(next(numbers[kind]))))
                spent_ms += samples[-1].whole_ms
            times[kind].rounds.append(samples)
        pace.append(np.array(paces))
    return Stream(times, pace)


def _summarize_rounds(rounds: list[Samples]) -> dict[str, Any]:
    return {
        **summarize(np.concatenate(rounds)),
        "p50_rounds_interval_ms": rounds_interval(rounds),
    }


def _to_microseconds(rounds: list[Samples]) -> list[float]:
    return [round(float(ms), 3) for samples in rounds for ms in samples]

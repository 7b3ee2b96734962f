"""An engine under many callers for many minutes in; every call accounted for, and memory, out."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mdf_benchmarks.memory import give_back_freed, resident_bytes
from mdf_benchmarks.soak.calls import (
    EVIDENCE_CASES,
    Call,
    Case,
    make_cases,
    plan_calls,
    refused_calls,
)
from mdf_sdk import BusyError, ClosedError, InputError, MDFClassifier, Prediction
from mdf_sdk.machine import machine_card

GROWTH_LIMIT = 0.01
_BACK_OFF_S = 0.01  # of a caller that was turned away
_FAULTS = 20
_TENTHS = 10
_SAMPLE_S = 0.25
_RESTING = 10  # percentile
_OUTCOMES = ("right", "wrong", "refused", "busy", "closed", "unexpected")


@dataclass(frozen=True)
class MemoryCourse:
    """Memory over the run, sampled four times a second.

    Attributes:
        tenths_bytes: for each tenth of the time, what is held when few calls are in flight: the
            10th percentile. A leak raises it like the median, which rises and falls with the calls
            in flight and so with other programs' work.
        growth_share: from the second tenth, when all is warm, to the last.
        closed_bytes: after `close()`, without what the C library keeps for later where it can be
            told to give that back.
    """

    tenths_bytes: tuple[int, ...]
    growth_share: float
    peak_bytes: int
    closed_bytes: int


@dataclass(frozen=True)
class SoakReport:
    """What became of every call.

    Attributes:
        cases: answered one by one before the clock started; `distinct_answers` are their scores.
        asked: all calls: right, wrong, refused, busy, closed, unexpected and lost ones.
        right: gave the cases' answers; `kept` of them for photographs whose state was kept.
        wrong: gave another answer, or any where an error was due.
        refused: got the error that was due, for unusable input or a block that was made to fail.
        busy: turned away by the queue; the caller waits 10 ms and goes on with its next call.
        closed: told so after `close()`; the last call of each caller.
        unexpected: any other error; `faults` holds the first ones, and the first wrong answers.
        lost: neither answered nor refused at the end.
        asked_by_kind: calls.
        latency: by kind of call, of right answers, the wait in the queue included, to 1 %.
        host_memory: resident; None where the system does not tell.
        device_memory: in use on the card, by all processes; None on the CPU.
        close_ms: None if `close()` did not return.
    """

    model: str
    precision: str
    backend: str
    device: str
    card: str
    threads: int | None
    minutes: float
    callers: int
    cases: int
    distinct_answers: int
    asked: int
    right: int
    kept: int
    wrong: int
    refused: int
    busy: int
    closed: int
    unexpected: int
    lost: int
    faults: tuple[str, ...]
    asked_by_kind: dict[str, int]
    latency: dict[str, dict[str, float]]
    host_memory: MemoryCourse | None
    device_memory: MemoryCourse | None
    close_ms: float | None
    machine: dict[str, Any]
    date: str

    @property
    def broken(self) -> tuple[str, ...]:
        """What must not be; empty when all is well."""
        counts = {name: getattr(self, name) for name in ("wrong", "unexpected", "lost")}
        found = [f"{count} {name}" for name, count in counts.items() if count]
        if self.close_ms is None:
            found.append("close() did not end")
        if self.closed != self.callers:
            found.append(f"{self.closed} of {self.callers} callers learned that it is closed")
        if self.distinct_answers == 1:
            found.append("all cases have the same scores: no mix-up would be seen")
        for name, course in (("host", self.host_memory), ("device", self.device_memory)):
            if course is None:
                continue
            if course.growth_share > GROWTH_LIMIT:
                found.append(f"{name} memory grew by {course.growth_share:.2%}")
            if course.closed_bytes >= course.tenths_bytes[-1]:
                found.append(f"{name} memory did not fall after close()")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Make a dict for JSON."""
        return asdict(self) | {"broken": self.broken}


@dataclass(frozen=True)
class Answer:
    """What of a prediction must be the same each time; mask and evidence as SHA-256 digests."""

    label: str
    scores: tuple[float, ...]
    mask: str | None
    evidence: str | None


def soak(
    engine_dir: Path,
    *,
    minutes: float = 20.0,
    callers: int = 8,
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
    grace_s: float = 120.0,
    classifier_type: type[MDFClassifier] = MDFClassifier,
) -> SoakReport:
    """Let callers share one classifier, then close it under them.

    Args:
        engine_dir: the engine.
        minutes: how long, after the cases were answered one by one.
        callers: threads; half as many calls may wait in the queue, so that it is full at times.
        device, threads: as MDFClassifier takes them.
        progress: told a line each minute.
        grace_s: how long the last calls and `close()` may take, before they count as lost.
        classifier_type: another one in tests, with planted faults.
    """
    if not minutes > 0 or callers < 1:
        raise InputError(
            f"soak: found {minutes:g} minutes and {callers} callers, expected more than 0 and at "
            "least 1"
        )
    cases, refused = make_cases(), refused_calls()
    classifier = classifier_type(
        engine_dir, device=device, threads=threads, max_waiting=callers // 2
    )
    identity = classifier.identity
    golden = _golden_answers(classifier, cases)
    judge = _Judge(golden)
    running = [
        threading.Thread(
            target=_keep_calling,
            args=(classifier, plan_calls(cases, refused, seed), judge),
            daemon=True,  # one that hangs must not keep the process
        )
        for seed in range(callers)
    ]
    for thread in running:
        thread.start()
    host, on_card = _watch(60 * minutes, classifier, judge, progress)
    close_ms = _close(classifier, judge, grace_s)
    deadline = time.monotonic() + grace_s
    for thread in running:
        thread.join(max(0.0, deadline - time.monotonic()))
    give_back_freed()
    with judge.lock:
        asked = Counter(judge.asked)
        counts = {name: judge.outcomes[name] for name in _OUTCOMES}
    return SoakReport(
        model=identity.model,
        precision=identity.precision,
        backend=identity.backend,
        device=identity.device,
        card=identity.card,
        threads=threads,
        minutes=minutes,
        callers=callers,
        cases=len(cases),
        distinct_answers=len({answer.scores for answer in golden}),
        asked=asked.total(),
        **counts,
        kept=judge.kept,
        lost=asked.total() - sum(counts.values()),
        faults=tuple(judge.faults),
        asked_by_kind=dict(asked.most_common()),
        latency={kind: judge.latencies[kind].summarize() for kind in sorted(judge.latencies)},
        host_memory=_course(host, resident_bytes()),
        device_memory=_course(on_card, classifier.device_bytes()),
        close_ms=close_ms,
        machine=machine_card(("mdf-mllm", "numpy")),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class _Judge:
    """Compares and counts; its memory does not grow with the calls."""

    def __init__(self, golden: Sequence[Answer]) -> None:
        self._golden = golden
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.kept = 0
        self.faults: list[str] = []
        self.latencies: dict[str, _Latencies] = {}

    def ask(self, classifier: MDFClassifier, call: Call) -> str:
        """Make a call; return its outcome."""
        with self.lock:
            self.asked[call.kind] += 1
        start, predictions, fault = time.perf_counter(), [], ""
        try:
            predictions = list(call.ask(classifier))
            outcome = "right" if self._is_right(call, predictions) else "wrong"
            fault = "another answer" if call.cases else "an answer, expected an error"
        except BusyError:
            outcome = "busy"
        except call.errors:
            outcome = "refused"
        except Exception as error:
            closed = isinstance(error, ClosedError) and self.closing.is_set()
            outcome = "closed" if closed else "unexpected"
            fault = f"{type(error).__name__}: {error}"[:300]
        ms = 1e3 * (time.perf_counter() - start)
        with self.lock:
            self.outcomes[outcome] += 1
            if outcome == "right":
                self.latencies.setdefault(call.kind, _Latencies()).add(ms)
                self.kept += all(p.latency_ms["vision"] == 0 for p in predictions)
            if outcome in ("wrong", "unexpected") and len(self.faults) < _FAULTS:
                self.faults.append(f"{call.kind}, cases {list(call.cases)}: {fault}")
        return outcome

    def _is_right(self, call: Call, predictions: Sequence[Prediction]) -> bool:
        found = [to_answer(prediction) for prediction in predictions]
        due = [self._golden[case] for case in call.cases]
        if call.kind not in ("mask", "batch"):
            due = [replace(answer, mask=None) for answer in due]
        if call.kind != "evidence":
            due = [replace(answer, evidence=None) for answer in due]
        return len(due) > 0 and found == due


class _Latencies:
    """A histogram whose steps are 1 % wide, from a microsecond to a quarter of an hour."""

    _STEP, _LEAST_MS = math.log(1.01), 1e-3

    def __init__(self) -> None:
        self._counts = np.ones(2100, np.int64) - 1  # written to: resident from the start

    def add(self, ms: float) -> None:
        step = int(math.log(max(ms, self._LEAST_MS) / self._LEAST_MS) / self._STEP)
        self._counts[min(step, len(self._counts) - 1)] += 1

    def summarize(self) -> dict[str, float]:
        n, below = int(self._counts.sum()), self._counts.cumsum()
        p50, p99 = (
            self._LEAST_MS * math.exp(self._STEP * (np.searchsorted(below, share * n) + 0.5))
            for share in (0.5, 0.99)
        )
        return {"p50_ms": p50, "p99_ms": p99, "n": n}


def to_answer(prediction: Prediction) -> Answer:
    mask, evidence = prediction.mask, prediction.evidence
    return Answer(
        prediction.label,
        tuple(prediction.scores.values()),
        None if mask is None else _digest(*mask.values()),
        None if evidence is None else _digest(evidence),
    )


def _digest(*arrays: np.ndarray[Any, Any]) -> str:
    digest = sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def _golden_answers(classifier: MDFClassifier, cases: Sequence[Case]) -> list[Answer]:
    return [
        to_answer(
            classifier.predict(case.image, case.text, mask=True, evidence=i in EVIDENCE_CASES)
        )
        for i, case in enumerate(cases)
    ]


def _keep_calling(classifier: MDFClassifier, plan: Iterator[Call], judge: _Judge) -> None:
    for call in plan:
        outcome = judge.ask(classifier, call)
        if outcome == "closed":
            return
        if outcome == "busy":
            time.sleep(_BACK_OFF_S)


def _watch(
    seconds: float, classifier: MDFClassifier, judge: _Judge, progress: Callable[[str], None]
) -> tuple[list[int | None], list[int | None]]:
    """Sample resident memory and the card's until the time is over."""
    host: list[int | None] = []
    on_card: list[int | None] = []
    start, told = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        time.sleep(min(_SAMPLE_S, seconds / 100))
        host.append(resident_bytes())
        on_card.append(classifier.device_bytes())
        if elapsed // 60 > told:
            told = int(elapsed // 60)
            with judge.lock:
                bad = judge.outcomes["wrong"] + judge.outcomes["unexpected"]
                asked = judge.asked.total()
            memory = ", ".join(f"{b / 1e6:.1f} MB" for b in (host[-1], on_card[-1]) if b)
            progress(f"minute {told}: {asked} calls, {bad} wrong or unexpected, {memory}")
    return host, on_card


def _course(samples: Sequence[int | None], closed: int | None) -> MemoryCourse | None:
    known = [sample for sample in samples if sample is not None]
    if len(known) < _TENTHS or closed is None:
        return None
    bounds = [i * len(known) // _TENTHS for i in range(_TENTHS + 1)]
    tenths = tuple(int(np.percentile(known[a:b], _RESTING)) for a, b in pairwise(bounds))
    return MemoryCourse(tenths, tenths[-1] / tenths[1] - 1, max(known), closed)


def _close(classifier: MDFClassifier, judge: _Judge, grace_s: float) -> float | None:
    """Close it while it is called: milliseconds; None if that failed or took too long."""
    took_ms: list[float] = []

    def close() -> None:
        start = time.perf_counter()
        try:
            classifier.close()
        except Exception as error:
            judge.faults.append(f"close(): {type(error).__name__}: {error}"[:300])
        else:
            took_ms.append(1e3 * (time.perf_counter() - start))

    judge.closing.set()
    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(grace_s)
    return took_ms[0] if took_ms else None

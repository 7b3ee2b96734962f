"""mdf_benchmarks.soak.soak: nothing breaks in a short one, and each planted fault is found."""

import dataclasses
import itertools
import json
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdf_benchmarks.soak import commands
from mdf_benchmarks.soak.calls import Call, make_cases, plan_calls, refused_calls
from mdf_benchmarks.soak.soak import (
    Answer,
    SoakReport,
    _course,
    _Judge,
    _Latencies,
    soak,
    to_answer,
)
from mdf_sdk import ClosedError, InputError, MDFClassifier, Prediction
from mdf_sdk.cli import main

SHORT = 0.1  # minutes: a caller makes one call of each kind first, evidence among them
GRADIENT = (np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 3)), "Blurred vision.")
KINDS = {
    *("single", "same_image", "mask", "batch", "evidence", "impatient", "bad_input", "failing"),
}
# Buffers that lie outside the heaps: how many more there are for a megabyte, once four were freed.
MAPPED = """
import ctypes
import sys
from mdf_benchmarks.memory import keep_heaps_small

class Info(ctypes.Structure):  # struct mallinfo2
    _fields_ = [(f"n{i}" if i != 3 else "mapped", ctypes.c_size_t) for i in range(10)]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
exec(sys.argv[1])
bytearray(4_000_000)
before = mallinfo2().mapped
kept = bytearray(1_000_000)
print(mallinfo2().mapped - before)
"""


@pytest.fixture(scope="module")
def report(tiny_engine: Path) -> SoakReport:
    return soak(tiny_engine, minutes=0.1, callers=4, threads=1)


def test_every_call_of_a_short_soak_is_accounted_for(report: SoakReport) -> None:
    assert (report.wrong, report.unexpected, report.lost) == (0, 0, 0), report.faults
    assert report.closed == report.callers
    assert report.asked == report.right + report.refused + report.busy + report.closed
    assert sum(report.asked_by_kind.values()) == report.asked
    assert sum(times["n"] for times in report.latency.values()) == report.right
    assert report.asked_by_kind.keys() == KINDS
    assert report.distinct_answers == report.cases
    assert 0 < report.kept < report.right
    assert report.refused > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_is_watched(report: SoakReport) -> None:
    assert report.host_memory is not None
    assert report.device_memory is None
    assert 50e6 < min(report.host_memory.tenths_bytes) <= report.host_memory.peak_bytes


class Faulty(MDFClassifier):
    """Answers what it should refuse, fails where it should answer, and leaks on host and card."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.leaked: list[bytes] = []

    def predict(self, *args: Any, **options: Any) -> Prediction:
        if options.get("timeout_s") == 0.0:
            raise KeyError("vision")
        try:
            return super().predict(*args, **options)
        except InputError:
            return super().predict(*GRADIENT)

    def device_bytes(self) -> int:
        """Asked at each sample."""
        self.leaked.append(b"x" * 2_000_000)
        return 1_000_000_000 + sum(map(len, self.leaked))


@pytest.fixture(scope="module")
def faulty_report(tiny_engine: Path) -> SoakReport:
    return soak(tiny_engine, minutes=SHORT, callers=3, threads=1, classifier_type=Faulty)


def test_an_answer_to_unusable_input_is_wrong(faulty_report: SoakReport) -> None:
    assert f"{faulty_report.wrong} wrong" in faulty_report.broken
    assert "bad_input, cases []: an answer, expected an error" in faulty_report.faults


def test_an_error_of_another_sort_is_unexpected(faulty_report: SoakReport) -> None:
    assert f"{faulty_report.unexpected} unexpected" in faulty_report.broken
    assert any("KeyError: 'vision'" in fault for fault in faulty_report.faults)


def test_a_leak_is_told_with_its_share(faulty_report: SoakReport) -> None:
    for name, course in (
        ("host", faulty_report.host_memory),
        ("device", faulty_report.device_memory),
    ):
        if course is not None:  # the host's, where the system does not tell
            assert f"{name} memory grew by {course.growth_share:.2%}" in faulty_report.broken
    assert faulty_report.device_memory is not None
    assert "device memory did not fall after close()" in faulty_report.broken


@pytest.fixture
def released() -> Iterator[threading.Event]:
    released = threading.Event()
    yield released
    released.set()


def test_a_call_and_a_close_that_never_end_are_told(
    tiny_engine: Path, released: threading.Event
) -> None:
    numbers = itertools.count()

    class Hanging(MDFClassifier):
        def predict(self, *args: Any, **options: Any) -> Prediction:
            by_caller = threading.current_thread() is not threading.main_thread()
            if by_caller and next(numbers) == 0:
                released.wait()
            return super().predict(*args, **options)

        def close(self) -> None:
            super().close()
            released.wait()

    found = soak(tiny_engine, minutes=SHORT, callers=2, grace_s=2.0, classifier_type=Hanging)
    assert found.lost == 1
    assert found.close_ms is None
    assert set(found.broken) >= {
        *("1 lost", "close() did not end", "1 of 2 callers learned that it is closed"),
    }


@pytest.fixture(scope="module")
def classifier(tiny_engine: Path) -> Iterator[MDFClassifier]:
    with MDFClassifier(tiny_engine, threads=1) as classifier:
        yield classifier


@pytest.fixture(scope="module")
def prediction(classifier: MDFClassifier) -> Prediction:
    return classifier.predict(*GRADIENT, mask=True, evidence=True)


def last_bit(prediction: Prediction) -> Prediction:
    scores = {label: float(np.nextafter(s, 0)) for label, s in prediction.scores.items()}
    return dataclasses.replace(prediction, scores=scores)


def last_bit_of_mask(prediction: Prediction) -> Prediction:
    mask = prediction.mask or {}
    mask = {kind: np.nextafter(values, np.float32(2)) for kind, values in mask.items()}
    return dataclasses.replace(prediction, mask=mask)


def no_mask(prediction: Prediction) -> Prediction:
    return dataclasses.replace(prediction, mask=None)


def last_bit_of_evidence(prediction: Prediction) -> Prediction:
    assert prediction.evidence is not None
    evidence = np.nextafter(prediction.evidence, np.float32(2))
    return dataclasses.replace(prediction, evidence=evidence)


@pytest.mark.parametrize(
    ("kind", "change", "outcome"),
    [
        ("single", None, "right"),
        ("single", last_bit, "wrong"),
        ("mask", None, "right"),
        ("mask", last_bit_of_mask, "wrong"),
        ("mask", no_mask, "wrong"),
        ("evidence", None, "right"),
        ("evidence", last_bit_of_evidence, "wrong"),
        ("batch", None, "right"),
        ("batch", last_bit, "wrong"),
    ],
)
def test_an_answer_is_right_to_the_last_bit(
    classifier: MDFClassifier,
    prediction: Prediction,
    kind: str,
    change: Callable[[Prediction], Prediction] | None,
    outcome: str,
) -> None:
    given = dataclasses.replace(
        prediction,
        mask=prediction.mask if kind in ("mask", "batch") else None,
        evidence=prediction.evidence if kind == "evidence" else None,
    )
    answers = [given, given if change is None else change(given)]
    judge = _Judge([Answer("other", (0.0, -1.0), None, None), to_answer(prediction)])
    assert judge.ask(classifier, Call(kind, lambda _: answers, cases=(1, 1))) == outcome
    assert judge.ask(classifier, Call(kind, lambda _: answers[:1], cases=(1, 1))) == "wrong"
    assert judge.ask(classifier, Call(kind, lambda _: answers, cases=(1, 0))) == "wrong"


def test_closed_is_an_answer_only_after_close(classifier: MDFClassifier) -> None:
    def refuse(_: MDFClassifier) -> Any:
        raise ClosedError("closed")

    judge, call = _Judge([]), Call("single", refuse, (0,))
    assert judge.ask(classifier, call) == "unexpected"
    judge.closing.set()
    assert judge.ask(classifier, call) == "closed"


def test_growth_is_from_the_second_tenth_to_the_last() -> None:
    samples = [*10 * [50], *10 * [100], *70 * [500], 900, *3 * [103], *6 * [700]]
    course = _course(samples, closed=20)
    assert course is not None
    assert course.tenths_bytes == (50, 100, *7 * (500,), 103)
    assert course.growth_share == pytest.approx(0.03)
    assert (course.peak_bytes, course.closed_bytes) == (900, 20)
    assert _course([None] * 100, None) is None


@given(st.lists(st.floats(1e-2, 1e5), min_size=1, max_size=200))
def test_percentiles_are_told_to_a_hundredth(values: list[float]) -> None:
    latencies = _Latencies()
    for ms in values:
        latencies.add(ms)
    summary = latencies.summarize()
    for q, key in ((50, "p50_ms"), (99, "p99_ms")):
        exact = np.percentile(values, q, method="inverted_cdf")
        assert summary[key] == pytest.approx(exact, rel=0.01)
    assert summary["n"] == len(values)


def test_a_plan_is_its_seeds_own_and_holds_every_kind() -> None:
    cases, refused = make_cases(), refused_calls()

    def first(seed: int) -> list[tuple[str, tuple[int, ...]]]:
        plan = itertools.islice(plan_calls(cases, refused, seed), 2000)
        return [(call.kind, call.cases) for call in plan]

    assert first(1) == first(1) != first(2)
    assert {kind for kind, _ in first(1)[: len(KINDS)]} == KINDS
    assert {case for _, chosen in first(1) for case in chosen} == set(range(len(cases)))


@pytest.mark.parametrize("call", refused_calls())
def test_what_is_to_be_refused_is_refused_with_its_error(
    classifier: MDFClassifier, call: Call
) -> None:
    with pytest.raises(call.errors):
        call.ask(classifier)


@pytest.mark.parametrize("options", [{"minutes": 0.0}, {"minutes": float("nan")}, {"callers": 0}])
def test_nothing_to_do_is_refused(tiny_engine: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected more than 0"):
        soak(tiny_engine, **options)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its heaps are meant")
def test_the_command_lets_large_buffers_go_back_to_the_system() -> None:
    """Without it, what is smaller than the largest that was freed comes from a heap."""
    found = [
        subprocess.run(
            [sys.executable, "-c", MAPPED, call], capture_output=True, text=True, check=True
        ).stdout
        for call in ("keep_heaps_small()", "None")
    ]
    assert found == ["1\n", "0\n"]


def test_the_command_ends_with_one_json_document_and_tells_by_its_code(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[bool] = []  # not of this process, which has other tests to run
    monkeypatch.setattr(commands, "keep_heaps_small", lambda: settings.append(True))
    command = ["soak", str(tiny_engine), "--minutes", "0.02", "--callers", "2", "--threads", "1"]
    code = main([*command, "--device", "cpu", "--json"])
    *lines, document = capsys.readouterr().out.splitlines()
    printed = json.loads(document)
    assert settings == [True]
    assert code == bool(printed["broken"])
    assert [line for line in lines if line.startswith("BROKEN")] == [
        f"BROKEN: {found}" for found in printed["broken"]
    ]
    assert {field.name for field in dataclasses.fields(SoakReport)} | {"broken"} == printed.keys()
    assert printed["host_memory"].keys() == {
        *("tenths_bytes", "growth_share", "peak_bytes", "closed_bytes"),
    }
    assert (printed["device"], printed["threads"], printed["lost"]) == ("cpu", 1, 0)

"""mdf_benchmarks.latency.timing: a known time is right, and who is asked what, and how often."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mdf_benchmarks.latency.timing import ROUNDS, WARM_UP, time_rounds

SLEEP_S = 0.05


def answering(work: Callable[[], Any], image_ms: float = 0.0) -> Any:
    """A call that works, and gives what a prediction says of its stages."""

    def call() -> Any:
        work()
        return SimpleNamespace(latency_ms={"image": image_ms, "decoder": 1.0, "total": 1.0})

    return call


def test_a_sleep_of_known_length_is_right_to_a_hundredth() -> None:
    slept_ms: list[float] = []

    def sleep() -> None:
        start = time.monotonic()
        time.sleep(SLEEP_S)
        slept_ms.append(1e3 * (time.monotonic() - start))

    times, _ = time_rounds({"new_image": lambda _: answering(sleep, image_ms=10.0)}, ROUNDS)
    found = times["new_image"].report()
    counted = [ms for i, ms in enumerate(slept_ms[WARM_UP:]) if i % 2]  # each turn's first does not
    assert found["samples_ms"] == pytest.approx(counted, rel=0.01)
    assert found["min_ms"] == pytest.approx(1e3 * SLEEP_S, rel=0.01)
    assert found["without_image"]["min_ms"] == pytest.approx(1e3 * SLEEP_S - 10, rel=0.01)
    assert found["cpu_p50_ms"] < 5


def test_kinds_take_turns_and_no_number_comes_twice() -> None:
    asked: list[tuple[str, int]] = []

    def question(kind: str) -> Any:
        return lambda number: answering(lambda: asked.append((kind, number)))

    times, _ = time_rounds({kind: question(kind) for kind in "ab"}, 3 * ROUNDS)
    assert [len(samples) for samples in times["b"].rounds] == [3] * ROUNDS
    turn = "aaaa" + "bbbb"  # one that does not count, and three
    assert "".join(kind for kind, _ in asked) == "a" * WARM_UP + "b" * WARM_UP + ROUNDS * turn
    for kind in "ab":
        numbers = [number for found, number in asked if found == kind]
        assert numbers == list(range(WARM_UP + 4 * ROUNDS))


def test_the_first_kind_is_asked_for_so_many_seconds_at_least() -> None:
    kinds = dict.fromkeys("ab", lambda _: answering(lambda: time.sleep(0.001)))
    times, _ = time_rounds(kinds, ROUNDS, least_s=0.5)
    first, second = (times[kind].report() for kind in "ab")
    assert sum(first["samples_ms"]) >= 500
    assert len(first["samples_ms"]) == sum(first["round_sizes"]) == first["n"] > 100
    assert second["n"] == ROUNDS


def test_preparing_a_question_is_not_timed() -> None:
    def question(_: int) -> Any:
        time.sleep(0.01)
        return answering(lambda: None)

    assert time_rounds({"a": question}, ROUNDS).times["a"].report()["p50_ms"] < 5


def test_raw_samples_are_kept_to_a_microsecond() -> None:
    found = time_rounds({"a": lambda _: answering(lambda: None)}, ROUNDS).times["a"]
    for kept, sample in zip(found.report()["samples_ms"], found.samples, strict=True):
        assert kept == round(sample.whole_ms, 3)
    assert found.stages()["decoder"]["p50_ms"] == 1.0


def test_the_pace_of_the_machine_is_taken_at_every_turn() -> None:
    stream = time_rounds(dict.fromkeys("ab", lambda _: answering(lambda: None)), ROUNDS)
    pace = stream.report_pace()
    assert pace["round_sizes"] == [6] * ROUNDS
    assert len(pace["samples_ms"]) == pace["n"] == 6 * ROUNDS
    assert 0.1 < pace["min_ms"] < 100

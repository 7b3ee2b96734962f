import multiprocessing
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mdf_sdk import BusyError, ClosedError, InputError
from mdf_sdk.admission import Admission


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


class Visitor:
    """Enters in a thread of its own and stays until it is told to leave."""

    def __init__(self, admission: Admission, pool: ThreadPoolExecutor) -> None:
        self.inside, self._leave = threading.Event(), threading.Event()
        self._admission = admission
        self.done = pool.submit(self._stay)

    def _stay(self) -> None:
        with self._admission.enter():
            self.inside.set()
            assert self._leave.wait(10)

    def leave(self) -> None:
        self._leave.set()


def test_the_slots_are_used_and_no_more_than_those(pool: ThreadPoolExecutor) -> None:
    admission, lock, pair = Admission(2, 100), threading.Lock(), threading.Barrier(2)
    running, most = 0, 0

    def call() -> None:
        nonlocal running, most
        with admission.enter():
            with lock:
                running += 1
                most = max(most, running)
            pair.wait(10)  # two are inside
            with lock:
                running -= 1

    for done in [pool.submit(call) for _ in range(100)]:
        done.result()
    assert most == 2


def test_one_too_many_is_turned_away_at_once(pool: ThreadPoolExecutor) -> None:
    admission = Admission(1, 0)
    visitor = Visitor(admission, pool)
    assert visitor.inside.wait(10)
    with pytest.raises(BusyError, match="at most 0 to wait"), admission.enter():
        pass
    visitor.leave()
    visitor.done.result()
    with admission.enter():
        pass


def test_a_wait_that_takes_too_long_ends_in_an_error_and_holds_no_place(
    pool: ThreadPoolExecutor,
) -> None:
    admission = Admission(1, 1)
    visitor = Visitor(admission, pool)
    assert visitor.inside.wait(10)
    for _ in range(3):
        with pytest.raises(BusyError, match=r"within 0\.01 s"), admission.enter(0.01):
            pass
    visitor.leave()
    visitor.done.result()
    with admission.enter(0.0):
        pass


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e300, 10**400])
def test_a_wait_may_be_longer_than_python_can_count(
    pool: ThreadPoolExecutor, timeout_s: float
) -> None:
    admission = Admission(1, 1)
    visitor = Visitor(admission, pool)
    assert visitor.inside.wait(10)
    threading.Timer(0.05, visitor.leave).start()
    with admission.enter(timeout_s):
        pass


def test_who_leaves_and_enters_again_comes_behind_those_who_wait(pool: ThreadPoolExecutor) -> None:
    admission, entered = Admission(1, 2), list[str]()

    def enter(name: str) -> None:
        with admission.enter():
            entered.append(name)

    with admission.enter():
        others = []
        for count, name in enumerate(("first", "second"), start=1):
            others.append(pool.submit(enter, name))
            while len(admission._queue) < count:
                pass
    enter("the one that left")
    for other in others:
        other.result()
    assert entered == ["first", "second", "the one that left"]


def test_a_full_queue_turns_nobody_away_who_was_let_in(pool: ThreadPoolExecutor) -> None:
    admission = Admission(1, 0)
    visitor = Visitor(admission, pool)
    assert visitor.inside.wait(10)
    threading.Timer(0.05, visitor.leave).start()
    with admission.enter(again=True):
        pass


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), "1"])
def test_a_wait_is_a_number_of_seconds(timeout_s: Any) -> None:
    with pytest.raises(InputError, match="timeout_s"), Admission(1, 1).enter(timeout_s):
        pass


def test_a_failed_call_gives_its_slot_back() -> None:
    admission = Admission(1, 0)
    for _ in range(3):
        with pytest.raises(KeyError), admission.enter():
            raise KeyError


def test_closing_waits_for_who_runs_and_turns_away_who_waits(pool: ThreadPoolExecutor) -> None:
    admission = Admission(1, 1)
    visitor = Visitor(admission, pool)
    assert visitor.inside.wait(10)
    waiting = Visitor(admission, pool)
    closing = pool.submit(admission.close)
    with pytest.raises(ClosedError):
        waiting.done.result(10)
    assert not closing.done()
    visitor.leave()
    assert closing.result(10)
    with pytest.raises(ClosedError, match="closed"), admission.enter():
        pass
    assert admission.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows forks no process")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_gets_an_error_even_where_the_lock_was_held() -> None:
    admission = Admission(1, 0)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        try:
            with admission.enter():
                answers.put("entered")
        except ClosedError as error:
            answers.put(str(error))
        answers.put(admission.close())

    with admission._changed:
        process = context.Process(target=child)
        process.start()
    process.join(20)
    assert process.exitcode == 0
    assert "after the fork" in answers.get()
    assert answers.get() is False

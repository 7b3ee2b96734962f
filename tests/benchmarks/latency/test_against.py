"""mdf_benchmarks.latency.against, .peer_process: a rival that fails is told, others go on."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mdf_benchmarks.latency import peer_process
from mdf_benchmarks.latency.against import KINDS, time_peer, with_ratios
from mdf_benchmarks.latency.peer_process import (
    PEERS,
    PeerFailure,
    PeerOptions,
    PeerProcess,
    check_peers,
    check_reference,
)
from mdf_sdk import InputError, load_manifest
from mdf_sdk.errors import CheckpointError

from .planted import ANSWER_S
from .test_timing import answering


@pytest.fixture
def options(demo_engine: Path, planted: Any) -> PeerOptions:
    return PeerOptions(demo_engine, None, "cpu", 1, ("one", "two"))


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("Missing", "not_available", "found no package no_such_package: pip install"),
        ("Cardless", "not_available", "found no card, expected one"),
        ("Greedy", "out_of_memory", "CUDA out of memory. Tried to allocate 20.00 GiB"),
        ("Spent", "out_of_memory", "CUDA error: out of memory"),
        ("Killed", "out_of_memory", "the system killed it"),
        ("Crashing", "failed", "exit code 3: terminate called"),
        ("Raising", "failed", "KeyError: 'cross_attention_states'"),
    ],
)
def test_a_peer_that_gives_no_times_is_told_with_its_reason(
    options: PeerOptions, name: str, status: str, reason: str
) -> None:
    found = with_ratios(time_peer(name, options, 10), {})
    assert (found["name"], found["status"]) == (name, status)
    assert reason in found["reason"]


def test_a_peer_that_ends_between_two_questions_is_told(options: PeerOptions) -> None:
    with PeerProcess("Quick", options) as peer:
        peer.ask("new_image", 0)
        peer._process.kill()
        peer._process.wait()
        with pytest.raises(PeerFailure, match="the system killed it"):
            peer.ask("new_image", 1)


def test_a_peer_that_ends_within_an_answer_is_told(options: PeerOptions) -> None:
    with PeerProcess("Quick", options) as peer:
        assert peer._process.stdout is not None
        peer._process.stdout.close()
        peer._process.stdout = io.StringIO('{"value": [1.0, 0')
        peer._process.kill()
        with pytest.raises(PeerFailure, match="the system killed it"):
            peer._answer()


def test_a_peer_that_crashes_is_told_where_no_signal_kills(
    options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("signal.SIGKILL")  # as on Windows
    assert "exit code 3" in time_peer("Crashing", options, 10)["reason"]


def test_a_peer_that_never_ends_is_ended(
    options: PeerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_process, "LIMIT_S", 2.0)
    found = time_peer("Stuck", options, 10)
    assert found["status"] == "failed"
    assert "no end after 2 s" in found["reason"]


def test_a_ratio_is_that_of_known_times_whole_and_without_the_photograph(
    options: PeerOptions,
) -> None:
    engine = dict.fromkeys(
        KINDS, lambda _: answering(lambda: time.sleep(ANSWER_S), image_ms=500 * ANSWER_S)
    )
    found = with_ratios(time_peer("Steady", options, 20, engine), {})
    ratios = found["ratios"]
    # Whole, it takes 40 ms and then 20; without preparing, 30 and 20. The engine takes 20 and 10.
    for kind, whole, rest in zip(KINDS, (2.0, 1.0), (3.0, 2.0), strict=True):
        for part, expected in (("whole", whole), ("without_image", rest)):
            low, high = ratios[kind][part]["interval"]
            assert ratios[kind][part]["ratio"] == pytest.approx(expected, rel=0.1)
            assert low <= ratios[kind][part]["ratio"] <= high
    assert found["latency"]["new_image"]["n"] == found["engine_latency"]["new_image"]["n"] == 20
    assert found["peak_device_bytes"] == 7
    assert found["peak_host_bytes"] > 10e6


def test_engine_and_peer_are_asked_the_same_numbers_in_turn(options: PeerOptions) -> None:
    asked: list[int] = []
    engine = {kind: lambda i: answering(lambda: asked.append(i)) for kind in KINDS}
    time_peer("Quick", options, 20, engine)
    turn = [[number, number + 1, number + 2] for number in range(3, 33, 3)]  # none comes twice
    rounds = [number for numbers in turn for number in 2 * numbers]  # of both kinds
    assert asked == [0, 1, 2, 0, 1, 2, *rounds]


def test_without_the_engine_in_turn_its_report_is_the_measure(
    options: PeerOptions, report: dict[str, Any]
) -> None:
    found = with_ratios(time_peer("Steady", options, 10), report["latency"])
    times = found["latency"]["new_image"]["p50_ms"] / report["latency"]["new_image"]["p50_ms"]
    assert found["ratios"]["new_image"]["whole"]["ratio"] == pytest.approx(times, rel=0.01)


def test_what_a_library_prints_is_no_answer(options: PeerOptions) -> None:
    with PeerProcess("Steady", options) as peer:
        assert peer.ask("same_image_new_text", 1).whole_ms > 900 * ANSWER_S
        assert peer.ask("new_image", 2).without_image_ms > 900 * 1.5 * ANSWER_S


def test_unknown_and_doubled_peers_are_refused_with_the_known_ones() -> None:
    for names in (["vllm"], ["transformers", "transformers"]):
        with pytest.raises(InputError, match="torchao-int4"):
            check_peers(names)
    check_peers(list(PEERS))


def test_a_reference_must_be_there_and_of_the_engines_model(
    demo_engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    manifest = load_manifest(demo_engine)
    check_reference(tiny_checkpoint, manifest)
    with pytest.raises(InputError, match="--reference CHECKPOINT"):
        check_reference(None, manifest)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_reference(tmp_path, manifest)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["labels"] = ["Acquired", "Unknown"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="Acquired, Unknown"):
        check_reference(tmp_path, manifest)

"""mdf_benchmarks.latency.run: on a card, rivals are asked once, and each step's result is kept."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mdf_benchmarks.latency import run
from mdf_benchmarks.latency.run import Request, benchmark_random
from mdf_sdk import InputError


def request_of(*against: str) -> Request:
    return Request(quick=True, device="auto", threads=2, against=against, text_tokens=20)


@pytest.fixture
def card(
    report: dict[str, Any], demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """A machine with a card, on which engines are measured already; returns what is asked of it."""
    asked: list[list[str]] = []

    def measured(words: list[str]) -> list[str]:
        asked.append(words)
        precision = ("int4", "fp16")[len(asked) - 1]
        found = report | {"device": "cuda", "precision": precision, "peers": []}
        return ["a table", json.dumps(found)]

    monkeypatch.setattr(run, "ensure_checkpoint", lambda *_: tmp_path / "nano")
    monkeypatch.setattr(run, "ensure_engine", lambda *_: demo_engine)
    monkeypatch.setattr(run, "run_module", measured)
    monkeypatch.setattr("mdf_benchmarks.latency.card.Card.open", lambda: object())
    return asked


def test_a_rival_is_asked_once_for_all_engines_and_set_beside_each(card: list[list[str]]) -> None:
    saved: list[list[list[str]]] = []

    def save(reports: Sequence[dict[str, Any]]) -> None:
        saved.append([[peer["name"] for peer in found["peers"]] for found in reports])

    told: list[str] = []
    request = request_of("Steady", "Greedy")
    reports = benchmark_random("nano", ["int4", "fp16"], Path(), None, request, save, told.append)
    assert saved == [[[]], [[], []], [[], []], 2 * [["Steady"]], 2 * [["Steady", "Greedy"]]]
    assert len(told) == 5
    one, other = ([peer for peer in found["peers"] if peer["status"] == "ok"] for found in reports)
    assert one[0]["latency"] == other[0]["latency"]
    assert one[0]["engine_latency"] is None
    assert one[0]["ratios"]["new_image"]["whole"]["ratio"] > 0
    for words in card:
        assert "--against" not in words
        assert words[-6:] == ["--json", "--quick", "--threads", "2", "--text-tokens", "20"]


def test_what_ends_a_run_takes_nothing_away(
    card: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []

    def save(reports: Sequence[dict[str, Any]]) -> None:
        kept[:] = copy.deepcopy(list(reports))

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "add_peers", end)
    with pytest.raises(KeyboardInterrupt):
        benchmark_random("nano", ["int4"], Path(), None, request_of("Quick"), save, print)
    assert [found["precision"] for found in kept] == ["int4"]


@pytest.mark.parametrize("precisions", [["int3"], [""], ["int4", "int4"]])
def test_precisions_that_no_engine_has_are_refused(precisions: list[str]) -> None:
    with pytest.raises(InputError, match="fp16"):
        benchmark_random("nano", precisions, Path(), None, request_of(), print, print)

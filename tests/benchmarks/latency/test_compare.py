"""mdf_benchmarks.latency.compare: what is no difference is not shown as one, what is one is."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdf_benchmarks.latency.compare import NO_DIFFERENCE, compare_reports, format_comparison
from mdf_benchmarks.latency.measure import Plan, measure
from mdf_benchmarks.latency.timing import ROUNDS
from mdf_sdk import InputError
from mdf_sdk.cli import main

CALLS = 5  # a round


def times_of(factor: float) -> dict[str, Any]:
    """A kind's times, 10 ms times the factor, with little noise."""
    samples = [factor * (10 + 0.01 * (i % 7)) for i in range(CALLS * ROUNDS)]
    summary = {"p50_ms": 10.03 * factor}
    summary |= {"p50_rounds_interval_ms": [10.02 * factor, 10.04 * factor]}
    return {
        **summary,
        "without_image": dict(summary),
        "samples_ms": samples,
        "without_image_samples_ms": samples,
        "round_sizes": [CALLS] * ROUNDS,
    }


@pytest.fixture
def steady(report: dict[str, Any]) -> dict[str, Any]:
    """A report whose times hardly vary."""
    changed = copy.deepcopy(report)
    for kind in changed["latency"]:
        changed["latency"][kind] = times_of(1.0)
    changed["pace"] = times_of(0.3)
    return changed


def slower(report: dict[str, Any], factor: float) -> dict[str, Any]:
    changed = copy.deepcopy(report)
    for kind in changed["latency"]:
        changed["latency"][kind] = times_of(factor)
    return changed


def verdicts(comparison: dict[str, Any]) -> set[str]:
    return {part["verdict"] for kind in comparison["latency"].values() for part in kind.values()}


def test_two_runs_of_one_engine_show_no_difference(tiny_engine: Path) -> None:
    """Of each two, unless other work began between them: then of the next two."""

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        found = verdicts(compare_reports(one, other))
        return all(verdict.startswith(NO_DIFFERENCE) for verdict in found)

    runs = (measure(tiny_engine, Plan(100, 0.0, 1), threads=1) for _ in range(4))
    assert any(itertools.starmap(same, itertools.pairwise(runs)))


def test_a_report_beside_itself_shows_no_difference(steady: dict[str, Any]) -> None:
    comparison = compare_reports(steady, steady)
    assert verdicts(comparison) == {NO_DIFFERENCE}
    assert comparison["latency"]["new_image"]["whole"]["ratio"] == 1
    assert comparison["warnings"] == []


@pytest.mark.parametrize(("factor", "verdict"), [(1.15, "B is slower"), (0.85, "B is faster")])
def test_a_planted_difference_is_shown_with_its_ratio(
    steady: dict[str, Any], factor: float, verdict: str
) -> None:
    comparison = compare_reports(steady, slower(steady, factor))
    assert verdicts(comparison) == {verdict}
    found = comparison["latency"]["new_image"]["whole"]
    assert found["ratio"] == pytest.approx(factor, rel=0.005)
    assert found["interval"][0] <= factor <= found["interval"][1]
    assert verdict in format_comparison(comparison)


@pytest.mark.parametrize("factor", [1.05, 0.95])
def test_a_difference_as_between_two_runs_of_one_engine_is_none(
    steady: dict[str, Any], factor: float
) -> None:
    comparison = compare_reports(steady, slower(steady, factor))
    assert verdicts(comparison) == {f"{NO_DIFFERENCE}, two runs of one engine differ as much"}


def test_what_the_machines_own_pace_did_is_no_difference(steady: dict[str, Any]) -> None:
    late = slower(steady, 1.3)
    late["pace"] = times_of(0.3 * 1.4)
    comparison = compare_reports(steady, late)
    assert verdicts(comparison) == {f"{NO_DIFFERENCE}, the machine's own pace changed as much"}
    assert any("took 1.40 times as long" in words for words in comparison["warnings"])
    late["machine"]["cpu"] = "another"  # whose pace is no accident
    assert verdicts(compare_reports(steady, late)) == {"B is slower"}


def test_other_machines_and_conditions_are_warned_of(steady: dict[str, Any]) -> None:
    other = copy.deepcopy(steady)
    other["machine"] |= {"cpu": "another", "versions": {}}
    other |= {"quick": False, "card": "NVIDIA H100"}
    other["card_state"] = {"throttled_by": ["power cap"]}
    text = format_comparison(compare_reports(steady, other))
    for words in ("different machine, cpu", "different quick", "different card", "power cap"):
        assert f"WARNING  {words}" in text or words in text
    assert len(compare_reports(steady, other)["warnings"]) == 5


@pytest.mark.parametrize("key", ["model", "text_tokens", "prompt_tokens"])
def test_reports_that_answer_different_questions_are_refused(
    steady: dict[str, Any], key: str
) -> None:
    with pytest.raises(InputError, match=r"expected the same.*mdf benchmark ENGINE"):
        compare_reports(steady, steady | {key: "another"})


def test_the_command_compares_files_and_writes_json(
    steady: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out = (tmp_path / f"{name}.json" for name in ("a", "b", "out"))
    a.write_text(json.dumps(steady))
    b.write_text(json.dumps(slower(steady, 2.0)))
    command = ["benchmark", "--compare", str(a), str(b), "--out", str(out), "--json"]
    assert main(command) == 0
    *lines, document = capsys.readouterr().out.splitlines()
    assert json.loads(document) == json.loads(out.read_text())
    assert any("NOTICE  Random weights, for tests." in line for line in lines)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": "mdf benchmark, 1"}',
        '{"format": "mdf benchmark, 2"}',
        '{"format": "mdf benchmark, 2", "load_ms": NaN}',
        "[" * 100_000,
        None,
    ],
)
def test_what_is_no_report_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    assert main(["benchmark", "--compare", str(path), str(path), "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["type"] == "InputError"
    assert "mdf benchmark ENGINE --out FILE" in error["message"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.pop("machine"),
        lambda r: r.update(machine=None),
        lambda r: r["latency"]["new_image"].update(p50_ms="fast"),
        lambda r: r["latency"]["new_image"].update(samples_ms=[]),
        lambda r: r["latency"].pop("same_image_new_text"),
    ],
)
@pytest.mark.parametrize("command", ["--from", "--compare"])
def test_a_damaged_report_is_named_and_nothing_is_written(
    report: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    damage: Callable[[dict[str, Any]], Any],
) -> None:
    changed = copy.deepcopy(report)
    damage(changed)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(changed))
    words = ["--from", str(path), "--html", str(tmp_path / "a.html")]
    if command == "--compare":
        words = ["--compare", str(path), str(path)]
    assert main(["benchmark", *words, "--out", str(tmp_path / "out.json"), "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["type"] == "InputError"
    assert "a.json: found a report with a field missing or wrong" in error["message"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_is_never_written_over_by_its_page(
    steady: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(steady))
    for words in (["--html", str(path)], ["--out", str(path)]):
        assert main(["benchmark", "--from", str(path), *words]) == 2
        assert "expected a file of its own" in capsys.readouterr().err
    assert json.loads(path.read_text()) == steady

"""mdf_benchmarks.latency.measure: percentiles that occurred, kinds, stages, memory, the machine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdf_benchmarks.latency.measure import measure, summarize
from mdf_sdk.cli import main

BLOCKS = ("vision", "unet_encoder", "fusion", "decoder")


def test_percentiles_are_times_that_occurred() -> None:
    samples = np.arange(1.0, 101.0)[::-1]
    assert summarize(samples) == {
        "min_ms": 1.0,
        "p50_ms": 50.0,
        "p90_ms": 90.0,
        "p99_ms": 99.0,
        "n": 100,
    }


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=200))
def test_percentiles_are_in_order_and_at_least_their_share_is_not_above(
    values: list[float],
) -> None:
    samples = np.array(values)
    summary = summarize(samples)
    percentiles = [summary[key] for key in ("min_ms", "p50_ms", "p90_ms", "p99_ms")]
    assert percentiles == sorted(percentiles)
    assert set(percentiles) <= set(values)
    for share, value in zip((0.5, 0.9, 0.99), percentiles[1:], strict=True):
        assert (samples <= value).mean() >= share


@pytest.fixture(scope="module")
def report(tiny_engine: Path) -> dict[str, Any]:
    return measure(tiny_engine, queries=16)


def test_a_new_image_runs_every_block_and_a_new_text_the_decoder_alone(
    report: dict[str, Any],
) -> None:
    new, kept = report["stages"]["new_image"], report["stages"]["same_image_new_text"]
    for stage in BLOCKS[:-1]:
        assert 0 < new[stage]["p50_ms"] <= new[stage]["p99_ms"]
        assert kept[stage] == {"p50_ms": 0, "p99_ms": 0}
    assert kept["decoder"]["p50_ms"] > 0


@pytest.mark.parametrize("size", [2, 8])
def test_every_case_of_a_batch_is_a_new_image(report: dict[str, Any], size: int) -> None:
    times, stages = report["latency"][f"batch_{size}"], report["stages"][f"batch_{size}"]
    assert all(stages[block]["p50_ms"] > 0 for block in BLOCKS)
    assert times["n"] == 2
    assert times["p50_ms_per_case"] == times["p50_ms"] / size


def test_an_encoded_photograph_is_decoded_and_squared_apart(report: dict[str, Any]) -> None:
    decoding = report["decode_and_square"]
    assert (decoding["side_px"], decoding["n"]) == (1411, 2)
    assert decoding["file_bytes"] > 50_000
    assert decoding["min_ms"] > report["stages"]["new_image"]["image"]["p50_ms"]


def test_the_cold_start_budget_adds_up(report: dict[str, Any]) -> None:
    cold = report["cold_start"]
    parts = [cold[f"{part}_ms"] for part in ("python", "imports", "load", "first_prediction")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(cold["total_ms"], rel=1e-3)


def test_the_report_names_machine_engine_and_memory(report: dict[str, Any]) -> None:
    machine = report["machine"]
    assert isinstance(machine, dict)
    assert machine["cores"] >= 1
    assert {"cpu", "system", "python", "versions"} <= machine.keys()
    assert (report["model"], report["precision"], report["device"]) == ("nano", "fp32", "cpu")
    assert 50e6 < report["peak_host_bytes"] <= report["peak_host_bytes_batch_8"] < 20e9
    assert report["peak_device_bytes"] is None
    assert report["reference"] is None


def test_the_command_ends_with_one_json_document(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", str(tiny_engine), "--quick", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["latency"]["new_image"]["n"] == 50

"""mdf_benchmarks.latency.measure: kinds, stages, sweeps, memory, the machine, and a known time."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mdf_benchmarks.latency.measure import Plan, measure
from mdf_sdk import MDFClassifier, Prediction

BLOCKS = ("vision", "unet_encoder", "fusion", "decoder")
SLEEP_S = 0.05


def test_a_new_image_runs_every_block_and_a_new_text_the_decoder_alone(
    report: dict[str, Any],
) -> None:
    new, kept = report["stages"]["new_image"], report["stages"]["same_image_new_text"]
    for stage in BLOCKS[:-1]:
        assert 0 < new[stage]["p50_ms"] <= new[stage]["p99_ms"]
        assert kept[stage]["p99_ms"] == 0  # in the first call of a turn as well
    assert kept["decoder"]["p50_ms"] > 0


def test_every_percentile_has_its_interval_and_every_call_is_kept(report: dict[str, Any]) -> None:
    for times in report["latency"].values():
        for summary in (times, times["without_image"]):
            for name in ("p50", "p90", "p95"):
                low, high = summary[f"{name}_interval_ms"]
                assert low <= summary[f"{name}_ms"]
                assert high is None or summary[f"{name}_ms"] <= high
            assert summary["p99_interval_ms"][1] is None  # 50 calls give no upper bound
            low, high = summary["p50_rounds_interval_ms"]
            assert low <= high
        assert len(times["samples_ms"]) == sum(times["round_sizes"]) == times["n"] == 50
        assert times["without_image"]["p50_ms"] < times["p50_ms"]


def test_a_batch_is_counted_by_case_and_callers_wait_for_each_other(report: dict[str, Any]) -> None:
    assert [entry["batch"] for entry in report["batches"]] == [1, 2, 4, 8]
    for entry in report["batches"]:
        assert entry["p50_ms_per_case"] == entry["p50_ms"] / entry["batch"]
        assert entry["per_s"] > 0
    assert [entry["n"] for entry in report["callers"]] == [6, 6, 12, 24]
    assert report["callers"][-1]["p50_ms"] > report["callers"][0]["p50_ms"]


def test_an_encoded_photograph_is_decoded_and_squared_apart(report: dict[str, Any]) -> None:
    decoding = report["decode_and_square"]
    assert (decoding["side_px"], decoding["n"]) == (1411, 6)
    assert decoding["file_bytes"] > 50_000
    assert decoding["min_ms"] > report["stages"]["new_image"]["image"]["p50_ms"]


def test_the_cold_start_budget_adds_up(report: dict[str, Any]) -> None:
    cold = report["cold_start"]
    parts = [cold[f"{part}_ms"] for part in ("python", "imports", "load", "first_prediction")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(cold["total_ms"], rel=1e-3)


def test_the_report_names_machine_engine_and_memory(report: dict[str, Any]) -> None:
    machine, memory = report["machine"], report["memory"]
    assert machine["cores"] >= 1
    assert {"cpu", "memory_bytes", "power_mode", "system", "python", "versions"} <= machine.keys()
    assert machine["card"] is None
    assert (report["model"], report["precision"], report["device"]) == ("nano", "fp32", "cpu")
    assert report["notice"] == "Random weights, for tests."
    assert 50e6 < memory["steady_host_bytes"] <= memory["peak_host_bytes"] < 20e9
    assert memory["peak_host_bytes"] <= memory["peak_after_sweeps_host_bytes"]
    assert memory["peak_device_bytes"] is memory["steady_device_bytes"] is None
    assert report["card_state"] is None
    phases = [phase["name"] for phase in memory["phases"]]
    assert phases == ["load", "single stream", "encoded photographs", "batches", "callers"]


def test_every_block_is_above_its_floor(report: dict[str, Any]) -> None:
    floor = report["floor"]
    assert set(floor["blocks"]) == set(BLOCKS)
    for block in (*floor["blocks"].values(), floor["total"]):
        assert block["floor_ms"] > 0
        assert block["times_floor"] == pytest.approx(block["p50_ms"] / block["floor_ms"])
    assert floor["total"]["times_floor"] > 1


def test_peers_that_fail_do_not_keep_the_others_from_their_times(report: dict[str, Any]) -> None:
    found = {peer["name"]: peer["status"] for peer in report["peers"]}
    assert found == {
        "Steady": "ok",
        "Greedy": "out_of_memory",
        "Crashing": "failed",
        "Missing": "not_available",
        "Quick": "ok",
    }
    assert report["peers"][-1]["ratios"]["new_image"]["whole"]["ratio"] < 1


def test_the_report_is_strict_json_whose_keys_carry_their_units(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    units = ("_ms", "_s", "_bytes", "_px", "_mhz", "_w", "_c", "_j_per_prediction")
    plain = {
        *("n", "batch", "callers", "cores", "runs", "threads", "ratio", "interval", "flop"),
        *("round_sizes", "times_floor", "product_flop_per_s"),
        *("warm_up_queries", "text_tokens", "instruction_tokens", "prompt_tokens"),
    }

    def check(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                check(inner, name)
        elif isinstance(value, list):
            for inner in value:
                check(inner, key)
        elif isinstance(value, float | int) and not isinstance(value, bool):
            assert key in plain or key.endswith((*units, "_ms_per_case", "per_s")), key

    check(report, "")


class Sleepy(MDFClassifier):
    """Computes one answer, and gives it again after a known time."""

    answer: Prediction | None = None

    def predict(self, *args: Any, **options: Any) -> Prediction:
        if self.answer is None:
            self.answer = super().predict(*args, **options)
        time.sleep(SLEEP_S)
        stages = dict.fromkeys(self.answer.latency_ms, 0.0) | {"image": 200 * SLEEP_S}
        return replace(self.answer, latency_ms=stages)


def test_a_known_time_is_measured_to_a_hundredth(tiny_engine: Path) -> None:
    found = measure(tiny_engine, Plan(10, 0.0, 1), threads=1, classifier_type=Sleepy)
    for kind in ("new_image", "same_image_new_text"):
        times = found["latency"][kind]
        assert times["min_ms"] == pytest.approx(1e3 * SLEEP_S, rel=0.01)
        assert times["without_image"]["min_ms"] == pytest.approx(800 * SLEEP_S, rel=0.01)
    assert found["callers"][0]["min_ms"] == pytest.approx(1e3 * SLEEP_S, rel=0.01)
    assert found["callers"][0]["per_s"] < 1 / SLEEP_S < found["callers"][-1]["per_s"]

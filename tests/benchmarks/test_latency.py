"""mdf_benchmarks.latency: percentiles that occurred, stages, memory and the machine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdf_benchmarks.latency import measure, summarize
from mdf_sdk.cli import main


def test_percentiles_are_times_that_occurred() -> None:
    samples = np.arange(1.0, 101.0)[::-1]
    assert summarize(samples) == {
        "min_ms": 1.0,
        "p50_ms": 50.0,
        "p90_ms": 90.0,
        "p99_ms": 99.0,
        "n": 100,
    }


@pytest.fixture(scope="module")
def report(tiny_engine: Path) -> dict[str, Any]:
    return measure(tiny_engine, queries=6)


def test_a_new_image_runs_every_block_and_a_new_text_the_decoder_alone(
    report: dict[str, Any],
) -> None:
    new, kept = report["stages_p50_ms"]["new_image"], report["stages_p50_ms"]["same_image_new_text"]
    for stage in ("vision", "unet_encoder", "fusion"):
        assert new[stage] > 0
        assert kept[stage] == 0
    assert kept["decoder"] > 0


def test_the_report_names_machine_engine_and_memory(report: dict[str, Any]) -> None:
    machine = report["machine"]
    assert isinstance(machine, dict)
    assert machine["cores"] >= 1
    assert {"cpu", "system", "python", "versions"} <= machine.keys()
    assert (report["model"], report["precision"], report["device"]) == ("nano", "fp32", "cpu")
    assert isinstance(report["peak_host_bytes"], int)
    assert 50e6 < report["peak_host_bytes"] < 20e9


def test_the_command_ends_with_one_json_document(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", str(tiny_engine), "--quick", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["latency"]["new_image"]["n"] == 50

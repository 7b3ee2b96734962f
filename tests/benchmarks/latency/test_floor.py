"""mdf_benchmarks.latency.floor, .rates: limits divided, and reasons where there are none."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mdf_benchmarks.latency.floor import measure_floor, to_floor
from mdf_benchmarks.latency.rates import measure_rates
from mdf_benchmarks.latency.work import Work

RATES = {"reason": None, "copy_bytes_per_s": 1e9, "product_flop_per_s": 1e12}
STAGES = {
    name: {"p50_ms": 2.0}
    for name in ("vision", "unet_encoder", "fusion", "decoder", "without_image")
}


def test_the_longer_of_bytes_and_arithmetic_binds() -> None:
    bytes_bound = to_floor([Work(10**9, 5 * 10**6)], RATES, 20.0)
    assert (bytes_bound["bytes_ms"], bytes_bound["arithmetic_ms"]) == (5.0, 1.0)
    assert (bytes_bound["bound"], bytes_bound["times_floor"]) == ("bytes", 4.0)
    assert to_floor([Work(6 * 10**9, 5 * 10**6)], RATES, 20.0)["bound"] == "arithmetic"


def test_blocks_that_may_overlap_share_the_machine() -> None:
    together = to_floor([Work(10**9, 5 * 10**6), Work(6 * 10**9, 10**6)], RATES, 7.0)
    assert together["floor_ms"] == 7.0  # not 5 + 6


def test_this_machine_has_rates() -> None:
    rates = measure_rates("cpu")
    assert rates["reason"] is None
    assert 1e8 < rates["copy_bytes_per_s"] < 1e13
    assert 1e8 < rates["product_flop_per_s"] < 1e14


def test_without_rates_the_work_is_still_counted_and_the_reason_told(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "found no PyTorch to measure the card with: pip install 'mdf-mllm[training]'"
    unknown = {**dict.fromkeys(RATES), "reason": reason}
    monkeypatch.setattr("mdf_benchmarks.latency.floor.measure_rates", lambda _: unknown)
    floor = measure_floor(demo_engine, STAGES, device="cuda", text_rows=20, prefix_rows=19)
    assert floor["reason"] == reason
    assert floor["total"] is None
    assert floor["blocks"]["decoder"]["flop"] > 0
    assert floor["blocks"]["decoder"]["floor_ms"] is None


def test_without_onnx_the_floor_says_what_to_install(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdf_benchmarks.latency.floor.measure_rates", lambda _: RATES)
    found = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == "onnx" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    floor = measure_floor(demo_engine, STAGES, device="cpu", text_rows=20, prefix_rows=19)
    assert floor["blocks"] is None
    assert "pip install 'mdf-mllm[export]'" in floor["reason"]


def test_a_device_that_cannot_be_measured_is_told() -> None:
    rates = measure_rates("no_such_device")
    assert rates["copy_bytes_per_s"] is None
    assert "expected rates of no_such_device" in rates["reason"]

"""mdf_benchmarks.latency.page, .plots, .text: one page that needs nothing else, and is escaped."""

import copy
import sys
from typing import Any

import pytest

from mdf_benchmarks.latency.page import format_page
from mdf_benchmarks.latency.text import describe_interval, format_report
from mdf_sdk import errors

from ..pages import Page  # noqa: TID252 - tests are no installed package


@pytest.fixture(scope="module")
def html(report: dict[str, Any]) -> str:
    return format_page(report)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_a_page_is_whole_and_refers_to_nothing_outside_itself(page: Page, html: str) -> None:
    page.check_whole()
    assert "@import" not in html
    assert "url(http" not in html.replace('"', "").replace("'", "")


def test_a_page_has_every_plot_figure_and_failure(page: Page, report: dict[str, Any]) -> None:
    words = " ".join(page.words)
    for heading in (
        *("Latency", "Stages of a new photograph", "Distance to the floor", "Rivals"),
        *("Memory over time", "Batches and callers", "Machine", "How it was measured"),
    ):
        assert heading in words
    assert page.ids.count("waterfall-figure_1") == 1
    assert f"{report['latency']['new_image']['p50_ms']:.2f} ms" in words
    assert report["notice"] in words
    assert "planted; random weights, without the U-Net: less work than ours" in words
    for failure in (
        "out of memory: RuntimeError: CUDA out of memory.",
        "failed: the process ended with exit code 3: terminate called",
        "not available: found no package no_such_package",
    ):
        assert failure in words
        assert failure in format_report(report)
    assert report["manifest_sha256"] in words


def test_page_and_text_show_the_same_intervals(page: Page, report: dict[str, Any]) -> None:
    words, text = " ".join(page.words), format_report(report)
    for times in report["latency"].values():
        for figures in (times, times["without_image"]):
            shown = describe_interval(figures["p50_rounds_interval_ms"])
            assert shown in words
            assert f" {shown} " in text


def test_what_a_report_says_is_no_markup(report: dict[str, Any]) -> None:
    card = "<script>alert(1)</script>"
    broken = {"name": "Greedy", "status": "failed", "reason": card}
    changed = report | {"card": card, "notice": card, "peers": [broken]}
    assert card in " ".join(Page(format_page(changed)).words)
    assert "<script" not in format_page(changed)


def test_a_card_is_described_where_there_is_one(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report) | {"device": "cuda"}
    changed["machine"]["card"] = {
        "name": "NVIDIA H100",
        "memory_bytes": 85_000_000_000,
        "driver": "580.1",
        "power_limit_w": 700.0,
    }
    changed["memory"] |= {f"{key}_device_bytes": 9_000_000_000 for key in ("steady", "peak")}
    changed["memory"]["peak_after_sweeps_device_bytes"] = 9_100_000_000
    changed["memory"]["device_bytes"] = [9_000_000_000] * len(changed["memory"]["at_s"])
    changed["card_state"] = {
        "energy_j_per_prediction": 12.345,
        "median_power_w": 412.0,
        "most_power_w": 690.0,
        "median_sm_clock_mhz": 1755,
        "least_sm_clock_mhz": 1700,
        "most_temperature_c": 55,
        "throttled_share": 0.25,
        "throttled_by": ["power cap"],
    }
    words = " ".join(Page(format_page(changed)).words)
    for text in (words, format_report(changed)):
        for figure in ("9.00 GB", "9.10 GB", "12.35 J a prediction", "412.0 W", "1755 MHz"):
            assert figure in text
        assert "power cap" in text
    assert "NVIDIA H100, 85.00 GB, driver 580.1, power limit 700.0 W" in words


def test_a_report_without_floor_or_peers_says_so(report: dict[str, Any]) -> None:
    reason = "found no package onnx to count the graphs with: pip install 'mdf-mllm[export]'"
    floor = {"rates": report["floor"]["rates"], "blocks": None, "total": None, "reason": reason}
    changed = report | {"floor": floor, "peers": []}
    words = " ".join(Page(format_page(changed)).words)
    assert reason in words
    assert "Rivals" not in words
    assert reason in format_report(changed)


def test_without_matplotlib_the_extra_is_named(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.MissingExtraError, match="training"):
        format_page(report)

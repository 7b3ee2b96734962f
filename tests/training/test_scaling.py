"""mdf_training.scaling: what a step costs is counted from shapes and measured by steps."""

import argparse
import copy
import dataclasses
import json

import pytest
import torch

from mdf_sdk.cli import main
from mdf_sdk.errors import InputError
from mdf_training.config import load_preset
from mdf_training.distributed import Processes
from mdf_training.scaling import (
    LANGUAGE_TOKENS,
    count_forward_flops,
    measure_product,
    measure_scaling,
)
from mdf_training.scaling_commands import add_scaling

ALONE = Processes(0, 1, torch.device("cpu"))


def test_a_further_layer_costs_twice_its_weights_for_each_token_and_the_attention() -> None:
    config = load_preset("nano")
    text = {**copy.deepcopy(dict(config.text)), "num_hidden_layers": 9}
    more = count_forward_flops(dataclasses.replace(config, text=text))
    width, inner, keys = 128, 256, 64
    weights = 2 * width * width + 2 * width * keys + 3 * width * inner
    tokens = LANGUAGE_TOKENS
    expected = 2 * tokens * weights + 4 * tokens * tokens * width
    assert more - count_forward_flops(config) == expected


def test_utilization_follows_from_the_other_figures() -> None:
    report = measure_scaling("nano", ALONE, steps=2, batch_size=2)
    assert json.loads(json.dumps(report)) == report
    step_s = report["step_ms_p50"] / 1000
    assert report["cases_per_s"] == pytest.approx(2 / step_s)
    assert report["language_tokens_per_s"] == pytest.approx(2 * LANGUAGE_TOKENS / step_s)
    assert report["vision_tokens_per_s"] == pytest.approx(2 * 37 / step_s)  # 6 x 6 patches and one
    assert report["model_flops_per_step"] == 2 * 3 * count_forward_flops(load_preset("nano"))
    assert report["model_flop_utilization"] == pytest.approx(
        report["model_flops_per_step"] / step_s / report["product_flops_per_s"]
    )
    assert report["state_bytes_per_process"] == 16 * report["parameters"]
    assert report["peak_bytes_per_process"] == [None]


def test_a_product_takes_time() -> None:
    assert 1e8 < measure_product(ALONE.device) < 1e14


@pytest.mark.parametrize(("steps", "cases", "size"), [(0, 4, 1), (1, 0, 1), (1, 3, 4)])
def test_no_step_and_fewer_cases_than_processes_are_refused(
    steps: int, cases: int, size: int
) -> None:
    processes = Processes(0, size, ALONE.device)
    with pytest.raises(InputError, match="one for each process"):
        measure_scaling("nano", processes, steps=steps, batch_size=cases)


def test_a_batch_that_no_memory_holds_is_refused_with_its_cure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["scaling", "--preset", "nano", "--steps", "1", "--batch-size", str(10**12), "--json"]
    assert main(words) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["type"] == "DeviceMemoryError"
    assert "--batch-size 1" in error["message"]


def test_the_command_ends_with_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_scaling(parser.add_subparsers())
    args = parser.parse_args(
        ["scaling", "--preset", "nano", "--steps", "1", "--batch-size", "1", "--json"]
    )
    assert args.run(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["preset"] == "nano"
    assert "utilization" in lines[-2]

"""mdf_benchmarks.latency.reference: PyTorch asked the engine's questions, in its own process."""

import json
import shutil
from pathlib import Path

import pytest

from mdf_benchmarks.inputs import photograph
from mdf_benchmarks.latency.reference import ROUNDS, ReferenceProcess, compare_with_reference
from mdf_sdk import MDFClassifier, Prediction
from mdf_sdk.cli import main
from mdf_sdk.errors import CheckpointError, InputError


def test_the_command_prints_how_many_times_as_long_pytorch_takes(
    tiny_engine: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["benchmark", str(tiny_engine), "--reference", str(tiny_checkpoint)]
    assert main([*command, "--quick", "--threads", "1", "--json"]) == 0
    *lines, document = capsys.readouterr().out.splitlines()
    reference = json.loads(document)["reference"]
    for kind in ("new_image", "same_image_new_text"):
        times = reference["latency"][kind]
        assert 0 < times["ratio_least"] <= times["ratio_median"] <= times["ratio_most"]
        assert 0 < times["engine_min_ms"] <= times["engine_p50_ms"]
        assert min(times["engine_cpu_p50_ms"], times["reference_cpu_p50_ms"]) > 0
        assert any(line.startswith(kind) and "times as long" in line for line in lines)
    assert (reference["threads"], reference["rounds"]) == (1, ROUNDS)
    assert reference["memory_share"] > 0
    assert "torch" in reference["versions"]


def test_both_answer_the_same_questions_in_turn(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    asked: list[int] = []
    with MDFClassifier(tiny_engine, threads=1) as classifier:
        prediction = classifier.predict(photograph(64), "Blurred vision.")

        def call(i: int) -> Prediction:
            asked.append(i)
            return prediction

        report = compare_with_reference(classifier, tiny_checkpoint, {"new_image": call}, 40, 1)
    assert asked == [0, 1, 2, *range(3, 43)]
    assert report["queries_a_round"] == 2
    # An engine that answers at once: every ratio is PyTorch's own time over next to nothing.
    assert report["latency"]["new_image"]["ratio_least"] > 100


def test_a_new_text_costs_pytorch_less_than_a_new_image(tiny_checkpoint: Path) -> None:
    with ReferenceProcess(tiny_checkpoint, 1) as reference:
        new = min(reference.ask("new_image", i)[1] for i in range(8))
        text = min(reference.ask("same_image_new_text", i)[1] for i in range(8))
    assert 0 < text < new


def test_a_checkpoint_of_another_task_is_refused(
    tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    config["labels"] = ["Acquired", "Unknown"]
    (other / "config.json").write_text(json.dumps(config))
    with (
        MDFClassifier(tiny_engine, threads=1) as classifier,
        pytest.raises(InputError, match="Acquired, Unknown"),
    ):
        compare_with_reference(classifier, other, {}, 1, 1)


def test_a_missing_checkpoint_is_told_as_in_this_process(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        ReferenceProcess(tmp_path / "absent", 1)

"""mdf_benchmarks.latency.commands, .random_engine: the command line, engines of random weights."""

import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mdf_benchmarks.latency import random_checkpoint
from mdf_benchmarks.latency.compare import load_report
from mdf_benchmarks.latency.random_checkpoint import stand_in_tokenizer
from mdf_benchmarks.latency.random_engine import NOTICE, ensure_checkpoint, ensure_engine
from mdf_sdk import CheckpointError, DeviceMemoryError, InputError, verify_engine
from mdf_sdk.cli import main
from mdf_sdk.prompt import PromptEncoder
from mdf_training.config import PRESETS


def error_of(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, str]:
    """Run a command that must fail, and return what it says in its last line."""
    assert main(["benchmark", *command, "--json"]) == 2
    error: dict[str, str] = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    return error


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a checkpoint of random weights is made once."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def random_run(work: Path) -> tuple[list[str], dict[str, Any]]:
    """What `mdf benchmark --preset nano --random` prints, and its report."""
    command = ["benchmark", "--preset", "nano", "--random", "--work", str(work)]
    options = ["--precision", "fp16", "--quick", "--threads", "1", "--json"]
    files = ["--out", str(work / "report.json"), "--html", str(work / "report.html")]
    with redirect_stdout(StringIO()) as printed:
        assert main([*command, *options, *files]) == 0
    *lines, document = printed.getvalue().splitlines()
    return lines, json.loads(document)


def test_a_preset_of_random_weights_is_built_and_measured_and_says_so(
    random_run: tuple[list[str], dict[str, Any]], work: Path
) -> None:
    lines, report = random_run
    assert report == load_report(work / "report.json")
    assert (report["notice"], report["model"], report["precision"]) == (NOTICE, "nano", "fp16")
    assert (report["quick"], report["threads"]) == (True, 1)
    page = (work / "report.html").read_text()
    for text in ("\n".join(lines), page):
        assert NOTICE in text
        assert "ccuracy" not in text
    assert verify_engine(work / "nano-fp16").ok  # PyTorch's numbers, from the same random weights


def test_a_host_without_the_memory_for_a_checkpoint_is_told_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_checkpoint, "free_and_total_bytes", lambda: (10**6, 10**10))
    with pytest.raises(DeviceMemoryError, match=r"0\.0 GB.*smol-135m"):
        random_checkpoint.save_random_checkpoint("nano", tmp_path / "nano", None)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "smol.json").write_text(stand_in_tokenizer(PRESETS["smol-135m"]))
    for name in ("absent.json", "no.json", "smol.json"):
        with pytest.raises(CheckpointError, match=f"{name}.*Leave --tokenizer out"):
            random_checkpoint.read_tokenizer(tmp_path / name, PRESETS["nano"])


def test_what_is_made_is_found_again(
    random_run: tuple[list[str], dict[str, Any]], work: Path
) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}

    before = times()
    checkpoint = ensure_checkpoint("nano", work, None)
    assert ensure_engine(checkpoint, "fp16", "cpu") == work / "nano-fp16"
    ensure_checkpoint("nano", work, checkpoint / "tokenizer.json")
    assert times() == before


def test_another_tokenizer_than_the_one_that_is_there_is_refused(
    random_run: tuple[list[str], dict[str, Any]], work: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="--work DIR"):
        ensure_checkpoint("nano", work, tmp_path / "tokenizer.json")


def test_an_engine_that_is_not_of_random_weights_is_refused(
    tmp_path: Path, demo_engine: Path
) -> None:
    (tmp_path / "nano-int4").symlink_to(demo_engine)
    with pytest.raises(InputError, match=r"Not for clinical use.*--work DIR"):
        ensure_engine(tmp_path / "nano", "int4", "cpu")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stand_in_tokenizer_takes_most_words_of_the_prompt_for_a_token(preset: str) -> None:
    config = PRESETS[preset]
    tokenizer_json = stand_in_tokenizer(config)
    encoder = PromptEncoder(tokenizer_json, config.prompt, config.labels)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokens = tokenizer.encode(config.prompt.prefix, add_special_tokens=False).tokens
    assert tokens[0].startswith("<|")
    words = len(config.prompt.prefix.split())
    assert words <= len(encoder.prefix_ids) <= 2 * words
    assert encoder.image_id < config.text["vocab_size"] + 8  # a row of the embedding
    assert len(set(encoder.label_ids)) == 2


def test_the_command_prints_a_table_and_one_json_document(
    tiny_engine: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["benchmark", str(tiny_engine), "--reference", str(tiny_checkpoint)]
    assert main([*command, "--quick", "--threads", "1", "--json"]) == 0
    *lines, document = capsys.readouterr().out.splitlines()
    report = json.loads(document)
    assert report["latency"]["new_image"]["n"] == 50
    for name in ("new image", "  decoder", "batch 8", "callers 8", "host memory", "all"):
        assert any(line.startswith(name) for line in lines)
    assert lines[0] == "NOTICE  Random weights, for tests."
    (peer,) = report["peers"]
    assert (peer["name"], peer["status"], peer["unet"]) == ("pytorch-cpu", "ok", True)
    assert peer["latency"]["new_image"]["n"] == peer["engine_latency"]["new_image"]["n"] == 50
    assert peer["ratios"]["new_image"]["whole"]["ratio"] > 0
    assert {"torch", "transformers"} <= peer["versions"].keys()
    assert any(line.startswith("pytorch-cpu") for line in lines)


@pytest.mark.parametrize(
    ("command", "kind", "message"),
    [
        ([], "InputError", "mdf benchmark ENGINE"),
        (["--preset", "nano", "--work", "w"], "InputError", "--random"),
        (["--random", "--work", "w"], "InputError", "--preset"),
        (["--preset", "nano", "--random"], "InputError", "--work"),
        (["engine", "--preset", "nano", "--random", "--work", "w"], "InputError", "alone"),
        (
            ["--preset", "nano", "--random", "--work", "w", "--precision", "int3"],
            "InputError",
            "int4",
        ),
        (
            ["--preset", "nano", "--random", "--work", "w", "--against", "vllm"],
            "InputError",
            "vllm",
        ),
        (["absent"], "EngineError", "absent"),
        (["DEMO", "--out", "absent/a.json"], "InputError", "mkdir -p absent"),
        (["DEMO", "--html", "."], "InputError", "a file's name"),
        (["--compare", "a", "b", "--html", "a.html"], "InputError", "--out FILE"),
        (["DEMO", "--against", "vllm"], "InputError", "bnb-nf4"),
        (["DEMO", "--against", "pytorch-cpu"], "InputError", "--reference CHECKPOINT"),
        (["DEMO", "--reference", "absent"], "CheckpointError", "absent"),
        (["--compare", "a", "b", "--from", "c"], "InputError", "one of"),
        (["DEMO", "--from", "a"], "InputError", "one of"),
        (["--from", "a", "--html", "a"], "InputError", "a file of its own"),
        (["DEMO", "--out", "a", "--html", "a"], "InputError", "a file of its own"),
        (["DEMO", "--threads", "0"], "InputError", "threads: found 0"),
        (["DEMO", "--threads", "-1"], "InputError", "threads: found -1"),
        (["DEMO", "--text-tokens", "0"], "InputError", "text tokens"),
        (["DEMO", "--text-tokens", "100000"], "InputError", "text tokens"),
    ],
)
def test_bad_input_is_a_typed_error_before_anything_is_measured(
    demo_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    kind: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, *(str(demo_engine) if word == "DEMO" else word for word in command))
    assert error["type"] == kind
    assert message in error["message"]
    assert not list(tmp_path.iterdir())


def test_a_page_without_matplotlib_is_refused_before_anything_is_measured(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = error_of(capsys, str(demo_engine), "--html", "page.html")
    assert error["type"] == "MissingExtraError"
    assert "pip install 'mdf-mllm[training]'" in error["message"]


def test_an_unknown_preset_is_refused_with_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, "--preset", "llama-4", "--random", "--work", str(tmp_path))
    assert error["type"] == "CheckpointError"
    assert "smol-135m" in error["message"]

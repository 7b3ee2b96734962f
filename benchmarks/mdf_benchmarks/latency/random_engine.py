"""A preset in, engines of random weights and a report of each out."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from mdf_benchmarks.latency.against import with_ratios
from mdf_benchmarks.latency.card import Card
from mdf_benchmarks.latency.peer_process import NEEDS_CHECKPOINT, check_peers
from mdf_sdk import BackendRunError, InputError, errors, load_manifest
from mdf_sdk.manifest import Precision

NOTICE = "Random weights: latency only."
_CHECKPOINT_MODULE = "mdf_benchmarks.latency.random_checkpoint"
_FAILURE_CHARACTERS = 500


def measure_random(
    preset: str,
    precisions: Sequence[str],
    work: Path,
    *,
    tokenizer: Path | None,
    device: str,
    against: Sequence[str],
    options: Sequence[str],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Make engines of random weights and benchmark each, in a process of its own.

    So that the memory which making it took is in no figure. On a card a peer is asked once, alone:
    the reports after the first have its times from there.

    Args:
        preset: its name.
        precisions: one report for each.
        work: directory for checkpoint and engines; what is there already is not made again.
        tokenizer: the model's tokenizer.json; None takes a stand-in.
        device: as MDFClassifier takes it.
        against: peers.
        options: for `mdf benchmark ENGINE`.
        progress: told what is done, in words.

    Raises:
        MDFError: as `mdf export` and `mdf benchmark`.
    """
    check_peers(against)
    if not precisions or set(precisions) - set(get_args(Precision)):
        raise InputError(
            f"precision: found {','.join(precisions)}, expected some of "
            f"{', '.join(get_args(Precision))}"
        )
    start = time.monotonic()

    def told(path: Path, what: str) -> Path:
        progress(f"{what} {path} is there after {time.monotonic() - start:.0f} s")
        return path

    checkpoint = told(ensure_checkpoint(preset, work, tokenizer), "checkpoint")
    maker = "cuda" if device != "cpu" and Card.open() else "cpu"
    engines = [told(ensure_engine(checkpoint, p, maker), "engine") for p in precisions]
    reports: list[dict[str, Any]] = []
    for engine in engines:
        command = ["mdf_sdk.cli", "benchmark", str(engine), *options, "--json"]
        known = reports[0]["peers"] if reports and reports[0]["device"] != "cpu" else None
        if against and known is None:
            command += ["--against", ",".join(against)]
            command += ["--reference", str(checkpoint)] * (NEEDS_CHECKPOINT in against)
        report: dict[str, Any] = json.loads(_run(command)[-1])
        if known is not None:
            report["peers"] = [with_ratios(peer, report["latency"]) for peer in known]
        reports.append(report)
        progress(f"benchmark of {engine} is there after {time.monotonic() - start:.0f} s")
    return reports


def ensure_checkpoint(preset: str, work: Path, tokenizer: Path | None) -> Path:
    """Return the checkpoint of random weights in `work`, made in a process of its own if it must.

    Raises:
        InputError: the one that is there has another tokenizer.
        CheckpointError: no such preset.
        MissingExtraError, StorageError: it cannot be made.
    """
    folder = work / preset
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        _run([_CHECKPOINT_MODULE, preset, str(folder), *([str(tokenizer)] if tokenizer else [])])
    elif tokenizer is not None:
        there = (folder / "tokenizer.json").read_text(encoding="utf-8")
        if there != tokenizer.read_text(encoding="utf-8"):
            raise InputError(
                f"tokenizer: found another one in {folder}, expected {tokenizer}. Name another "
                "directory: --work DIR"
            )
    return folder


def ensure_engine(checkpoint: Path, precision: str, device: str) -> Path:
    """Return the engine beside a checkpoint, exported by rounding to nearest if it must.

    Args:
        checkpoint: as `ensure_checkpoint` made it.
        precision: int4, int8, fp16 or fp32.
        device: "cpu" or "cuda", where PyTorch rounds.

    Raises:
        InputError: what is there is another engine.
        MDFError: as `mdf export`.
    """
    engine = checkpoint.with_name(f"{checkpoint.name}-{precision}")
    if not engine.exists():
        options = ["--precision", precision, "--method", "rtn", "--device", device, "--json"]
        _run(["mdf_sdk.cli", "export", str(checkpoint), str(engine), *options])
    manifest = load_manifest(engine)
    found = (manifest.model, manifest.precision, manifest.notice)
    if found != (checkpoint.name, precision, NOTICE):
        raise InputError(
            f"{engine}: found {' '.join(found)}, expected {checkpoint.name} {precision} of random "
            "weights. Name another directory: --work DIR"
        )
    return engine


def _run(command: Sequence[str]) -> list[str]:
    """Run a module and return its lines; raise the error that it tells in the last one."""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        return lines
    try:
        told = json.loads(lines[-1]).get("error", json.loads(lines[-1]))
        raised: type[Exception] = getattr(errors, told["type"])
    except (IndexError, ValueError, KeyError, AttributeError):
        missing = "No module named" in done.stderr
        raised = errors.MissingExtraError if missing else BackendRunError
        told = {
            "message": f"{command[0]}: found exit code {done.returncode} "
            f"({done.stderr.strip()[-_FAILURE_CHARACTERS:]}), expected it to end well"
            + (". Install it: pip install 'mdf-mllm[export]'" if missing else "")
        }
    raise raised(told["message"])

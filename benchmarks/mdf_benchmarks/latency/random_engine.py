"""A preset in, engines of random weights out, each made once."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mdf_sdk import BackendRunError, InputError, errors, load_manifest

NOTICE = "Random weights: latency only."
_CHECKPOINT_MODULE = "mdf_benchmarks.latency.random_checkpoint"
_FAILURE_CHARACTERS = 500


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
        run_module(
            [_CHECKPOINT_MODULE, preset, str(folder), *([str(tokenizer)] if tokenizer else [])]
        )
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
        run_module(["mdf_sdk.cli", "export", str(checkpoint), str(engine), *options])
    manifest = load_manifest(engine)
    found = (manifest.model, manifest.precision, manifest.notice)
    if found != (checkpoint.name, precision, NOTICE):
        raise InputError(
            f"{engine}: found {' '.join(found)}, expected {checkpoint.name} {precision} of random "
            "weights. Name another directory: --work DIR"
        )
    return engine


def run_module(command: Sequence[str]) -> list[str]:
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

"""An engine in, the milliseconds from a new process to its first answer out.

As a module (`python -m mdf_benchmarks.latency.cold_start`) it is that process: it imports nothing
heavy before its clock runs.
"""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

STAGES = ("python_ms", "imports_ms", "load_ms", "first_prediction_ms")
_FAILURE_CHARACTERS = 500


def measure_cold_start(
    engine_dir: Path, *, device: str = "auto", threads: int | None = None, runs: int = 3
) -> dict[str, Any]:
    """Start a process, load the engine, ask one question; the files are in the system's cache.

    Returns:
        Of the run of median total: `python_ms`, until the interpreter runs our code; `imports_ms`,
        the SDK's; `load_ms`, every check and hash and the runtime's own library included;
        `first_prediction_ms`, on a decoded photograph; `total_ms`; and `runs`.

    Raises:
        BackendRunError: the process failed, with its last words.
    """
    samples = sorted(
        (_start_process(engine_dir, device, threads) for _ in range(runs)),
        key=lambda sample: sample["total_ms"],
    )
    return {**samples[runs // 2], "runs": runs}


def _start_process(engine_dir: Path, device: str, threads: int | None) -> dict[str, float]:
    arguments = [str(engine_dir), device, str(threads or 0), repr(time.time())]
    done = subprocess.run(
        [sys.executable, "-m", "mdf_benchmarks.latency.cold_start", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        from mdf_sdk.errors import BackendRunError  # here: it would load the SDK before the clock

        raise BackendRunError(
            f"cold start: found exit code {done.returncode} ({done.stderr[-_FAILURE_CHARACTERS:]}),"
            " expected a prediction. Check the engine: mdf verify ENGINE"
        )
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sample


def _answer_once(engine_dir: str, device: str, threads: int, started: float) -> dict[str, float]:
    """Be the new process; `started` is its parent's clock, in seconds since the epoch."""
    marks = [started, time.time()]
    from mdf_sdk import MDFClassifier

    marks.append(time.time())
    with MDFClassifier(engine_dir, device=device, threads=threads or None) as classifier:
        marks.append(time.time())
        from mdf_benchmarks.inputs import DECODED_PX, TEXTS, photograph

        image = photograph(DECODED_PX)
        drawing_s = time.time() - marks[-1]
        classifier.predict(image, TEXTS[0])
        marks.append(time.time() - drawing_s)
    spans_ms = [1e3 * (end - start) for start, end in pairwise(marks)]
    return {**dict(zip(STAGES, spans_ms, strict=True)), "total_ms": 1e3 * (marks[-1] - marks[0])}


if __name__ == "__main__":
    _, engine, device_, threads_, started_ = sys.argv
    print(json.dumps(_answer_once(engine, device_, int(threads_), float(started_))))

"""mdf_benchmarks.latency.cold_start: a process of its own, and its failure told."""

import subprocess
import sys
from pathlib import Path

import pytest

from mdf_benchmarks.latency.cold_start import measure_cold_start
from mdf_sdk.errors import BackendRunError


def test_the_module_that_is_timed_imports_nothing_heavy_before_its_clock() -> None:
    code = "import sys, mdf_benchmarks.latency.cold_start; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_engine_that_does_not_load_is_told_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(BackendRunError, match=r"(?s)exit code 1.*manifest\.json"):
        measure_cold_start(tmp_path, runs=1)

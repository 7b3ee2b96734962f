"""mdf_benchmarks.memory: the peak of this process and of no other."""

import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell")


def test_the_peak_stays_when_memory_is_freed() -> None:
    code = (
        "import numpy; from mdf_benchmarks.memory import peak_host_bytes; "
        "before = peak_host_bytes(); numpy.ones(50_000_000); print(peak_host_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 350e6 < int(done.stdout) < 450e6


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only getrusage tells")
def test_a_process_does_not_inherit_the_peak_of_the_one_that_started_it() -> None:
    held = np.ones(50_000_000)  # 400 MB, more than the new process needs
    code = "from mdf_benchmarks.memory import peak_host_bytes; print(peak_host_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < held.nbytes / 2

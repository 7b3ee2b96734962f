"""This process's largest resident set."""

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_host_bytes() -> int | None:
    """Largest resident set of this process so far, Python included; None where no system call of
    Python's own tells it (Windows)."""
    if _STATUS.exists():
        # Not getrusage: its figure also holds the peak of the process that started this one.
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].removesuffix("kB"))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others KiB

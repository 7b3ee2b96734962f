"""This process's resident set, now and at its largest."""

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """This process's resident set now; None where no file of the system tells it."""
    return _read_status("VmRSS") if _STATUS.exists() else None


def peak_host_bytes() -> int | None:
    """Largest resident set of this process so far, Python included; None where no system call of
    Python's own tells it (Windows)."""
    if _STATUS.exists():
        # Not getrusage: its figure also holds the peak of the process that started this one.
        return _read_status("VmHWM")
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others KiB


def _read_status(field: str) -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(fields[field].removesuffix("kB"))

"""This process's resident set, now and at its largest, and the C library's heaps in it."""

import ctypes
import gc
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
# glibc's M_MMAP_THRESHOLD and M_ARENA_MAX, by their numbers in malloc.h.
_HEAP_SETTINGS = {-3: 128 * 1024, -8: 2}


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


def keep_heaps_small() -> None:
    """Let this process's large buffers go back to the system, as README names it for a service.

    Else glibc's heaps grow to the worst order of buffers, and pass for the classifier's growth.
    """
    for parameter, value in _HEAP_SETTINGS.items():
        _call_glibc("mallopt", parameter, value)


def give_back_freed() -> None:
    """Return freed memory to the system; glibc keeps some for later."""
    gc.collect()
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    """Call a function of glibc's own; where there is another C library, do nothing."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def _read_status(field: str) -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(fields[field].removesuffix("kB"))

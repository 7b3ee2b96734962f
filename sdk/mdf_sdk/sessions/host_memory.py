"""The host's memory, as the system tells it: what a process here could still take."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Files of a control group: its limit and use; and in memory.stat, the cache that goes first.
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_and_total_bytes(root: Path = Path("/")) -> tuple[int, int] | None:
    """Return bytes that can be taken without swapping, and all there are; None where unknown.

    A container's limit counts where it is lower than the machine's.

    Args:
        root: of Linux' proc and sys.
    """
    if sys.platform == "win32":
        return _of_windows()
    try:
        found = _of_linux(root)
        for limit, used in _limits(root):
            found = min(found[0], max(0, limit - used)), min(found[1], limit)
    except (OSError, ValueError, KeyError):
        return None
    return found


def _of_linux(root: Path) -> tuple[int, int]:
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free, total = (int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    return 1024 * free, 1024 * total


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, used) of the process's control groups that have a limit."""
    groups = root / "sys/fs/cgroup"
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, used, dropped = groups, *_VERSION_2
        elif "memory" in controllers.split(","):
            folder, limit, used, dropped = groups / "memory", *_VERSION_1
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        # In a namespace of its own a group sees its own files at the root, whatever its path says.
        for group in (own, *own.parents):
            try:
                words = (folder / group / limit).read_text(encoding="ascii").strip()
                if words != "max":
                    taken = int((folder / group / used).read_text(encoding="ascii"))
                    stat = (folder / group / "memory.stat").read_text(encoding="ascii")
                    cache = dict(entry.split() for entry in stat.splitlines()).get(dropped, "0")
                    yield int(words), taken - int(cache)
            except FileNotFoundError:
                continue


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = (
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    )


def _of_windows() -> tuple[int, int] | None:
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 - only Windows' ctypes has it
    if not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.ullAvailPhys), int(status.ullTotalPhys)

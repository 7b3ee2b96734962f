"""Bytes that a runtime compiled for this machine's card, kept beside the engine for the next start.

They become machine code: what another account may have written is not read. A folder that cannot
be used is no failure; the kernels are then compiled anew at each start.
"""

import os
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_WINDOWS = os.name == "nt"


class KernelCache:
    """The folder `ENGINE.cache`, beside the directory `ENGINE`, which holds listed files alone.

    Windows shows Python no owner of a file: there the folder lies in the user's own profile.
    """

    def __init__(self, engine_dir: Path) -> None:
        engine_dir = engine_dir.resolve()
        parent: Path | None = engine_dir.parent
        if _WINDOWS:
            profile = os.environ.get("LOCALAPPDATA")
            parent = Path(profile, "mdf-mllm") if profile else None
        self._folder = parent / f"{engine_dir.name}.cache" if parent else None

    def load(self, name: str) -> bytes | None:
        """Return what was saved under a name; None if nothing was, or not by this user alone."""
        if self._folder is None:
            return None
        path = self._folder / name
        try:
            if not _is_own(self._folder, stat.S_ISDIR) or not _is_own(path, stat.S_ISREG):
                return None
            return path.read_bytes()
        except OSError:
            return None

    def save(self, name: str, content: bytes) -> None:
        """Keep content under a name, whole or not at all."""
        if self._folder is None:
            return
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_own(self._folder, stat.S_ISDIR):
                return
            descriptor, unfinished = tempfile.mkstemp(".part", dir=self._folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                Path(unfinished).replace(self._folder / name)
            except BaseException:
                Path(unfinished).unlink(missing_ok=True)
                raise


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether a path is no link, and no other account but the system's can change it."""
    status = path.lstat()
    if not is_kind(status.st_mode):
        return False
    if sys.platform == "win32":
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022

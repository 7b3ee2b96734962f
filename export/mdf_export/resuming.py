"""A long build that an interruption does not undo: the same call goes on where it stopped."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mdf_sdk.errors import InputError, MDFError
from mdf_sdk.staging import check_free, take_name

RESULT = "result"


@contextmanager
def resumed_directory(target: Path, identity: str) -> Iterator[Path]:
    """Yield a work directory beside `target`; what stands in its folder `result` becomes `target`.

    An interruption leaves the work directory, and the next call with the same identity goes on in
    it; one of another identity starts anew. An MDFError, which no second try cures, leaves nothing.

    Args:
        target: must not exist, or be an empty directory.
        identity: of what is made: a digest of all its inputs.

    Raises:
        InputError: `target` is taken, or another process is making it.
    """
    target = target.resolve()
    check_free(target)
    work = target.parent / f".{target.name}.unfinished"
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{target}: found another process that is making it, expected none. Wait for it, or "
            "choose another name."
        ) from error
    finished = False
    try:
        _forget_others(work, identity)
        (work / RESULT).mkdir(exist_ok=True)
        yield work
        take_name(work / RESULT, target)
        finished = True
    except MDFError:
        finished = True
        raise
    finally:
        lock.release()
        if finished:
            shutil.rmtree(work, ignore_errors=True)


def _forget_others(work: Path, identity: str) -> None:
    """Keep what an interrupted call of the same identity left, and nothing else."""
    mark = work / "identity"
    if mark.exists() and mark.read_text(encoding="utf-8") == identity:
        return
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    mark.write_text(identity, encoding="utf-8")

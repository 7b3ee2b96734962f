"""A directory that appears whole or not at all, and one whose making can be resumed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdf_sdk.errors import InputError


@contextmanager
def staged_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name when the block ends well.

    Args:
        target: must not exist, or be an empty directory.
        replace: an existing directory stays until the new one is complete, then goes.

    Raises:
        InputError: `target` is taken and `replace` is not set, or nothing can be made beside it.
    """
    target = target.resolve()
    check_free(target, replace=replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = _beside(target, ".partial")
    except OSError as error:
        raise InputError(
            f"{target}: nothing can be written there ({error.strerror}), expected a folder that "
            "exists or can be made. Choose another name."
        ) from error
    try:
        yield staging
        if replace and target.exists():
            _share(staging)
            _swap(staging, target)
        else:
            take_name(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_free(target: Path, *, replace: bool = False) -> None:
    """Raise InputError where `target` is a file, or a directory that is not empty or replaced."""
    if target.exists() and (not target.is_dir() or (not replace and any(target.iterdir()))):
        raise _taken(target)


def take_name(staging: Path, target: Path) -> None:
    """Rename onto a name that is free or an empty directory; what came there meanwhile stays.

    Raises:
        InputError: something came there.
    """
    _share(staging)
    try:
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        raise _taken(target) from error


def _swap(staging: Path, target: Path) -> None:
    """Put the new directory in the old one's place; put the old one back if that fails."""
    old = _beside(target, ".old")
    target.replace(old / target.name)
    try:
        staging.replace(target)
    except BaseException:
        (old / target.name).replace(target)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _beside(target: Path, suffix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=suffix, dir=target.parent))


def _share(directory: Path) -> None:
    """Give a finished tree the permissions of the user's umask: temporary files are private."""
    umask = os.umask(0)
    os.umask(umask)
    directory.chmod(0o777 & ~umask)
    for path in directory.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _taken(target: Path) -> InputError:
    return InputError(
        f"{target}: found something there, expected a new or empty directory. "
        "Choose another name, or remove it first."
    )

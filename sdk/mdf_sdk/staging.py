"""A directory that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdf_sdk.errors import InputError


@contextmanager
def staged_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name when the block ends without an
    error.

    Args:
        target: must not exist, or be an empty directory.
        replace: an existing `target` stays until the new one is complete, then goes.

    Raises:
        InputError: `target` exists and `replace` is not set, or its parent is not a directory.
    """
    if not replace and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"{target}: found something there, expected a new or empty directory. "
            "Choose another name, or remove it first."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    )
    try:
        yield staging
        _share(staging)
        if target.exists():
            old = Path(
                tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent)
            )
            target.replace(old / target.name)
            staging.replace(target)
            shutil.rmtree(old)
        else:
            staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _share(directory: Path) -> None:
    """Give a finished tree the permissions of the user's umask: temporary files are private."""
    umask = os.umask(0)
    os.umask(umask)
    directory.chmod(0o777 & ~umask)
    for path in directory.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)

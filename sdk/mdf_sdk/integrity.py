"""The engine directory against its manifest: no parser sees a byte before its SHA-256 is proved."""

import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from mdf_sdk.errors import ClosedError, IntegrityError
from mdf_sdk.manifest import (
    BLOCKS,
    EMBEDDINGS_NAME,
    FUSED_SUFFIX,
    MANIFEST_NAME,
    PLANS_NAME,
    REEXPORT,
    SIGNATURE_NAME,
    TOKENIZER_NAME,
    FileEntry,
    Manifest,
)

THREADS = 4  # one file each; a core hashes about as fast as a good disk reads
_CHUNK_BYTES = 1 << 20

# No "..", no leading "/", no drive letter, no backslash, no control character, no trailing dot:
# the same file on every system.
_SAFE_PATH = re.compile(r"\w([\w.-]*[\w-])?(/\w([\w.-]*[\w-])?)*", re.ASCII)
# Devices on Windows in every folder and with every extension.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.[^/]*)?", re.ASCII | re.IGNORECASE)
# The bit in a reparse tag that says "another file is meant": symbolic links and junctions have it,
# deduplicated and cloud-backed files do not.
_NAME_SURROGATE = 0x20000000


class FileCheck:
    """A running check that the directory holds the manifest's files, bit for bit, and no others.

    What costs nothing is checked at once: paths, links, devices, sizes, surplus files. Threads then
    hash the files in the order in which blocks load, so that a block can be opened as soon as its
    own files are proved. What is proved is what was read: nothing here stops who can write to the
    directory from changing a file afterwards.

    Overlooked are the signature and surplus files in `plans`: an interrupted `mdf compile` leaves
    some, no one opens a plan that is not listed, and the next `mdf compile` removes them.
    """

    def __init__(self, engine_dir: str | os.PathLike[str], manifest: Manifest) -> None:
        """Raises:
        IntegrityError: a file is missing, of another size, surplus, a link, or elsewhere.
        """
        self._directory = Path(engine_dir)
        _check_names(manifest)
        _check_tree(self._directory, manifest)
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="mdf-integrity")
        self._proofs: dict[str, Future[None]] = {
            name: self._pool.submit(self._prove, name, manifest.files[name])
            for name in _in_load_order(manifest)
        }

    def wait(self, name: str) -> None:
        """Return when a file, and its external data if it is a graph, is proved.

        Args:
            name: of a listed file; external data are the files whose names begin with it, and a
                fused graph's are those of the graph that it stands beside.

        Raises:
            IntegrityError: one of them is altered or unreadable, or the name is not listed.
        """
        if name not in self._proofs:
            raise _damaged(name, "no such name in the manifest", "one that it lists")
        graph = name.removesuffix(FUSED_SUFFIX)
        for candidate, proof in self._proofs.items():
            if candidate.startswith(graph):
                _result(proof)

    def wait_all(self) -> None:
        """Return when every file is proved.

        Raises:
            IntegrityError: one is altered or unreadable.
        """
        for proof in self._proofs.values():
            _result(proof)

    def close(self) -> None:
        """Stop hashing and end the threads; what is proved by then stays proved."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prove(self, name: str, entry: FileEntry) -> None:
        try:
            actual = digest(self._directory / name, cancelled=self._closing.is_set)
        except OSError as error:
            raise _unreadable(name, error) from error
        if actual != entry:
            raise _damaged(name, f"SHA-256 {actual.sha256}", entry.sha256)


def check_files(engine_dir: str | os.PathLike[str], manifest: Manifest) -> None:
    """Check that the directory holds the manifest's files, bit for bit, and nothing else.

    Reads every byte of the listed files once and parses none of them; see `FileCheck`.

    Raises:
        IntegrityError: a file is missing, altered, surplus, a link, or outside the directory.
    """
    with FileCheck(engine_dir, manifest) as check:
        check.wait_all()


def digest(path: Path, *, cancelled: Callable[[], bool] = lambda: False) -> FileEntry:
    """Hash a file as a stream; the size is that of the bytes hashed.

    Raises:
        CancelledError: `cancelled`, asked between two chunks, said so.
    """
    sha256, size, chunk = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            if cancelled():
                raise CancelledError
            sha256.update(chunk[:count])  # without the interpreter's lock
            size += count
    return FileEntry(sha256.hexdigest(), size)


def _check_names(manifest: Manifest) -> None:
    """Check that each name is one file inside the directory, on Windows too."""
    seen = {MANIFEST_NAME, SIGNATURE_NAME}
    for name in manifest.files:
        if not _SAFE_PATH.fullmatch(name):
            raise _unsafe(name, "a plain relative path inside the engine directory")
        if any(_RESERVED.fullmatch(part) for part in name.split("/")):
            raise _unsafe(name, "no name of a device of Windows")
        if name.lower() in seen:
            raise _unsafe(name, "names that differ in more than upper and lower case")
        seen.add(name.lower())


def _check_tree(directory: Path, manifest: Manifest) -> None:
    """Check what can be known of the files without reading them."""
    missing = dict(manifest.files)
    try:
        for name, status in _walk(directory):
            kind = _irregularity(status)
            if kind:
                raise _damaged(name, kind, "a regular file")
            entry = missing.pop(name, None)
            if entry is not None and entry.bytes != status.st_size:
                raise _damaged(name, f"{status.st_size} bytes", f"{entry.bytes} bytes")
            overlooked = name in (MANIFEST_NAME, SIGNATURE_NAME) or name.startswith(
                f"{PLANS_NAME}/"
            )
            if entry is None and not overlooked:
                raise _damaged(
                    name, "a file that the manifest does not list", "none", cure="Remove it. "
                )
    except OSError as error:
        raise _unreadable(f"engine {directory}", error) from error
    for name, entry in missing.items():
        raise _damaged(name, "no such file", f"{entry.bytes} bytes")


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield (POSIX path below root, status) of everything that is no directory; follows no link."""
    folders = [root]
    while folders:  # no recursion: a tree may be deeper than Python's stack
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                status = Path(entry.path).lstat()  # Windows' directories lag behind sizes
                if stat.S_ISDIR(status.st_mode) and not _irregularity(status):
                    folders.append(Path(entry.path))
                else:
                    yield Path(entry.path).relative_to(root).as_posix(), status


def _irregularity(status: os.stat_result) -> str:
    """Say what a file is instead of a regular file or folder; empty if it is one."""
    # Windows calls a junction a folder.
    if stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) & _NAME_SURROGATE:
        return "a symbolic link or junction"
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        return "a special file"
    return ""


def _in_load_order(manifest: Manifest) -> list[str]:
    """Sort the files: tokenizer and embeddings, then block by block, the rest last."""
    heads = [TOKENIZER_NAME, EMBEDDINGS_NAME]
    for block in BLOCKS:
        heads.append(manifest.blocks[block].file)
        heads += [plan.file for plan in manifest.plans if plan.block == block]
    order = {head: place for place, head in enumerate(heads)}

    def place(name: str) -> int:
        return min((order[head] for head in heads if name.startswith(head)), default=len(heads))

    return sorted(manifest.files, key=place)


def _result(proof: "Future[None]") -> None:
    try:
        proof.result()
    except CancelledError as error:
        raise ClosedError(
            "the check of the engine's files is closed, expected an open one. Load the engine again"
        ) from error


def _damaged(name: str, found: str, expected: str, cure: str = "") -> IntegrityError:
    return IntegrityError(
        f"{name}: found {found}, expected {expected}. {cure}Copy the engine again or export it "
        "again: mdf export CHECKPOINT ENGINE"
    )


def _unsafe(name: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"{MANIFEST_NAME}: found the path {name[:200]!r}, expected {expected}. Do not use this "
        f"engine. {REEXPORT}"
    )


def _unreadable(name: str, error: OSError) -> IntegrityError:
    return IntegrityError(
        f"{name}: could not be read ({error.strerror}), expected every file of the engine to be "
        "readable. Check the permissions and the disk"
    )

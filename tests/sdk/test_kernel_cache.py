import os
from pathlib import Path

import pytest

from mdf_sdk.sessions import kernel_cache
from mdf_sdk.sessions.kernel_cache import KernelCache

posix = pytest.mark.skipif(os.name == "nt", reason="has no such permissions")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    return folder


def test_what_is_saved_is_loaded_and_lies_beside_the_engine(engine: Path) -> None:
    cache = KernelCache(engine)
    assert cache.load("a.bin") is None
    cache.save("a.bin", b"kernels")
    cache.save("b.bin", b"others")
    cache.save("a.bin", b"newer kernels")
    assert KernelCache(engine).load("a.bin") == b"newer kernels"
    assert list(engine.iterdir()) == []
    names = sorted(path.name for path in engine.with_name("engine.cache").iterdir())
    assert names == ["a.bin", "b.bin"]


def test_an_engine_in_the_current_folder_has_a_cache_beside_it(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(engine)
    KernelCache(Path()).save("a.bin", b"kernels")
    assert KernelCache(engine).load("a.bin") == b"kernels"


@posix
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("mode", [0o772, 0o727])
def test_what_another_account_can_write_is_not_read(engine: Path, what: str, mode: int) -> None:
    cache = KernelCache(engine)
    cache.save("a.bin", b"kernels")
    folder = engine.with_name("engine.cache")
    (folder if what == "folder" else folder / "a.bin").chmod(mode)
    assert cache.load("a.bin") is None


@posix
def test_what_another_account_owns_is_neither_read_nor_written(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = KernelCache(engine)
    cache.save("a.bin", b"kernels")
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert cache.load("a.bin") is None
    cache.save("a.bin", b"mine")
    monkeypatch.undo()
    assert cache.load("a.bin") == b"kernels"


@posix
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_link_is_not_followed(engine: Path, tmp_path: Path, what: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "a.bin").write_bytes(b"kernels")
    folder = engine.with_name("engine.cache")
    if what == "folder":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir(mode=0o700)
        (folder / "a.bin").symlink_to(elsewhere / "a.bin")
    assert KernelCache(engine).load("a.bin") is None


@posix
def test_only_this_account_can_read_and_write_what_is_saved(engine: Path) -> None:
    KernelCache(engine).save("a.bin", b"kernels")
    folder = engine.with_name("engine.cache")
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "a.bin").stat().st_mode & 0o077 == 0


def test_a_place_that_cannot_be_written_to_is_no_failure(engine: Path) -> None:
    engine.with_name("engine.cache").write_bytes(b"a file is in the way")
    cache = KernelCache(engine)
    cache.save("a.bin", b"kernels")
    assert cache.load("a.bin") is None


def test_a_write_that_fails_leaves_what_was_there(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = KernelCache(engine)
    cache.save("a.bin", b"kernels")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    cache.save("a.bin", b"newer kernels")
    assert cache.load("a.bin") == b"kernels"
    assert len(list(engine.with_name("engine.cache").iterdir())) == 1


def test_on_windows_it_lies_in_the_users_profile(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "_WINDOWS", True)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "profile"))
    KernelCache(engine).save("a.bin", b"kernels")
    assert (tmp_path / "profile/mdf-mllm/engine.cache/a.bin").read_bytes() == b"kernels"
    monkeypatch.delenv("LOCALAPPDATA")
    cache = KernelCache(engine)
    cache.save("a.bin", b"kernels")
    assert cache.load("a.bin") is None

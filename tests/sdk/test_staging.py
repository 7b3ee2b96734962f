"""mdf_sdk.staging: a directory that appears whole or not at all."""

import os
from pathlib import Path

import pytest

from mdf_sdk.errors import InputError
from mdf_sdk.staging import staged_directory


def test_the_directory_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "a" / "b") as staging:
        (staging / "file").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "1"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_block_leaves_nothing(
    tmp_path: Path, interrupt: type[BaseException]
) -> None:
    def fill() -> None:
        with staged_directory(tmp_path / "new") as staging:
            (staging / "file").write_text("1")
            raise interrupt

    with pytest.raises(interrupt):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_an_old_directory_stays_until_its_successor_is_complete(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("1")
    with staged_directory(tmp_path / "old", replace=True) as staging:
        (staging / "file").write_text("2")
        assert (tmp_path / "old" / "file").read_text() == "1"
    assert (tmp_path / "old" / "file").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="expected a new or empty"), staged_directory(taken):
            pass
    assert (tmp_path / "file").read_text() == "1"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file modes")
def test_private_files_get_the_permissions_of_the_users_umask(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "new") as staging:
        (staging / "folder").mkdir(mode=0o700)
        (staging / "folder" / "file").touch(mode=0o600)
    umask = os.umask(0)
    os.umask(umask)
    for path, mode in (("new", 0o777), ("new/folder", 0o777), ("new/folder/file", 0o666)):
        assert (tmp_path / path).stat().st_mode & 0o777 == mode & ~umask

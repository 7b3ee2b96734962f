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


def test_what_came_to_the_name_meanwhile_is_kept(tmp_path: Path) -> None:
    def lose_the_race() -> None:
        with staged_directory(tmp_path / "new") as staging:
            (staging / "file").write_text("1")
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "precious").write_text("2")

    with pytest.raises(InputError, match="found something there"):
        lose_the_race()
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "precious"]


def test_an_interrupt_between_the_renames_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("1")
    replace = Path.replace

    def interrupt(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupt)
    with (
        pytest.raises(KeyboardInterrupt),
        staged_directory(tmp_path / "old", replace=True) as staging,
    ):
        (staging / "file").write_text("2")
    assert (tmp_path / "old" / "file").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_name_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with (
        pytest.raises(InputError, match="nothing can be written there"),
        staged_directory(tmp_path / "file" / "new"),
    ):
        pass


def test_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with staged_directory(tmp_path / "link", replace=True) as staging:
        (staging / "file").write_text("1")
    assert (tmp_path / "real" / "file").read_text() == "1"
    assert (tmp_path / "link").is_symlink()

"""Fixtures of the SDK's tests: a toy engine, and a picture that looks like a fundus photograph."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mdf_sdk import MDFClassifier

from .toy_engine import build_toy_engine


@pytest.fixture(scope="session")
def toy_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole engine; not to be changed."""
    engine_dir = tmp_path_factory.mktemp("sdk") / "engine"
    build_toy_engine(engine_dir)
    return engine_dir


@pytest.fixture
def toy_copy(toy_engine: Path, tmp_path: Path) -> Path:
    """A copy of the engine, to be damaged."""
    return Path(shutil.copytree(toy_engine, tmp_path / "engine"))


@pytest.fixture(scope="session")
def classifier(toy_engine: Path) -> Iterator[MDFClassifier]:
    with MDFClassifier(toy_engine, threads=1) as classifier:
        yield classifier


@pytest.fixture(scope="session")
def photograph() -> npt.NDArray[np.uint8]:
    """uint8 (240, 320, 3): a round bright field of 200 px on black, its left half brighter."""
    rows, columns = np.mgrid[:240, :320]
    field = (rows - 120) ** 2 + (columns - 180) ** 2 < 100**2
    picture = np.zeros((240, 320, 3), np.uint8)
    picture[field] = (180, 80, 40)
    picture[field & (columns < 180)] = (220, 140, 60)
    return picture


@pytest.fixture
def entry_points_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The entry points of an installed stand-in with the SDK's commands; may be added to."""
    folder = tmp_path / "site" / "stand_in-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n")
    commands = [
        f"{name} = mdf_sdk.commands:add_{name}\n" for name in ("predict", "info", "verify", "sign")
    ]
    path = folder / "entry_points.txt"
    path.write_text("[mdf.commands]\n" + "".join(commands))
    monkeypatch.syspath_prepend(folder.parent)
    return path

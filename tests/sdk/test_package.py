import tomllib
from pathlib import Path

import mdf_sdk


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert mdf_sdk.__version__ == project["version"]


def test_every_public_name_exists() -> None:
    assert all(hasattr(mdf_sdk, name) for name in mdf_sdk.__all__)


def test_the_package_is_typed() -> None:
    assert (Path(mdf_sdk.__file__).parent / "py.typed").exists()

"""A real engine with integer weights, which several tests of the export read."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def int4_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in int4, rounded to nearest; not to be changed."""
    from mdf_export import build_engine
    from mdf_export.recipe import ExportRecipe

    engine = tmp_path_factory.mktemp("engines") / "int4"
    build_engine(tiny_checkpoint, engine, ExportRecipe("int4", method="rtn"))
    return engine

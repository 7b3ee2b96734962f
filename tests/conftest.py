"""Session fixtures: one tiny real checkpoint, and the real engine made from it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def demo_engine() -> Path:
    """The engine that the repository ships."""
    return ROOT / "examples" / "demo_engine"


@pytest.fixture(scope="session")
def twelve_labels() -> tuple[str, ...]:
    """Labels of one token and of several; some share their first token, some begin another."""
    return (
        "Acquired",
        "Inherited",
        "Acquired disease",
        "Acquired retinopathy of unknown cause",
        "Inherited disease",
        "Glaucoma",
        "Stargardt",
        "Best",
        "Best disease",
        "retinitis pigmentosa",
        "retinitis",
        "age-related macular degeneration",
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano checkpoint with random weights, in which every gate is open."""
    import torch

    from mdf_training.checkpoint import Checkpoint, save_checkpoint
    from mdf_training.config import load_preset
    from mdf_training.model import build_model
    from mdf_training.tokenizer import load_tokenizer

    torch.manual_seed(0)
    model = build_model("nano").eval()
    open_gates(model)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    provenance = {"notice": "Random weights, for tests.", "history": []}
    save_checkpoint(folder, Checkpoint(model, load_tokenizer(load_preset("nano")), provenance))
    return folder


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint exported in fp32."""
    from mdf_export import build_engine

    engine = tmp_path_factory.mktemp("engines") / "tiny"
    build_engine(tiny_checkpoint, engine, "fp32")
    return engine


@pytest.fixture(scope="session")
def int4_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in int4, rounded to nearest; not to be changed."""
    from mdf_export import build_engine
    from mdf_export.recipe import ExportRecipe

    engine = tmp_path_factory.mktemp("engines") / "int4"
    build_engine(tiny_checkpoint, engine, ExportRecipe("int4", method="rtn"))
    return engine


@pytest.fixture(scope="session")
def w8a8_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in w8a8, calibrated on 8 cases; not to be changed."""
    from mdf_export import build_engine
    from mdf_export.recipe import ExportRecipe

    engine = tmp_path_factory.mktemp("engines") / "w8a8"
    build_engine(tiny_checkpoint, engine, ExportRecipe("w8a8", calibration_cases=8))
    return engine


@pytest.fixture(scope="session")
def skip_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with two skips that ask: its layers read 64 and 37 states in turn."""
    folder = tmp_path_factory.mktemp("checkpoints") / "skip"
    return with_fusion(tiny_checkpoint, folder, query="skip", depths=[0, 2])


@pytest.fixture(scope="session")
def skip_engine(skip_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint whose skips ask, exported in fp32."""
    from mdf_export import build_engine

    engine = tmp_path_factory.mktemp("engines") / "skip"
    build_engine(skip_checkpoint, engine, "fp32")
    return engine


@pytest.fixture(autouse=True, scope="session")
def _torch_threads() -> Iterator[None]:
    """Two threads fighting over a shared core wait for each other; the models here are tiny."""
    try:
        import torch
    except ModuleNotFoundError:  # the bare wheel's run
        yield
        return
    torch.set_num_threads(1)
    yield


def with_fusion(checkpoint: Path, folder: Path, **fields: object) -> Path:
    """Copy a checkpoint, its weights as they are, and change fields of its FusionConfig."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["fusion"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def open_gates(model: "object") -> None:
    """Open every gate, and give what starts at a constant random values, in place."""
    import torch
    from torch import nn

    assert isinstance(model, nn.Module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() == 1:
                parameter.fill_(0.7)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "film" in name or "tile" in name:
                parameter.normal_(std=0.1)

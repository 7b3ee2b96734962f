"""mdf_training.checkpoint: what is saved is what is loaded, and nothing else is."""

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdf_sdk.errors import CheckpointError, StorageError
from mdf_training import checkpoint as checkpoint_module
from mdf_training.checkpoint import (
    TensorFiles,
    checkpoint_digest,
    load_checkpoint,
    recover_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit_tensors(folder: Path, edit: "object") -> None:
    assert callable(edit)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_tensor_comes_back_bit_by_bit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = load_checkpoint(tiny_checkpoint)
    save_checkpoint(tmp_path / "again", first)
    second = load_checkpoint(tmp_path / "again")
    assert second.config == first.config
    assert second.tokenizer_json == first.tokenizer_json
    expected = first.model.state_dict()
    found = second.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoint_digest(tmp_path / "again") == checkpoint_digest(tiny_checkpoint)


def test_shards_load_as_one_file_does(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "MAX_SHARD_SIZE", "2MB")
    whole = load_checkpoint(tiny_checkpoint)
    save_checkpoint(tmp_path / "sharded", whole)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    expected = whole.model.state_dict()
    found = load_checkpoint(tmp_path / "sharded").model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_files_are_json_and_safetensors_alone(tiny_checkpoint: Path) -> None:
    assert {p.name for p in tiny_checkpoint.iterdir()} == {
        "config.json",
        "model.safetensors",
        "provenance.json",
        "tokenizer.json",
    }


def test_a_missing_tensor_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop("fusion.0.gate"))
    with pytest.raises(CheckpointError, match=r"missing fusion\.0\.gate"):
        load_checkpoint(copy)


def test_an_unknown_tensor_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"lora.a": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"unknown lora\.a"):
        load_checkpoint(copy)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"fusion.0.gate": torch.zeros(3)}))
    with pytest.raises(
        CheckpointError, match=r"fusion\.0\.gate: found shape \[3\], expected \[1\]"
    ):
        load_checkpoint(copy)


def test_nan_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors["fusion.0.gate"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"NaN or infinity in fusion\.0\.gate"):
        load_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "provenance.json"])
def test_a_missing_file_is_named_with_the_command_that_makes_a_checkpoint(
    copy: Path, name: str
) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.*mdf train"):
        load_checkpoint(copy)


def test_a_truncated_tensor_file_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(copy)


def test_an_unknown_config_field_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "temprature": 1.0}))
    with pytest.raises(CheckpointError, match="temprature"):
        load_checkpoint(copy)


def test_a_save_that_fails_leaves_the_previous_checkpoint(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint_digest(copy)
    checkpoint = load_checkpoint(copy)
    with torch.no_grad():
        checkpoint.model.fusion[0].gate.fill_(0.1)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_write_json", fail)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(copy, checkpoint)
    assert checkpoint_digest(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_saving_leaves_the_previous_checkpoint(
    copy: Path, full_disk: None
) -> None:
    before = checkpoint_digest(copy)
    checkpoint = load_checkpoint(copy)
    with pytest.raises(StorageError, match=r"That one is kept.*--resume"):
        save_checkpoint(copy, checkpoint)
    assert checkpoint_digest(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_further_tensors_come_back_by_their_files_stem(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "MAX_SHARD_SIZE", "1MB")
    moments = {
        "a.step": torch.tensor(3.0),
        "a.exp_avg": torch.arange(300_000.0),
        "b.exp_avg": torch.ones(2, 200_000),
    }
    save_checkpoint(
        tmp_path / "out", load_checkpoint(tiny_checkpoint), tensors={"optimizer": moments}
    )
    assert len(list((tmp_path / "out").glob("optimizer-*.safetensors"))) > 1
    files = TensorFiles(tmp_path / "out", "optimizer")
    assert files.shapes == {name: list(t.shape) for name, t in moments.items()}
    for name, expected in moments.items():
        found = torch.zeros_like(expected)
        files.read_into(found, name)
        assert torch.equal(found, expected)
        assert torch.equal(files[name], expected)
    load_checkpoint(tmp_path / "out")  # they are none of the model's


def test_what_a_kill_between_two_renames_took_away_is_put_back(copy: Path) -> None:
    before = checkpoint_digest(copy)
    old, partial = copy.parent / f".{copy.name}.x.old", copy.parent / f".{copy.name}.y.partial"
    old.mkdir()
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    copy.rename(old / copy.name)
    recover_checkpoint(copy)
    assert checkpoint_digest(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


def test_a_checkpoint_in_its_place_is_kept_and_the_older_one_goes(copy: Path) -> None:
    before = checkpoint_digest(copy)
    old = copy.parent / f".{copy.name}.x.old" / copy.name
    shutil.copytree(copy, old)
    (old / "config.json").write_text("{}")
    recover_checkpoint(copy)
    assert checkpoint_digest(copy) == before
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]

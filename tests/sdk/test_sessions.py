import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mdf_sdk import BackendRunError, BackendUnavailableError, InputError, load_manifest
from mdf_sdk.sessions import open_backend


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_every_device_of_this_machine_has_a_backend(device: str) -> None:
    backend = open_backend(device)
    assert backend.device == "cpu"
    assert backend.name.startswith("onnxruntime 1.")


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(BackendUnavailableError, match=r"'tpu'.*auto, cpu.*pip install"):
        open_backend("tpu")


def test_a_missing_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'mdf-mllm\[cpu\]'"):
        open_backend("cpu")


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_positive(threads: int) -> None:
    with pytest.raises(InputError, match="threads"):
        open_backend("cpu", threads=threads)


def test_a_session_gives_every_output_by_name(toy_engine: Path) -> None:
    spec = load_manifest(toy_engine).blocks["unet_encoder"]
    session = open_backend("cpu").open("unet_encoder", toy_engine / spec.file, spec)
    outputs = session.run({"unet_pixels": np.zeros((2, 3, 32, 32), np.float32)})
    assert set(outputs) == {output.name for output in spec.outputs}
    assert outputs["skip_0"].shape == (2, 3, 16, 16)


def test_a_wrong_shape_is_our_error_and_names_the_block(toy_engine: Path) -> None:
    spec = load_manifest(toy_engine).blocks["vision"]
    session = open_backend("cpu").open("vision", toy_engine / spec.file, spec)
    with pytest.raises(BackendRunError, match="block vision"):
        session.run({"tower_pixels": np.zeros((1, 3, 9, 9), np.float32)})


def test_a_closed_session_does_not_run(toy_engine: Path) -> None:
    spec = load_manifest(toy_engine).blocks["vision"]
    session = open_backend("cpu").open("vision", toy_engine / spec.file, spec)
    session.close()
    session.close()
    with pytest.raises(BackendRunError):
        session.run({"tower_pixels": np.zeros((1, 3, 16, 16), np.float32)})


def test_the_runtime_writes_nothing_under_the_users_home(toy_engine: Path, tmp_path: Path) -> None:
    code = f"""
from mdf_sdk import MDFClassifier
with MDFClassifier({str(toy_engine)!r}):
    pass
"""
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []

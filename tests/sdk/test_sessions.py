import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mdf_sdk import (
    BackendRunError,
    BackendUnavailableError,
    DeviceMemoryError,
    InputError,
    load_manifest,
)
from mdf_sdk.machine import usable_cores
from mdf_sdk.sessions import Backend, open_backend
from mdf_sdk.sessions.cuda_memory import CudaMemory


def open_for(engine_dir: Path, device: str = "cpu", threads: int | None = None) -> Backend:
    return open_backend(device, engine_dir, load_manifest(engine_dir), threads=threads)


def without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the card of the machine that runs the tests, if it has one, look away."""

    def refuse(self: CudaMemory) -> None:
        raise BackendUnavailableError("found no card")

    monkeypatch.setattr(CudaMemory, "__init__", refuse)


def test_the_cpu_says_what_it_is(toy_engine: Path) -> None:
    backend = open_for(toy_engine)
    assert backend.device == "cpu"
    assert backend.name.startswith("onnxruntime 1.")
    assert backend.card
    assert backend.device_bytes() is None


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_was_asked_for_is_never_another(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    without_a_card(monkeypatch)
    with pytest.raises(BackendUnavailableError):
        open_for(toy_engine, device)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_an_engine_for_processors_is_refused_by_a_card_before_anything_is_loaded(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(CudaMemory, "__init__", lambda _: pytest.fail("looked for a card"))
    manifest = replace(load_manifest(toy_engine), precision="w8a8")
    with pytest.raises(BackendUnavailableError, match=r"found an engine in w8a8.*--precision int4"):
        open_backend(device, toy_engine, manifest)
    assert open_backend("cpu", toy_engine, manifest).device == "cpu"


def test_an_unknown_device_lists_the_known_ones(toy_engine: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"'tpu'.*auto, tensorrt, cuda, cpu"):
        open_for(toy_engine, "tpu")


def test_a_missing_runtime_names_the_extra(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'mdf-mllm\[cpu\]'"):
        open_for(toy_engine)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_positive(toy_engine: Path, threads: int) -> None:
    with pytest.raises(InputError, match="threads"):
        open_for(toy_engine, threads=threads)


def test_as_many_predictions_run_as_the_cores_have_threads_for(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert open_for(toy_engine).slots == 1
    assert open_for(toy_engine, threads=3).slots == 2
    assert open_for(toy_engine, threads=99).slots == 1


def test_without_an_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # Windows and macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6


def test_a_session_gives_every_output_by_name(toy_engine: Path) -> None:
    spec = load_manifest(toy_engine).blocks["unet_encoder"]
    session = open_for(toy_engine).open("unet_encoder")
    outputs = session.run({"unet_pixels": np.zeros((2, 3, 32, 32), np.float32)})
    assert set(outputs) == {output.name for output in spec.outputs}
    assert outputs["skip_0"].shape == (2, 3, 16, 16)


def test_a_wrong_shape_is_our_error_and_names_the_block(toy_engine: Path) -> None:
    session = open_for(toy_engine).open("vision")
    with pytest.raises(BackendRunError, match="block vision"):
        session.run({"tower_pixels": np.zeros((1, 3, 9, 9), np.float32)})


def test_a_closed_session_does_not_run(toy_engine: Path) -> None:
    session = open_for(toy_engine).open("vision")
    session.close()
    session.close()
    with pytest.raises(BackendRunError):
        session.run({"tower_pixels": np.zeros((1, 3, 16, 16), np.float32)})


def failing_once(runtime: Any, reason: str) -> Any:
    """ONNX Runtime's session, whose provider fails as it is made; the processor's then works."""

    class Failing(runtime.InferenceSession):  # type: ignore[misc]
        _failed = False

        def _create_inference_session(self, providers: Any, *others: Any) -> None:
            if not self._failed:
                self._failed, self._fallback_providers = True, ["CPUExecutionProvider"]
                raise RuntimeError(reason)
            super()._create_inference_session(providers, *others)

    return Failing


def test_a_provider_that_fails_is_not_replaced_by_another(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "CUDA failure 2: out of memory"
    monkeypatch.setattr(onnxruntime, "InferenceSession", failing_once(onnxruntime, reason))
    with pytest.raises(DeviceMemoryError, match=reason):
        open_for(toy_engine).open("vision")
    assert capsys.readouterr().out == ""


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

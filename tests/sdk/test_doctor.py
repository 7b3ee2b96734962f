"""What `mdf doctor` finds, in real processes: without a card, and with packages that break."""

import json
from pathlib import Path

import pytest

from mdf_sdk.cli import main
from mdf_sdk.doctor import Diagnosis, Finding, _examine, _try, diagnose
from mdf_sdk.errors import BackendUnavailableError, ManifestError
from mdf_sdk.sessions import open_backend
from mdf_sdk.sessions.onnxruntime_load import import_onnxruntime
from mdf_sdk.sessions.onnxruntime_probe import check_provider

from . import fake_tensorrt
from .fake_tensorrt import HostCard, compile_toy
from .test_sessions import failing_once

LONG_S = 120.0


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """No card is visible, here and in the processes that doctor starts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def put_package(folder: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other processes import this package instead of the installed one."""
    (folder / "site" / name).mkdir(parents=True)
    (folder / "site" / name / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))


@pytest.mark.usefixtures("no_card")
def test_without_a_card_the_cpu_works_and_the_others_say_why_not() -> None:
    diagnosis = diagnose(limit_s=LONG_S)
    assert diagnosis.ok
    assert [(f.name, f.works) for f in diagnosis.backends] == [
        ("tensorrt", False),
        ("cuda", False),
        ("cpu", True),
    ]
    assert diagnosis.auto is None
    tensorrt, cuda, cpu = diagnosis.backends
    assert cpu.detail.startswith("onnxruntime 1.")
    for finding in (diagnosis.card, tensorrt, cuda):
        assert "NVIDIA driver" in finding.detail or "pip install" in finding.detail
    assert diagnosis.machine["versions"].keys() >= {"numpy", "onnxruntime"}


@pytest.mark.usefixtures("no_card")
def test_with_an_engine_a_block_is_run_and_autos_choice_is_told(toy_engine: Path) -> None:
    diagnosis = diagnose(toy_engine, limit_s=LONG_S)
    assert diagnosis.auto == "cpu"
    assert "ran unet_encoder; the memory suffices" in diagnosis.backends[-1].detail
    assert f"takes cpu for {toy_engine}" in " ".join(str(diagnosis).split())


def test_an_engine_whose_manifest_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        diagnose(tmp_path)


def test_an_engine_with_a_damaged_file_does_not_work(toy_copy: Path) -> None:
    with (toy_copy / "vision.onnx").open("r+b") as file:
        file.write(b"X")
    finding = _examine("cpu", str(toy_copy), LONG_S)
    assert (finding.works, finding.opens) == (False, True)
    assert "vision.onnx: found SHA-256" in finding.detail


def test_a_library_that_aborts_is_reported_and_takes_nothing_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, sys; print('a CUDA library says this', file=sys.stderr, flush=True); os.abort()"
    )
    put_package(tmp_path, "onnxruntime", code, monkeypatch)
    finding = _examine("cpu", None, LONG_S)
    assert not finding.works
    assert "its libraries crashed with" in finding.detail
    assert "a CUDA library says this" in finding.detail
    assert "pip install --force-reinstall" in finding.detail


def test_a_library_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import threading; threading.Event().wait()"
    put_package(tmp_path, "onnxruntime", code, monkeypatch)
    finding = _examine("cpu", None, limit_s=2.0)
    assert not finding.works
    assert "hung: gave no answer in 2 s" in finding.detail


def test_what_a_library_prints_does_not_hide_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "print('{\"a line without an end\":', end=''); raise ImportError('no library')"
    put_package(tmp_path, "onnxruntime", code, monkeypatch)
    finding = _examine("cpu", None, LONG_S)
    assert "found no working onnxruntime (no library)" in finding.detail


def test_doctor_gives_the_reasons_that_opening_a_backend_gives(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mdf_sdk import load_manifest

    monkeypatch.setattr("mdf_sdk.sessions.cuda_memory.CudaMemory", HostCard)
    with pytest.raises(BackendUnavailableError) as raised:
        open_backend("tensorrt", toy_engine, load_manifest(toy_engine))
    assert _try("tensorrt", str(toy_engine)).detail == str(raised.value)


def test_an_engine_with_plans_for_the_card_works_on_tensorrt(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(monkeypatch)
    compile_toy(toy_copy)
    finding = _try("tensorrt", str(toy_copy))
    assert finding.works
    assert finding.detail.startswith("tensorrt_rtx 1.7.1.116 on a card played by the host ran")
    assert "its plans are tried with" in _try("tensorrt", None).detail
    assert _try("card", None).detail == "a card played by the host, 8.0 of 8.0 GB free"


def test_a_backend_with_too_little_memory_is_none_that_auto_takes(
    toy_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_tensorrt.install(monkeypatch)
    compile_toy(toy_copy)
    monkeypatch.setattr(HostCard, "free_and_total_bytes", lambda self: (1000, 8_000_000_000))
    finding = _try("tensorrt", str(toy_copy))
    assert (finding.works, finding.opens) == (False, False)
    assert "free of" in finding.detail


def test_both_packages_of_onnxruntime_are_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "onnxruntime_gpu-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "mdf_sdk.doctor._examine", lambda name, engine, limit_s: Finding(name, False, False, "")
    )
    diagnosis = diagnose()
    assert not diagnosis.ok
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in diagnosis.notes[0]


class _Left:
    """A runtime whose provider was left out, as ONNX Runtime does with one that does not load."""

    __version__ = "1.0"
    __file__ = __file__
    SessionOptions = staticmethod(lambda: import_onnxruntime("cpu").SessionOptions())

    @staticmethod
    def InferenceSession(*arguments: object, providers: list[str], **others: object) -> object:
        return import_onnxruntime("cpu").InferenceSession(
            *arguments, providers=["CPUExecutionProvider"], **others
        )


def test_a_provider_that_does_not_load_is_named_with_its_library() -> None:
    check_provider(import_onnxruntime("cpu"), "CPUExecutionProvider")
    words = r"device 'cuda': found CUDAExecutionProvider .*providers_cuda.*pip install"
    with pytest.raises(BackendUnavailableError, match=words):
        check_provider(_Left, "CUDAExecutionProvider")


def test_a_provider_that_fails_is_told_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = import_onnxruntime("cpu")
    reason = "CUDA failure 35: CUDA driver version is insufficient"
    monkeypatch.setattr(runtime, "InferenceSession", failing_once(runtime, reason))
    with pytest.raises(BackendUnavailableError, match=reason):
        check_provider(runtime, "CUDAExecutionProvider")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, 1)])
def test_the_command_succeeds_if_a_backend_works(
    entry_points_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    works: bool,
    code: int,
) -> None:
    with entry_points_file.open("a") as file:
        file.write("doctor = mdf_sdk.commands:add_doctor\n")
    finding = Finding("cpu", works, works, "as told")
    card = Finding("card", False, False, "none")
    diagnosis = Diagnosis(
        None, card, (finding,), None, {}, (), {"cpu": "x", "cores": 2, "system": "y", "python": "3"}
    )
    diagnosis.machine["versions"] = {}
    monkeypatch.setattr("mdf_sdk.doctor.diagnose", lambda engine: diagnosis)
    assert main(["doctor", "--json"]) == code
    printed = capsys.readouterr().out
    assert f"cpu       {'works' if works else 'does not work'}: as told" in printed
    document = json.loads(printed.splitlines()[-1])
    assert document["ok"] is works
    assert document["backends"] == [
        {"name": "cpu", "works": works, "opens": works, "detail": "as told"}
    ]

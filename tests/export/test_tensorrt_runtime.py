"""The SDK's TensorRT backend on plans of the real compiler, up to where a card is needed."""

import ast
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorrt_rtx

from mdf_export.tensorrt import compile_engine
from mdf_sdk import BackendRunError, BackendUnavailableError, load_manifest
from mdf_sdk.manifest import BLOCKS
from mdf_sdk.sessions import tensorrt as backend_module
from mdf_sdk.sessions.tensorrt import TensorRTBackend

from ..sdk import fake_tensorrt  # noqa: TID252 - tests are no installed package

OURS = ("Behavior", "HostCard", "HostMemory", "Manifest", "Path", "PlanSpec")


@pytest.fixture(scope="module")
def compiled(int4_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder in parts of three layers; not to be changed."""
    folder = Path(shutil.copytree(int4_engine, tmp_path_factory.mktemp("runtime") / "engine"))
    compile_engine(folder, layers_per_plan=3)
    return folder


def test_plans_of_the_real_compiler_make_up_their_blocks(compiled: Path) -> None:
    backend = TensorRTBackend(compiled, load_manifest(compiled), fake_tensorrt.HostCard())
    assert backend.name == f"tensorrt_rtx {tensorrt_rtx.__version__}"
    assert [len(backend.files(block)) for block in BLOCKS] == [1, 1, 1, 3, 1]


def test_a_card_that_no_plan_is_for_is_refused(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_tensorrt.HostCard, "compute_capability", "7.5")
    with pytest.raises(BackendUnavailableError, match=r"8\.6, 8\.9, 12\.0 .*-capability 7\.5"):
        TensorRTBackend(compiled, load_manifest(compiled), fake_tensorrt.HostCard())


def test_the_parts_of_a_block_in_another_order_are_refused(compiled: Path) -> None:
    manifest = load_manifest(compiled)
    turned = dataclasses.replace(manifest, plans=manifest.plans[::-1])
    with pytest.raises(Exception, match="block decoder: found a plan that reads"):
        TensorRTBackend(compiled, turned, fake_tensorrt.HostCard())


@pytest.mark.parametrize("block", BLOCKS)
def test_without_a_card_the_package_refuses_in_our_words_and_prints_nothing(
    compiled: Path, block: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if _has_card():
        pytest.skip("there is a card")
    backend = TensorRTBackend(compiled, load_manifest(compiled), fake_tensorrt.HostCard())
    with pytest.raises(BackendRunError, match=rf"block {block}: TensorRT could not load .*CUDA"):
        backend.open(block)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_no_plan_is_refused(compiled: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compiled, tmp_path / "engine"))
    backend = TensorRTBackend(folder, load_manifest(folder), fake_tensorrt.HostCard())
    (name,) = backend.files("vision")
    (folder / name).write_bytes(b"no plan at all" * 100)
    with pytest.raises(BackendUnavailableError, match="MALFORMED_ENGINE"):
        backend.open("vision")


def test_the_stand_in_has_no_name_that_the_package_lacks() -> None:
    classes = {
        name: kind
        for name, kind in inspect.getmembers(fake_tensorrt, inspect.isclass)
        if kind.__module__ == fake_tensorrt.__name__ and name not in OURS
    }
    assert len(classes) > 10
    for name, kind in classes.items():
        real = getattr(tensorrt_rtx, name)
        public = {member for member in vars(kind) if not member.startswith("_")}
        assert public <= set(dir(real)), name
        for member in getattr(kind, "__members__", {}):
            value = getattr(kind[member], "value", None)
            if isinstance(value, int):
                assert int(getattr(real, member)) == value, (name, member)


@pytest.mark.slow
def test_the_backend_is_typed_against_the_packages_own_signatures(tmp_path: Path) -> None:
    """The package has no stubs: they are made from the signatures in its docstrings."""
    stubgen = "import sys; from mypy.stubgen import main; main(sys.argv[1:])"
    run_python("-c", stubgen, "-p", "tensorrt_rtx_bindings", "-o", tmp_path / "raw")
    text = (tmp_path / "raw/tensorrt_rtx_bindings/tensorrt_rtx.pyi").read_text(encoding="utf-8")
    stubs = tmp_path / "stubs" / "tensorrt_rtx"
    stubs.mkdir(parents=True)
    (stubs / "__init__.pyi").write_text(readable(text), encoding="utf-8")
    source = Path(backend_module.__file__)
    misspelled = tmp_path / "misspelled.py"
    right = source.read_text(encoding="utf-8")
    misspelled.write_text(right.replace(".execute_async_v3(", ".execute_async_v9("))
    config = tmp_path / "mypy.ini"
    config.write_text(
        f"[mypy]\nstrict = true\nmypy_path = {stubs.parent}, {source.parents[2]}\n"
        "warn_unused_ignores = false\ndisallow_untyped_calls = false\nfollow_imports = silent\n"
        "[mypy-tensorrt_rtx]\nignore_errors = true\n"
    )
    printed = run_python("-m", "mypy", "--config-file", config, misspelled, code=1)
    assert re.findall(r"error: (.*?)  \[", printed) == [
        '"IExecutionContext" has no attribute "execute_async_v9"; maybe "execute_async_v3"?'
    ]
    run_python("-m", "mypy", "--config-file", config, source)


@pytest.mark.gpu
def test_the_plans_give_the_golden_outputs(compiled: Path) -> None:
    from mdf_sdk import verify_engine

    if not _has_card():
        pytest.skip("there is no card")
    report = verify_engine(compiled, "tensorrt")
    assert report.ok, str(report)


def readable(stubs: str) -> str:
    """Drop what stubgen writes that no parser takes, and constants that hide builtins."""
    lines = re.sub(r"(?m)^\w+: DataType\n", "", stubs).split("\n")
    while True:
        try:
            ast.parse("\n".join(lines))
            return "\n".join(lines)
        except SyntaxError as error:
            line = (error.lineno or 0) - 1
        assert "*args: Any" not in lines[line]
        lines[line] = re.sub(r"\(.*", "(self, *args: Any) -> Any: ...", lines[line])


def run_python(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout


def _has_card() -> bool:
    from mdf_sdk.sessions.cuda_memory import CudaMemory

    try:
        CudaMemory()
    except BackendUnavailableError:
        return False
    return True

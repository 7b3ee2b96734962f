"""The wheel by itself, in a bare environment: no torch, and it predicts."""

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from mdf_training.data.synthetic import SyntheticData

ROOT = Path(__file__).parent.parent
PIP = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
BARE_MB = 320
pytestmark = pytest.mark.slow


def run(*command: str | Path, code: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel and its `cpu` extra alone."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "python", *PIP, f"{wheel}[cpu]")
    return folder / "bin"


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photograph") / "eye.png"
    Image.fromarray(SyntheticData(1, 9)[0].image).save(path)
    return path


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {"mdf_sdk", "mdf_export", "mdf_training", "mdf_benchmarks"}
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == packages
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_a_bare_environment_is_small_and_free_of_torch(bare: Path) -> None:
    installed = json.loads(run(bare / "python", "-m", "pip", "list", "--format", "json"))
    names = {package["name"].lower() for package in installed}
    assert not names & {"torch", "transformers", "scipy", "onnx"}
    size_mb = sum(p.stat().st_size for p in bare.parent.rglob("*") if p.is_file()) / 1e6
    print(f"bare environment: {size_mb:.0f} MB")
    assert size_mb <= BARE_MB


def test_a_bare_environment_predicts(bare: Path, demo_engine: Path, photograph: Path) -> None:
    command = ["predict", demo_engine, photograph, "--text", "Blurred vision.", "--json"]
    prediction = json.loads(run(bare / "mdf", *command).splitlines()[-1])
    assert prediction["label"] in ("Acquired", "Inherited")
    assert json.loads(run(bare / "mdf", "verify", demo_engine, "--json").splitlines()[-1])["ok"]


def test_a_bare_environment_evaluates_an_engine(bare: Path, demo_engine: Path) -> None:
    printed = run(bare / "mdf", "evaluate", demo_engine, "synthetic:40:5", "--json")
    assert json.loads(printed.splitlines()[-1])["accuracy"]["value"] > 0.8


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["train", "--preset", "nano", "--data", "synthetic:9:1", "--out", "x"], "training"),
        (["export", "x", "y", "--precision", "int4"], "export"),
        (["parity", "x", "--reference", "y", "--data", "synthetic:9:1"], "all"),
    ],
)
def test_a_missing_extra_is_named_with_its_install_line(
    bare: Path, tmp_path: Path, command: list[str], extra: str
) -> None:
    printed = run(bare / "mdf", *command, code=2, cwd=tmp_path)
    assert f"pip install 'mdf-mllm[{extra}]'" in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_the_sdks_own_tests_pass_in_a_bare_environment(bare: Path) -> None:
    packages = ["pytest", "hypothesis", "onnx", "pydicom", "pyjpegls", "cryptography"]
    run(bare / "python", *PIP, *packages)
    run(bare / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "sdk")

"""What may import what, and what importing the SDK costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "onnxruntime")
MAY_IMPORT = {
    "mdf_sdk": set[str](),
    "mdf_training": {"mdf_sdk"},
    "mdf_export": {"mdf_sdk", "mdf_training"},
    "mdf_benchmarks": {"mdf_sdk", "mdf_training", "mdf_export"},  # PyTorch, to compare with
}


def imported(package: str) -> Iterator[tuple[str, str]]:
    """Yield (file, top-level module) of every import in a package, those inside functions too."""
    files = sorted((ROOT / package.removeprefix("mdf_") / package).rglob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file.name, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield file.name, node.module.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_between_packages_run_one_way(package: str) -> None:
    forbidden = MAY_IMPORT.keys() - MAY_IMPORT[package] - {package}
    assert [pair for pair in imported(package) if pair[1] in forbidden] == []


def test_the_sdk_imports_only_its_declared_dependencies() -> None:
    allowed = {"mdf_sdk", "numpy", "PIL", "tokenizers", "onnxruntime", "cryptography", "pydicom"}
    allowed |= {"cuda", "tensorrt_rtx"}  # of extras; loaded where a card is looked for
    found = {module for _, module in imported("mdf_sdk")}
    assert "numpy" in found
    assert found - sys.stdlib_module_names <= allowed


def test_importing_the_sdk_loads_nothing_heavy_and_takes_under_300_ms() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); import mdf_sdk, mdf_sdk.cli;"
        "print(time.perf_counter() - start, *sys.modules)"
    )
    times_s = []
    for _ in range(10):
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        seconds, *modules = run.stdout.decode().split()
        assert "mdf_sdk" in modules
        assert not set(HEAVY) & set(modules)
        times_s.append(float(seconds))
    assert min(times_s) < 0.3

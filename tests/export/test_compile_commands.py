import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mdf_sdk import check_files, load_manifest
from mdf_sdk.cli import main


@pytest.fixture
def copy(int4_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int4_engine, tmp_path / "engine"))


def test_compile_prints_each_plan_then_json(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "manifest.sig").write_bytes(b"x" * 64)
    words = ["compile", str(copy), "--compute-capability", "8.6", "8.9", "--layers-per-plan", "4"]
    assert main([*words, "--json"]) == 0
    *plans, summary, unsigned, document = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in plans] == [
        *("vision", "unet_encoder", "fusion", "decoder.0", "decoder.1", "unet_decoder")
    ]
    assert "6 plans for 8.6, 8.9 by tensorrt_rtx" in summary
    assert unsigned.strip().startswith("manifest.sig was of the old manifest")
    assert not (copy / "manifest.sig").exists()
    result = json.loads(document)
    manifest = load_manifest(copy)
    assert [plan["file"] for plan in result["plans"]] == [plan.file for plan in manifest.plans]
    assert result["size_bytes"] == sum(plan["size_bytes"] for plan in result["plans"])
    assert result["compute_capabilities"] == ["8.6", "8.9"]
    assert result["build_s"] > 0


def test_an_impossible_card_is_an_error_with_its_cure(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", str(copy), "--compute-capability", "9.0"]) == 2
    assert "mdf compile ENGINE --compute-capability 12.1" in capsys.readouterr().err
    assert not (copy / "plans").exists()


def test_a_killed_compilation_leaves_an_engine_that_loads_and_compiles(copy: Path) -> None:
    command = [sys.executable, "-m", "mdf_sdk.cli", "compile", str(copy)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split()[0] == b"vision"
        os.kill(process.pid, signal.SIGKILL)
    manifest = load_manifest(copy)
    check_files(copy, manifest)
    assert manifest.plans == ()
    assert list((copy / "plans").rglob("*.plan"))
    assert main(["compile", str(copy)]) == 0
    manifest = load_manifest(copy)
    check_files(copy, manifest)
    found = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
    assert found == manifest.files.keys() | {"manifest.json"}

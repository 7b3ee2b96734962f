"""This machine, with or without an engine, in; for every backend, whether it works, or why not.

Each backend is really opened, in a process of its own: a library that aborts or hangs there is
reported, and takes nothing along.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mdf_sdk.errors import MDFError
from mdf_sdk.machine import machine_card
from mdf_sdk.manifest import load_manifest
from mdf_sdk.memory import check_memory
from mdf_sdk.sessions import DEVICES, open_backend

LIMIT_S = 300.0  # to hash an engine of 20 GB from a slow disk, and to load it
_BACKENDS = DEVICES[1:]
_CARD = "card"
_BLOCK = "unet_encoder"  # the least of an engine's that computes; all of it is float32
_DISTRIBUTIONS = (
    "mdf-mllm",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "cuda-bindings",
    "tensorrt-rtx",
    "tensorrt",
)
_EXTRAS = {"dicom": "pydicom", "sign": "cryptography"}


@dataclass(frozen=True)
class Finding:
    """What was found of the card, or of one backend.

    Attributes:
        name: one of DEVICES, or "card".
        works: whether it computed, with the engine if there is one.
        opens: whether device="auto" would take it: its runtime works, and it has the memory.
        detail: what works, or why it does not and what cures it.
    """

    name: str
    works: bool
    opens: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """What `mdf doctor` prints.

    Attributes:
        engine: the engine directory; None if none was given.
        card: of the first visible card.
        backends: the fastest first.
        auto: what device="auto" takes for the engine; None without an engine, or if none opens.
        extras: by name of an optional extra: what it brings, or its pip line.
        notes: what else is wrong with the installation.
        machine: processor, cores, system, versions.
    """

    engine: str | None
    card: Finding
    backends: tuple[Finding, ...]
    auto: str | None
    extras: dict[str, str]
    notes: tuple[str, ...]
    machine: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether at least one backend works."""
        return any(finding.works for finding in self.backends)

    def to_dict(self) -> dict[str, Any]:
        """Make a dict for JSON."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        machine = self.machine
        lines = [
            ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"),
            ("python", f"{machine['python']}, {_versions(machine['versions'])}"),
            ("card", self.card.detail),
        ]
        for finding in self.backends:
            why = "see card" if finding.detail == self.card.detail else finding.detail
            lines.append((finding.name, f"{'works' if finding.works else 'does not work'}: {why}"))
        if self.engine is not None:
            lines.append(("auto", f"takes {self.auto or 'nothing'} for {self.engine}"))
        lines += self.extras.items()
        lines += [("note", note) for note in self.notes]
        indent = " " * 10
        return "\n".join(
            textwrap.fill(
                f"{name:<10}{text}",
                100,
                subsequent_indent=indent,
                break_on_hyphens=False,
                break_long_words=False,
            )
            for name, text in lines
        )


def diagnose(
    engine_dir: str | os.PathLike[str] | None = None, *, limit_s: float = LIMIT_S
) -> Diagnosis:
    """Try every backend on this machine.

    Args:
        engine_dir: load and run a block of this engine; None tries the runtimes alone.
        limit_s: for each backend.

    Raises:
        EngineError: the engine's manifest cannot be read.
    """
    engine = None if engine_dir is None else str(engine_dir)
    if engine is not None:
        load_manifest(engine)
    card, *backends = (_examine(name, engine, limit_s) for name in (_CARD, *_BACKENDS))
    auto = next((finding.name for finding in backends if finding.opens), None)
    installed = [name for name in _DISTRIBUTIONS if _is_installed(name)]
    return Diagnosis(
        engine=engine,
        card=card,
        backends=tuple(backends),
        auto=auto if engine is not None else None,
        extras={
            extra: f"{module} is installed"
            if find_spec(module)
            else f"not installed: pip install 'mdf-mllm[{extra}]'"
            for extra, module in _EXTRAS.items()
        },
        notes=_notes(installed),
        machine=machine_card(installed),
    )


def _examine(name: str, engine: str | None, limit_s: float) -> Finding:
    """Try a backend, or look at the card, in a process of its own."""
    # Without -P its own folder would come first on the path of modules.
    command = [sys.executable, "-P", "-m", "mdf_sdk.doctor", name, *([engine] if engine else [])]
    try:
        run = subprocess.run(
            command, capture_output=True, timeout=limit_s, encoding="utf-8", errors="replace"
        )
    except subprocess.TimeoutExpired:
        return _broken(name, f"hung: gave no answer in {limit_s:g} s")
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        return _broken(name, f"crashed with {_exit(run.returncode)}: {last}")
    return Finding(**json.loads(run.stdout.splitlines()[-1]))


def _broken(name: str, what: str) -> Finding:
    cure = {
        "cpu": "pip install --force-reinstall 'mdf-mllm[cpu]'",
        "tensorrt": "update the NVIDIA driver, then pip install --force-reinstall "
        "'mdf-mllm[tensorrt-rtx]'",
    }.get(name, "update the NVIDIA driver, then pip install --force-reinstall 'mdf-mllm[cuda]'")
    return Finding(name, False, False, f"its libraries {what}. Try: {cure}")


def _exit(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code:#x}"


def _try(name: str, engine: str | None) -> Finding:
    """Do in this process what may take it along."""
    opens = False
    try:
        if name == _CARD:
            return Finding(name, True, False, _look_at_card())
        if engine is None:
            return Finding(name, True, True, _try_runtime(name))
        manifest = load_manifest(engine)
        check_memory(manifest, open_backend(name, Path(engine), manifest))
        opens = True
        return Finding(name, True, True, _try_engine(name, engine))
    except MDFError as error:
        return Finding(name, False, opens, str(error))


def _look_at_card() -> str:
    from mdf_sdk.sessions.cuda_memory import CudaMemory

    memory = CudaMemory()
    free, total = memory.free_and_total_bytes()
    return f"{memory.card}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _try_runtime(device: str) -> str:
    from mdf_sdk.sessions import tensorrt
    from mdf_sdk.sessions.cuda_memory import CudaMemory
    from mdf_sdk.sessions.onnxruntime_cuda import import_with_cuda
    from mdf_sdk.sessions.onnxruntime_load import import_onnxruntime
    from mdf_sdk.sessions.onnxruntime_probe import check_provider

    if device == "cpu":
        runtime = import_onnxruntime("cpu")
        check_provider(runtime, "CPUExecutionProvider")
        return f"onnxruntime {runtime.__version__}"
    card = CudaMemory().card
    if device == "cuda":
        return f"onnxruntime {import_with_cuda().__version__} on {card}"
    package = next((name for name in tensorrt.PACKAGES if find_spec(name)), tensorrt.PACKAGES[-1])
    version = tensorrt.import_package(package).__version__
    return f"{package} {version} on {card}; its plans are tried with: mdf doctor ENGINE"


def _try_engine(device: str, engine: str) -> str:
    from mdf_sdk.engine import Engine

    with Engine(engine, device=device) as loaded:
        shapes = {
            spec.name: tuple(1 if isinstance(d, str) else d for d in spec.shape)
            for spec in loaded.manifest.blocks[_BLOCK].inputs
        }
        loaded.run(_BLOCK, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        return f"{loaded.backend.name} on {loaded.backend.card} ran {_BLOCK}; the memory suffices"


def _notes(installed: list[str]) -> tuple[str, ...]:
    if {"onnxruntime", "onnxruntime-gpu"} <= set(installed):
        return (
            "onnxruntime and onnxruntime-gpu are both installed into one folder, and the last one "
            "wins. Remove both, then install one: pip uninstall -y onnxruntime onnxruntime-gpu, "
            "then pip install 'mdf-mllm[cuda]', which computes on the CPU too",
        )
    return ()


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _main(name: str, engine: str | None = None) -> None:
    finding = _try(name, engine)
    print()  # a library may have left a line unfinished
    print(json.dumps(asdict(finding)), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])

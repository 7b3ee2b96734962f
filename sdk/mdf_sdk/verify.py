"""An engine directory in, a report out: are its files whole and its numbers right here?

And, with a key, who vouches for them?
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdf_sdk.engine import Engine
from mdf_sdk.errors import EngineError
from mdf_sdk.extras import import_extra
from mdf_sdk.manifest import BLOCKS, GOLDEN_NAME, TrustedKey
from mdf_sdk.sessions import Array, Tensor

# Largest relative L2 difference from the full-precision output, by a block's precision. Measured on
# two CPU cores, 2026-11-22: fp32 6e-6, fp16 8e-3 (both smol-135m), int8 2e-2, fp8 2e-3 (both nano),
# int4 0.13 (nano and smol-135m, round to nearest); 2026-11-29: w8a8 2e-2 (smol-135m).
TOLERANCES = {
    "fp32": 1e-4,
    "tf32": 2e-3,
    "fp16": 2e-2,
    "int8": 5e-2,
    "fp8": 5e-2,
    "w8a8": 5e-2,
    "int4": 0.25,
}
_GOLDEN_DTYPES = (np.float32, np.float16, np.int64, np.bool_)


@dataclass(frozen=True)
class BlockReport:
    """How far one block is from its golden outputs: the worst of them, over all cases."""

    block: str
    precision: str
    max_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether it is within tolerance; NaN is not."""
        return self.max_error <= self.tolerance


@dataclass(frozen=True)
class VerifyReport:
    """Every block against its golden outputs, and all blocks in a row against the golden label.

    Attributes:
        cases: golden cases.
        same_label: of these, where the blocks in a row give the golden label.
        signed_by: fingerprint of the key whose signature was checked; None if none was.
    """

    device: str
    card: str
    backend: str
    blocks: tuple[BlockReport, ...]
    cases: int
    same_label: int
    signed_by: str | None

    @property
    def ok(self) -> bool:
        """Whether every block is within tolerance and every label is the same."""
        return all(block.ok for block in self.blocks) and self.same_label == self.cases

    def to_dict(self) -> dict[str, Any]:
        """Make a dict for JSON; an error that is not finite becomes None."""
        blocks = [
            {**asdict(block), "max_error": _finite(block.max_error), "ok": block.ok}
            for block in self.blocks
        ]
        return {**asdict(self), "blocks": blocks, "ok": self.ok}

    def __str__(self) -> str:
        lines = [f"{'block':<14}{'precision':<11}{'error':>10}{'tolerance':>12}"]
        for block in self.blocks:
            verdict = "ok" if block.ok else "TOO FAR"
            numbers = f"{block.max_error:>10.2e}{block.tolerance:>12.0e}"
            lines.append(f"{block.block:<14}{block.precision:<11}{numbers}  {verdict}")
        lines.append(f"same label as the golden scores: {self.same_label} of {self.cases} cases")
        if self.signed_by is not None:
            lines.append(f"signed by the key with SHA-256 {self.signed_by}")
        verdict = "verified" if self.ok else "NOT VERIFIED"
        lines.append(f"{verdict} on {self.device}, {self.card}, {self.backend}")
        return "\n".join(lines)


def verify_engine(
    engine_dir: str | os.PathLike[str],
    device: str = "auto",
    trusted_key: TrustedKey | None = None,
) -> VerifyReport:
    """Check every file's digest, then run every block on its golden inputs and compare.

    Args:
        trusted_key: whose signature the engine must have; None asks for none.

    Raises:
        EngineError: a file is not what the manifest says, golden.npz does not fit the engine, or it
            is not signed by the trusted key.
        BackendError: a block cannot be loaded or run here.
    """
    with Engine(engine_dir, device=device, trusted_key=trusted_key) as engine:
        signed_by = None
        if trusted_key is not None:
            signed_by = import_extra("mdf_sdk.signature", "sign").fingerprint(trusted_key)
        cases = load_golden(Path(engine_dir) / GOLDEN_NAME)
        reports = []
        for block in BLOCKS:
            spec = engine.manifest.blocks[block]
            errors = []
            for number, golden in cases.items():
                for tensor in (*spec.inputs, *spec.outputs):
                    if tensor.name not in golden:
                        raise _unfit(
                            f"no case{number}/{tensor.name}", f"every tensor of block {block}"
                        )
                outputs = engine.run(block, golden)
                errors += [
                    _relative_error(engine.backend.to_host(outputs[t.name]), golden[t.name])
                    for t in spec.outputs
                ]
            # numpy's max keeps a NaN, Python's may lose it
            worst = float(np.max(errors))
            reports.append(BlockReport(block, spec.precision, worst, TOLERANCES[spec.precision]))
        return VerifyReport(
            device=engine.backend.device,
            card=engine.backend.card,
            backend=engine.backend.name,
            blocks=tuple(reports),
            cases=len(cases),
            same_label=sum(_same_label(engine, golden) for golden in cases.values()),
            signed_by=signed_by,
        )


def load_golden(path: Path) -> dict[int, dict[str, Array]]:
    """Read golden.npz: for each case number, its tensors by name."""
    cases: dict[int, dict[str, Array]] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                match = re.fullmatch(r"case(\d+)/(\w+)", key, re.ASCII)
                if match is None:
                    raise ValueError(f"an array named {key!r}")
                array = arrays[key]
                if array.dtype not in _GOLDEN_DTYPES or not array.size:
                    raise ValueError(f"{key} as {array.dtype} {array.shape}")
                cases.setdefault(int(match[1]), {})[match[2]] = array
    except Exception as error:  # numpy and zipfile raise what their parsers meet
        raise _unfit(str(error)[:200], "arrays named case0/vision_states and so on") from error
    if not cases:
        raise _unfit("no case", "at least one: comparing nothing proves nothing")
    return cases


def _same_label(engine: Engine, golden: Mapping[str, Array]) -> bool:
    tensors: dict[str, Tensor] = dict(golden)
    for block in BLOCKS:
        tensors |= engine.run(block, tensors)
    scores = engine.backend.to_host(tensors["scores"])
    if scores.shape != golden["scores"].shape:
        return False
    return bool((scores.argmax(axis=1) == golden["scores"].argmax(axis=1)).all())


def _relative_error(actual: Array, golden: Array) -> float:
    """|actual - golden| / |golden|, both as L2 norms; infinite where the shapes differ."""
    if actual.shape != golden.shape:
        return float("inf")
    reference = golden.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, which fails
        difference = float(np.linalg.norm(actual.astype(np.float64) - reference))
    return difference / max(float(np.linalg.norm(reference)), 1e-12)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _unfit(found: str, expected: str) -> EngineError:
    return EngineError(
        f"{GOLDEN_NAME}: found {found}, expected {expected}. Export it again: mdf export "
        "CHECKPOINT ENGINE"
    )

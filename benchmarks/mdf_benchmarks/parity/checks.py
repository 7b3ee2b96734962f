"""What every part of a parity report is made of, and the one table of tolerances.

A check that holds has no fault. Of those that do not, the first fault of the first check is where
to look: every check is fed the reference's own inputs, so no fault spreads to a later one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mdf_sdk.verify import TOLERANCES

CHECKS = (
    "preprocessing",
    "vision",
    "unet_encoder",
    "fusion",
    "decoder",
    "unet_decoder",
    "golden",
    "sensitivity",
    "scores",
    "decisions",
)


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it should be: where, and what it is instead of what."""

    where: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}, expected {self.expected}"


@dataclass(frozen=True)
class Check:
    """One link of the chain from photograph to decision.

    Attributes:
        name: one of CHECKS.
        faults: empty where it holds.
        results: what was measured, JSON types.
    """

    name: str
    faults: tuple[Fault, ...]
    results: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        faults = [asdict(fault) for fault in self.faults]
        return {"name": self.name, "ok": self.ok, "faults": faults, "results": dict(self.results)}


@dataclass(frozen=True)
class ConstantTolerance:
    """How far a constant of a graph may be off (`mdf_export.proof.constants`)."""

    relative_l2: float
    gain: float
    spread: float


# Largest relative L2 difference of an output, a layer's stream or a cross-attention from the
# reference's, by the block's precision: those of `mdf verify`, which says where they were measured.
OUTPUT_TOLERANCES: dict[str, float] = dict(TOLERANCES)

# Of a constant, by its kind; indices and shapes must be equal. Measured 2026-11-27 on two CPU
# cores, engines of a trained and of a random nano and of a smol-135m, GPTQ and round to nearest,
# blocks of 32 and 128; the most seen: float 0, as the same torch computes it; fp8 2.6e-2 and a gain
# of 1.3e-3; int8 8e-3, 3e-4 and a spread of 1.5e-3; int4 0.16, 5e-3 and 0.030 (smol-135m on 8
# calibration cases); w8a8 3.3e-2, 5e-4 and 2e-3 (2026-11-29, GPTQ, SmolLM2's weights too). A
# factor of 1.02 gives int4 a gain of at least 1.6e-2; scales one group late a spread of at least
# 0.069.
CONSTANT_TOLERANCES = {
    "float": ConstantTolerance(1e-3, 1e-3, 0.0),
    "fp8": ConstantTolerance(5e-2, 5e-3, 0.0),
    "int8": ConstantTolerance(3e-2, 5e-3, 1e-2),
    "w8a8": ConstantTolerance(5e-2, 5e-3, 1e-2),
    "int4": ConstantTolerance(0.25, 1e-2, 5e-2),
}

# The golden tensors were computed by the export, on whatever machine that was; on another one and
# with another torch, 2.8e-5 was seen (smol-135m's U-Net).
GOLDEN_TOLERANCE = 1e-3

# Nats. A dead path moves scores by nothing, or by rounding: 1e-5 on a card.
DEAD_SHIFT = 1e-3
# Of the engine's shift to the reference's, either way.
SHIFT_RATIO = 2.0


def output_tolerance(precision: str, device: str) -> float:
    """Return that of a block; on the CPU nothing rounds to TF32."""
    return OUTPUT_TOLERANCES["fp32" if (precision, device) == ("tf32", "cpu") else precision]


def tolerances() -> dict[str, Any]:
    """Return the whole table, as a certificate carries it."""
    return {
        "output_relative_l2": OUTPUT_TOLERANCES,
        "constant": {kind: asdict(value) for kind, value in CONSTANT_TOLERANCES.items()},
        "golden_relative_l2": GOLDEN_TOLERANCE,
        "dead_shift_nats": DEAD_SHIFT,
        "shift_ratio": SHIFT_RATIO,
    }

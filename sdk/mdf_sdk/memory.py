"""An engine's manifest in, what it needs of a device's memory out, before anything is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from mdf_sdk.errors import DeviceMemoryError
from mdf_sdk.manifest import BlockSpec, Manifest, Precision, TensorSpec
from mdf_sdk.sessions import Backend

KEPT_PHOTOGRAPHS = 2  # both eyes of a patient
_IMAGE_BLOCKS = ("vision", "unet_encoder", "fusion")
_BYTES_PER_WEIGHT: dict[Precision, float] = {  # integers with their scales, in blocks of 32
    "fp32": 4.0,
    "tf32": 4.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0625,
    "int4": 0.5625,
    "w8a8": 1.0,
}
_FLOAT32_ACTIVATIONS: tuple[Precision, ...] = ("fp32", "tf32", "w8a8")


@dataclass(frozen=True)
class _Costs:
    """What a runtime holds, for what the manifest says.

    Attributes:
        weights: bytes for each byte of weights in the files, by precision.
        live: bytes for each byte of live tensors: runtimes take memory in steps, and keep it.
        overhead_bytes, overhead: what it takes whatever the engine, and for what.
        widens: whether it computes in float32 what is stored in less.
    """

    weights: Mapping[Precision, float]
    live: float
    overhead_bytes: int
    overhead: str
    widens: bool = False


# cpu: growth of resident memory, smol-135m and nano, ONNX Runtime 1.31.1 on two cores, 2026-11-22;
# w8a8, smol-135m alone: 2026-11-29.
# cuda: 11B in int4 with masks and every length of text, after shorter ones, on an H200
# (docs/results/sdk-gpu.md). Not measured: fp8 on the CPU, taken as float32; tensorrt.
_COSTS = {
    "cpu": _Costs(
        weights={
            "fp32": 1.05,
            "tf32": 1.05,
            "fp16": 2.6,
            "fp8": 4.2,
            "int8": 1.9,
            "int4": 2.1,
            "w8a8": 1.3,
        },
        live=2.5,
        overhead_bytes=35_000_000,
        overhead="libraries",
        widens=True,
    ),
    "cuda": _Costs(
        weights=dict.fromkeys(_BYTES_PER_WEIGHT, 1.0),
        live=1.0,
        overhead_bytes=1_200_000_000,
        overhead="CUDA and its graphs",
    ),
    "tensorrt": _Costs(
        weights=dict.fromkeys(_BYTES_PER_WEIGHT, 1.0),
        live=1.0,
        overhead_bytes=600_000_000,
        overhead="CUDA and TensorRT",
    ),
}


@dataclass(frozen=True)
class MemoryPlan:
    """What a device must have free; a batch is computed case by case.

    Attributes:
        device: "cpu", "cuda" or "tensorrt".
        weights_bytes, activation_bytes: by block, of all at once: a runtime keeps what it has
            taken.
        kept_bytes: what is kept of the last photographs.
        overhead_bytes: of `overhead`, the runtime.
    """

    device: str
    weights_bytes: Mapping[str, int]
    activation_bytes: Mapping[str, int]
    kept_bytes: int
    overhead_bytes: int
    overhead: str

    @property
    def total_bytes(self) -> int:
        blocks = sum(self.weights_bytes.values()) + sum(self.activation_bytes.values())
        return blocks + self.kept_bytes + self.overhead_bytes

    @property
    def summary(self) -> str:
        """One line: device, total, and what it is for."""
        return (
            f"{self.device} {_size(self.total_bytes)}: "
            f"weights {_size(sum(self.weights_bytes.values()))}, "
            f"live tensors {_size(sum(self.activation_bytes.values()))}, "
            f"kept photographs {_size(self.kept_bytes)}, "
            f"{self.overhead} {_size(self.overhead_bytes)}"
        )

    def __str__(self) -> str:
        lines = [f"{self.device:<24}{'weights':>10}{'live tensors':>14}"]
        for block, weights in self.weights_bytes.items():
            live = _size(self.activation_bytes[block])
            lines.append(f"  {block:<22}{_size(weights):>10}{live:>14}")
        lines.append(f"  {'kept photographs':<22}{_size(self.kept_bytes):>24}")
        lines.append(f"  {self.overhead:<22}{_size(self.overhead_bytes):>24}")
        lines.append(f"  {'needed':<22}{_size(self.total_bytes):>24}")
        return "\n".join(lines)


def required_bytes(manifest: Manifest, device: str, *, slots: int = 1) -> MemoryPlan:
    """Tell what an engine needs.

    Args:
        device: "cpu", "cuda" or "tensorrt"; for the last, the plans count in place of the graphs.
        slots: predictions at the same time.
    """
    return plan_memory(manifest.blocks, _stored_bytes(manifest, device), device, slots=slots)


def plan_memory(
    blocks: Mapping[str, BlockSpec], stored: Mapping[str, int], device: str, *, slots: int = 1
) -> MemoryPlan:
    """Tell what blocks need whose files may not exist yet.

    Args:
        stored: bytes of each block's weights in its files.
        device, slots: as for `required_bytes`.
    """
    costs = _COSTS[device]
    live = {}
    for name, block in blocks.items():
        narrow = block.precision not in _FLOAT32_ACTIVATIONS
        widening = 2 if costs.widens and narrow else 1
        live[name] = round(costs.live * widening * slots * block.activation_bytes)
    kept = [spec for name in _IMAGE_BLOCKS for spec in blocks[name].outputs]
    return MemoryPlan(
        device=device,
        weights_bytes={
            name: round(costs.weights[block.precision] * stored[name])
            for name, block in blocks.items()
        },
        activation_bytes=live,
        kept_bytes=KEPT_PHOTOGRAPHS * sum(_bytes_of_one(spec) for spec in kept),
        overhead_bytes=costs.overhead_bytes,
        overhead=costs.overhead,
    )


def check_memory(manifest: Manifest, backend: Backend) -> None:
    """Refuse an engine that does not fit beside what is in use, before anything is allocated.

    Raises:
        DeviceMemoryError: with the figures, and the precision that would fit.
    """
    memory = backend.free_and_total_bytes()
    if memory is None:
        return
    free, total = memory
    plan = required_bytes(manifest, backend.device, slots=backend.slots)
    if plan.total_bytes <= free:
        return
    raise DeviceMemoryError(
        f"device {backend.device!r}: found {_size(free)} free of {_size(total)} ({backend.card}), "
        f"expected what {manifest.model} in {manifest.precision} needs, {plan.summary}. "
        f"{_cure(manifest, backend, plan, free, total)}"
    )


def _cure(manifest: Manifest, backend: Backend, plan: MemoryPlan, free: int, total: int) -> str:
    smallest, least = manifest.precision, plan.total_bytes
    for precision in _coarser(manifest, backend.device):
        needed = _in_precision(manifest, precision, backend).total_bytes
        if needed <= free:
            return (
                f"Export it with --precision {precision}: about {_size(needed)}. "
                f"mdf export CHECKPOINT ENGINE --precision {precision}"
            )
        if needed < least:
            smallest, least = precision, needed
    found = f"No precision of this model fits: {smallest} needs about {_size(least)}"
    if least <= total:
        look = "the system's monitor" if backend.device == "cpu" else "nvidia-smi"
        return f"{found}. Close what else uses the memory (see {look}), and try again"
    where = "another machine" if backend.device == "cpu" else "a larger card, or --device cpu"
    return f"{found}. Take {where}"


def _coarser(manifest: Manifest, device: str) -> tuple[Precision, ...]:
    own = _BYTES_PER_WEIGHT[manifest.precision]
    choices: tuple[Precision, ...] = (
        ("w8a8", "int4") if device == "cpu" else ("fp16", "int8", "int4")
    )
    return tuple(precision for precision in choices if _BYTES_PER_WEIGHT[precision] < own)


def _in_precision(manifest: Manifest, precision: Precision, backend: Backend) -> MemoryPlan:
    """Estimate the same model in another precision from this engine's own bytes."""
    stored, blocks = dict(_stored_bytes(manifest, backend.device)), dict(manifest.blocks)
    # As `mdf export` chooses by default; the U-Net is stored as float32 in every engine.
    visions: dict[Precision, Precision] = {"int4": "int8", "w8a8": "w8a8"}
    vision = visions.get(precision, "fp16")
    for name, wanted in (("vision", vision), ("fusion", precision), ("decoder", precision)):
        block = blocks[name]
        ratio = _BYTES_PER_WEIGHT[wanted] / _BYTES_PER_WEIGHT[block.precision]
        if ratio < 1:
            wide = block.precision in _FLOAT32_ACTIVATIONS and wanted not in _FLOAT32_ACTIVATIONS
            live = block.activation_bytes // (2 if wide else 1)  # its tensors become float16
            blocks[name] = replace(block, precision=wanted, activation_bytes=live)
            stored[name] = round(ratio * stored[name])
    return plan_memory(blocks, stored, backend.device, slots=backend.slots)


def _stored_bytes(manifest: Manifest, device: str) -> dict[str, int]:
    """Return the bytes of each block's files; of plans for several compilers, the larger."""

    def size(block: str, spec: BlockSpec) -> int:
        if device != "tensorrt":  # external data are the files whose names begin with the graph's
            return sum(e.bytes for name, e in manifest.files.items() if name.startswith(spec.file))
        by_compiler: dict[str, int] = {}
        for plan in manifest.plans:
            if plan.block == block:
                size = manifest.files[plan.file].bytes
                by_compiler[plan.builder] = by_compiler.get(plan.builder, 0) + size
        return max(by_compiler.values(), default=0)

    return {block: size(block, spec) for block, spec in manifest.blocks.items()}


def _bytes_of_one(spec: TensorSpec) -> int:
    """Return the bytes of a tensor for a batch of one: of the image's, no other side is free."""
    return prod(1 if isinstance(d, str) else d for d in spec.shape) * np.dtype(spec.dtype).itemsize


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

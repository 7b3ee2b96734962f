"""This machine, as a benchmark's report carries it."""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from mdf_benchmarks.latency.card import Card
from mdf_sdk.machine import machine_card
from mdf_sdk.sessions.host_memory import free_and_total_bytes

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_PACKAGES = (
    *("mdf-mllm", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt"),
    *("cuda-bindings", "nvidia-ml-py"),
)


def describe_machine(card: Card | None) -> dict[str, Any]:
    """Processor, cores, memory, system, versions; the card, driver and power limit where NVML is.

    `memory_bytes` is a container's limit where that is lower; `power_mode` is the governor of the
    processor's clock. None for what the system does not tell.
    """
    memory = free_and_total_bytes()
    return {
        **machine_card(()),
        "memory_bytes": None if memory is None else memory[1],
        "power_mode": _GOVERNOR.read_text().strip() if _GOVERNOR.exists() else None,
        "card": None if card is None else card.describe(),
        "versions": versions_of(_PACKAGES),
    }


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those that are installed."""
    found = {found.name: found.version for found in metadata.distributions()}
    return {name: found[name] for name in packages if name in found}

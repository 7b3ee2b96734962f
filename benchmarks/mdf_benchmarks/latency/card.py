"""A card through NVML in, what it is and how it fares out; without NVML or a card, nothing."""

import os
from contextlib import suppress
from typing import Any, Self

# nvmlClocksEventReason*, of nvml.h; idle, and clocks that a user set, slow nothing down unasked.
THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software, temperature",
    0x40: "hardware, temperature",
    0x80: "hardware, power brake",
}


class Card:
    """The card that CUDA calls device 0."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls) -> Self | None:
        """Return the card; None where NVML or a card is missing."""
        try:
            import pynvml

            pynvml.nvmlInit()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
            if first.isdecimal():
                return cls(pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first)))
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(first))
        except Exception:  # not installed, no driver, no such card: each is no error here
            return None

    def describe(self) -> dict[str, Any]:
        """For the machine card; None for what it does not tell."""
        memory = self._memory()
        return {
            "name": self._ask("nvmlDeviceGetName"),
            "memory_bytes": None if memory is None else int(memory.total - memory.reserved),
            "driver": self._tell(self._nvml.nvmlSystemGetDriverVersion),
            "power_limit_w": _thousandth(self._ask("nvmlDeviceGetEnforcedPowerLimit")),
            "persistence_mode": _truth(self._ask("nvmlDeviceGetPersistenceMode")),
            "most_sm_clock_mhz": self._ask("nvmlDeviceGetMaxClockInfo", 1),
        }

    def sample(self) -> dict[str, Any]:
        """What it does now: memory in use (by all processes), power, clock, temperature, brakes."""
        memory = self._memory()
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # its name before driver 535
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return {
            "used_bytes": None if memory is None else int(memory.used),
            "power_w": _thousandth(self._ask("nvmlDeviceGetPowerUsage")),
            "sm_clock_mhz": self._ask("nvmlDeviceGetClockInfo", 1),
            "temperature_c": self._ask("nvmlDeviceGetTemperature", 0),
            "throttled_by": [
                name for bit, name in THROTTLE_REASONS.items() if reasons and reasons & bit
            ],
        }

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None on cards before Volta."""
        return _thousandth(self._ask("nvmlDeviceGetTotalEnergyConsumption"))

    def _memory(self) -> Any:
        """What programs can have: the call's first form counts the driver's reserve as used."""
        return self._ask("nvmlDeviceGetMemoryInfo", self._nvml.nvmlMemory_v2)

    def _ask(self, name: str, *arguments: int) -> Any:
        function = getattr(self._nvml, name, None)
        return None if function is None else self._tell(function, self._handle, *arguments)

    def _tell(self, function: Any, *arguments: Any) -> Any:
        with suppress(self._nvml.NVMLError):
            return function(*arguments)
        return None


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1e3


def _truth(value: int | None) -> bool | None:
    return None if value is None else bool(value)

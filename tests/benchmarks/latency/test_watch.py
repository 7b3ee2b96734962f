"""mdf_benchmarks.latency.watch, .card: NVML's units, phases, and machines without a card."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mdf_benchmarks.latency.card import Card
from mdf_benchmarks.latency.watch import Watch


class NVMLError(Exception):
    """What NVML raises for what a card does not tell."""


class Nvml:
    """NVML of one card, which draws 200 W, or 100 W when nothing is asked."""

    NVMLError = NVMLError
    energy_mj = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-b": 1}[uuid]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"card {handle}"

    nvmlMemory_v2 = 2

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:
        if version != self.nvmlMemory_v2:  # counts what the driver keeps for itself
            return SimpleNamespace(used=5_500, total=8_500)
        return SimpleNamespace(used=5_000, reserved=500, total=8_500)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 350_000

    def nvmlDeviceGetPersistenceMode(self, handle: int) -> int:
        raise NVMLError("not supported")

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 200_000

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return 1_400

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return 0x4 | 0x1  # power cap, and idle, which is no brake

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        self.energy_mj += 50_000
        return self.energy_mj


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def test_a_card_tells_in_watts_bytes_and_joules(nvml: Nvml) -> None:
    card = Card.open()
    assert card is not None
    assert card.describe() == {
        "name": "card 0",
        "memory_bytes": 8_000,
        "driver": "580.1",
        "power_limit_w": 350.0,
        "persistence_mode": None,
        "most_sm_clock_mhz": None,
    }
    assert card.sample() == {
        "used_bytes": 5_000,
        "power_w": 200.0,
        "sm_clock_mhz": 1_400,
        "temperature_c": 61,
        "throttled_by": ["power cap"],
    }
    assert card.energy_j() == 50.0


@pytest.mark.parametrize(("visible", "name"), [("1,0", "card 1"), ("GPU-b", "card 1")])
def test_the_card_is_the_one_that_cuda_sees(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, visible: str, name: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    card = Card.open()
    assert card is not None
    assert card.describe()["name"] == name


def test_without_nvml_there_is_no_card_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Card.open() is None
    with Watch(None) as watch, watch.phase("work"):
        time.sleep(0.01)
    assert watch.card_state("work", 1) is None
    assert watch.median_bytes("work", "device") is None
    assert watch.most_device_bytes() is None


def test_energy_is_by_prediction_and_samples_belong_to_their_phase(nvml: Nvml) -> None:
    with Watch(Card.open()) as watch:
        with watch.phase("load"):
            pass
        with watch.phase("work"):
            time.sleep(0.35)
    state = watch.card_state("work", 100)
    assert state is not None
    assert state["energy_j_per_prediction"] == 0.5  # 50 J between the phase's ends
    assert (state["median_power_w"], state["most_temperature_c"]) == (200.0, 61)
    assert (state["throttled_share"], state["throttled_by"]) == (1.0, ["power cap"])
    memory = watch.memory()
    assert [phase["name"] for phase in memory["phases"]] == ["load", "work"]
    start_s, end_s = (memory["phases"][1][key] for key in ("start_s", "end_s"))
    during = [at for at in memory["at_s"] if start_s <= at <= end_s]
    assert len(during) >= 3  # ten a second
    assert set(memory["device_bytes"]) == {5_000}
    assert memory["at_s"] == sorted(memory["at_s"])


def test_an_open_engine_tells_where_nvml_does_not() -> None:
    with Watch(None) as watch:
        with watch.following(lambda: 42), watch.phase("work"):
            pass
        with watch.phase("after"):
            pass
    assert watch.most_device_bytes() == watch.median_bytes("work", "device") == 42
    assert watch.median_bytes("after", "device") is None


def test_what_runs_on_the_processor_says_nothing_of_the_card(nvml: Nvml) -> None:
    with Watch(Card.open()) as watch, watch.phase("work"):
        watch.leave_card()
        watch.look()
    assert watch.most_device_bytes() is None
    assert watch.card_state("work", 1) is None


def test_a_sample_that_has_begun_when_the_card_is_left_says_nothing_of_it() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def sample() -> dict[str, Any]:
        begun.set()
        go_on.wait(10)
        return {"used_bytes": 42}

    watch = Watch(cast(Card, SimpleNamespace(sample=sample)))
    with ThreadPoolExecutor(2) as pool:
        looking = pool.submit(watch.look)
        assert begun.wait(10)
        leaving = pool.submit(watch.leave_card)
        wait([leaving], timeout=0.1)  # it may end before, or wait for the sample
        go_on.set()
        looking.result()
        leaving.result()
    assert watch.most_device_bytes() is None

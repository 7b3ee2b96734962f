"""Planted peers, and one report that they are in."""

from pathlib import Path
from typing import Any

import pytest

from mdf_benchmarks.latency import peer_process
from mdf_benchmarks.latency.measure import Plan, measure

PLANTED = ("Steady", "Greedy", "Crashing", "Missing", "Quick")
TINY_PLAN = Plan(queries=50, least_s=0.0, cold_starts=1)


@pytest.fixture(scope="session")
def planted() -> Any:
    """The peers of planted.py by their class's name; a process finds them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*PLANTED, "Cardless", "Spent", "Killed", "Raising", "Stuck"):
            patch.setitem(peer_process.PEERS, name, f"planted:{name}")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield patch


@pytest.fixture(scope="session")
def report(tiny_engine: Path, planted: Any) -> dict[str, Any]:
    """A whole report; not to be changed."""
    return measure(tiny_engine, TINY_PLAN, threads=1, against=PLANTED)

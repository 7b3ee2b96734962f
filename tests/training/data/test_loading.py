"""Processes that prepare steps change nothing but who does it."""

import os

import numpy as np
import pytest

from mdf_training.data.loading import prepare_ahead


def prepare(step: int) -> dict[str, object]:
    return {
        "pixels": np.full((2, 3), step, np.float32),
        "texts": [f"case {step}"],
        "by": os.getpid(),
    }


@pytest.mark.parametrize("readers", [0, 2])
def test_steps_come_in_order_as_tensors(readers: int) -> None:
    prepared = list(prepare_ahead(prepare, range(7), readers))
    assert [p["pixels"].tolist() for p in prepared] == [[[i] * 3] * 2 for i in range(7)]
    assert [p["texts"] for p in prepared] == [[f"case {i}"] for i in range(7)]
    assert len({p["by"] for p in prepared} - {os.getpid()}) == readers


def test_a_step_that_fails_names_its_error() -> None:
    def broken(step: int) -> int:
        raise ValueError(f"step {step}")

    with pytest.raises(ValueError, match="step 0"):
        list(prepare_ahead(broken, range(3), 2))

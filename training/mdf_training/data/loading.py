"""Steps of an epoch in, their arrays out, prepared in processes of their own while a model trains.

A card waits for pictures otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

READERS = 4  # processes for each model that trains on a card


class _Prepared(Dataset[Any]):
    def __init__(self, prepare: Callable[[Any], Any], steps: Sequence[Any]) -> None:
        self._prepare, self._steps = prepare, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, number: int) -> Any:
        return self._prepare(self._steps[number])


def prepare_ahead(
    prepare: Callable[[Any], Any], steps: Sequence[Any], readers: int
) -> Iterator[Any]:
    """Yield `prepare(step)` for every step, in order; what it returns as arrays comes as tensors.

    Args:
        prepare: a step's chance must be drawn before: processes share no generator.
        readers: processes that work ahead of the caller; they start as copies of this one, with
            what it has in memory. 0: each step is prepared when it is asked for.
    """
    context = "fork" if readers else None
    return iter(
        DataLoader(
            _Prepared(prepare, steps),
            batch_size=None,
            num_workers=readers,
            multiprocessing_context=context,
        )
    )


def readers_for(device: torch.device) -> int:
    """Return how many processes should prepare pictures: none beside a model on the processor."""
    return READERS if device.type == "cuda" else 0

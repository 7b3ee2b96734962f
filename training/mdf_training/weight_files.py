"""What all readers of weight files share: an opened file, a check for NaN, problems in a line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdf_sdk.errors import CheckpointError

MAX_SHOWN = 10


@contextmanager
def open_shard(path: Path, cure: str) -> Iterator[Any]:
    """Open a safetensors file; close it soon: an open one keeps its pages in memory.

    Raises:
        CheckpointError: it is none; ends with the cure.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}; expected a safetensors file. {cure}") from None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; integers never do."""
    if not tensor.is_floating_point():
        return True
    # Both reach the extremes; isfinite would copy the tensor thrice.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def join_problems(problems: Sequence[str]) -> str:
    """Write problems in a line, the first MAX_SHOWN in words."""
    more = f"; and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
    return "; ".join(problems[:MAX_SHOWN]) + more

"""What a data set is: rows that cost nothing to look at, and cases with their pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Row:
    """What is known of a case without reading its picture."""

    file: str
    label: str
    text: str
    patient_id: str
    source: str


@dataclass(frozen=True, eq=False)
class Case(Row):
    """A row with its picture.

    Args:
        image: uint8 (H, W, 3), RGB, 0 to 255.
        masks: kind -> bool (H, W). A kind that is absent was not annotated; it is not empty.
        scale: pixels of a mask per side of one of the image, which may have been decoded smaller.
    """

    image: NDArray[np.uint8]
    masks: Mapping[str, NDArray[np.bool_]]
    scale: int = 1


class DataSet(Protocol):
    """Cases in a fixed order; `rows` costs nothing, `data[i]` reads or renders the picture.

    `read(i, least_px)` is the same case as MDFClassifier would see it, whose larger input has so
    many pixels a side: a JPEG that is much larger comes smaller.
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""

    @property
    def mask_kinds(self) -> tuple[str, ...]:
        """Every kind of mask that some case has."""

    @property
    def rows(self) -> Sequence[Row]:
        """One row for every case, in the order of the cases."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Case: ...

    def read(self, index: int, least_px: int | None) -> Case: ...


class Subset:
    """Some cases of a data set, in the order of `indices`.

    Attributes:
        mask_kinds: those of the whole data set.
    """

    def __init__(self, data: DataSet, indices: Sequence[int]) -> None:
        self.data, self.indices = data, tuple(indices)
        self.rows = tuple(data.rows[i] for i in self.indices)
        self.labels = tuple(sorted({row.label for row in self.rows}))
        self.mask_kinds = data.mask_kinds

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Case:
        return self.data[self.indices[index]]

    def read(self, index: int, least_px: int | None) -> Case:
        return self.data.read(self.indices[index], least_px)


def spread(total: int, count: int | None) -> list[int]:
    """Return the indices of `count` cases spread evenly over `total`; of all, where None."""
    count = total if count is None else min(count, total)
    return [i * total // count for i in range(count)]

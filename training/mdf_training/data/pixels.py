"""Cases in, the model's pixel and mask arrays out, through the SDK's own preprocessing."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import parent_process

import numpy as np
import numpy.typing as npt

from mdf_sdk.manifest import ImageSpec
from mdf_sdk.preprocessing import crop_square, find_square, normalize, to_pixels
from mdf_training.data.augmentation import Camera
from mdf_training.data.cases import DataSet, Row

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
CACHE_BYTES = 4_000_000_000


@dataclass(frozen=True)
class CasePixels:
    """One preprocessed case.

    Attributes:
        row: label, text and the rest.
        tower_pixels: float32 (3, S, S), normalized.
        unet_pixels: float32 (3, U, U), normalized.
        masks: float32 (M, U, U), 1.0 inside.
        has_mask: float32 (M,), 1.0 for the kinds that were annotated.
    """

    row: Row
    tower_pixels: Float32
    unet_pixels: Float32
    masks: Float32
    has_mask: Float32


class PixelSet:
    """A data set as the model takes it; up to CACHE_BYTES of squared pictures stay in memory."""

    def __init__(self, data: DataSet, spec: ImageSpec, mask_kinds: Sequence[str]) -> None:
        self.data, self.spec, self.mask_kinds = data, spec, tuple(mask_kinds)
        case_bytes = 3 * spec.tower_px**2 + (3 + len(mask_kinds)) * spec.unet_px**2
        self._squares = lru_cache(maxsize=CACHE_BYTES // case_bytes)(self._read_squares)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> CasePixels:
        return self._case(index, None)

    def read(
        self, indices: Sequence[int], cameras: Sequence[Camera | None] | None = None
    ) -> list[CasePixels]:
        """Return several cases in the order asked for; threads prepare them side by side.

        Args:
            cameras: whose picture each case becomes; None leaves it as it is.
        """
        cameras = cameras or [None] * len(indices)
        if parent_process():  # this is one of several readers, which share the cores
            return list(map(self._case, indices, cameras))
        with ThreadPoolExecutor() as threads:
            return list(threads.map(self._case, indices, cameras))

    def fill(self, indices: Sequence[int]) -> None:
        """Read the squares of these cases now, as far as they fit into memory."""
        room = self._squares.cache_parameters()["maxsize"] or 0
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._squares, indices[:room]))

    def _case(self, index: int, camera: Camera | None) -> CasePixels:
        spec = self.spec
        tower, unet, masks, has_mask = self._squares(index)
        if camera:
            tower, unet = camera.photograph(tower), camera.photograph(unet)
            # A kind that was not annotated has nothing to move.
            moved = [camera.mask(m) if m.any() else m for m in masks]
            masks = np.array(moved, np.bool_).reshape(masks.shape)
        return CasePixels(
            self.data.rows[index],
            normalize(tower, spec.tower_mean, spec.tower_std),
            normalize(unet, spec.unet_mean, spec.unet_std),
            masks.astype(np.float32),
            has_mask.astype(np.float32),
        )

    def _read_squares(self, index: int) -> tuple[UInt8, UInt8, Bool, Bool]:
        spec = self.spec
        case = self.data.read(index, max(spec.tower_px, spec.unet_px))
        square = find_square(case.image)
        on_masks = square.times(case.scale)
        masks = np.zeros((len(self.mask_kinds), spec.unet_px, spec.unet_px), np.bool_)
        for channel, kind in enumerate(self.mask_kinds):
            if kind in case.masks:
                masks[channel] = crop_square(case.masks[kind], on_masks, spec.unet_px, nearest=True)
        has_mask = np.array([kind in case.masks for kind in self.mask_kinds], np.bool_)
        tower = crop_square(case.image, square, spec.tower_px)
        return tower, crop_square(case.image, square, spec.unet_px), masks, has_mask


def stack_pixels(cases: Sequence[CasePixels]) -> tuple[Float32, Float32]:
    """Stack cases for a model: float32 (B, 3, S, S) and (B, 3, U, U)."""
    return np.stack([c.tower_pixels for c in cases]), np.stack([c.unet_pixels for c in cases])


def blank_pixels(spec: ImageSpec) -> tuple[Float32, Float32]:
    """The two pixel tensors of a black photograph."""
    return to_pixels(np.zeros((spec.unet_px, spec.unet_px, 3), np.uint8), spec)


def batches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut indices into lists of at most `size`."""
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])

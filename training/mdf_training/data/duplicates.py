"""Pictures in, the pairs that show the same photograph out: copied, resized or stored again."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from mdf_sdk.extras import import_extra
from mdf_sdk.preprocessing import crop_square, find_square

Hash = npt.NDArray[np.bool_]
HASH_SIDE, THUMBNAIL_PX = 16, 128
# Of 512 bits. Of 1,458 photographs of five public sets no two differ in fewer than 41; seven kinds
# of copies of 122 of them (JPEG at quality 30, 200 px, darker, grayer, harder, padded, blurred)
# differ from their originals in 37 at most, one in twenty in more than 23: see the slow test.
MAX_DISTANCE = 32
_BLOCK = 2048


def hash_picture(image: npt.NDArray[np.uint8]) -> Hash:
    """Hash the field of view: whether brightness rises, to the right and downwards.

    Args:
        image: uint8 (H, W, 3), RGB.

    Returns:
        bool (512,). A crop of more than a hundredth of the side is another picture to it.
    """
    imagehash = import_extra("imagehash", "training")
    square = Image.fromarray(crop_square(image, find_square(image), THUMBNAIL_PX))
    hashes = (f(square, HASH_SIDE).hash for f in (imagehash.dhash, imagehash.dhash_vertical))
    return np.concatenate([np.ravel(bits) for bits in hashes])


def find_duplicates(hashes: Sequence[Hash]) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, that differ in MAX_DISTANCE bits at most."""
    if not len(hashes):
        return []
    signs = np.where(np.stack(hashes), np.float32(1), np.float32(-1))  # (N, 512)
    least = signs.shape[1] - 2 * MAX_DISTANCE
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(signs), _BLOCK):
        rows, columns = np.nonzero(signs[start : start + _BLOCK] @ signs[start:].T >= least)
        later = columns > rows
        pairs += zip((rows[later] + start).tolist(), (columns[later] + start).tolist(), strict=True)
    return pairs

"""What is asked in every benchmark: synthetic photographs and two texts; needs neither a data set
nor torch."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from mdf_sdk import InputError
from mdf_sdk.prompt import PromptEncoder

DECODED_PX = 512
ENCODED_PX = 1411  # of a fundus camera's photograph
JPEG_QUALITY = 90
TEXTS = (
    "A 34-year-old woman, difficulty seeing in the dark since childhood; her brother is affected.",
    "A 67-year-old man with diabetes for 20 years, blurred vision in both eyes.",
)


def texts_of(tokens: int, encoder: PromptEncoder) -> tuple[str, str]:
    """Make two different texts of so many tokens each; what they say does not matter.

    Raises:
        InputError: more than the engine reads, or a tokenizer that gives no such text.
    """
    limit = encoder.spec.max_text_tokens
    if not 1 <= tokens <= limit:
        raise InputError(f"text tokens: found {tokens}, expected 1 to {limit}")
    found = []
    for word in ("a", "b"):
        text = word
        while len(encoder.encode(text).ids) < tokens:
            text += f" {word}"
        if len(encoder.encode(text).ids) != tokens:
            raise InputError(f"text tokens: found no text of {tokens} tokens, expected another")
        found.append(text)
    return found[0], found[1]


def photograph(side_px: int, number: int = 0) -> npt.NDArray[np.uint8]:
    """Draw a round orange field with grain on black: latency does not depend on what is seen.

    Returns:
        uint8 (side_px, side_px, 3), RGB.
    """
    rng = np.random.default_rng(number)
    from_center = np.arange(DECODED_PX) / DECODED_PX - 0.5
    distance = np.hypot(from_center[:, None], from_center)[..., None]
    grain = rng.normal(0, 4, distance.shape)
    drawn = np.clip((1 - distance) * (210, 110, 60) + grain, 0, 255) * (distance < 0.48)
    # Resized afterwards: drawn at full size, it would take more memory than the engine does.
    return np.array(Image.fromarray(drawn.astype(np.uint8)).resize((side_px, side_px)))


def numbered(image: npt.NDArray[np.uint8], number: int) -> npt.NDArray[np.uint8]:
    """Return a copy that differs in one corner: another photograph, as a cache sees it."""
    other = image.copy()
    other[:2, :2] = (number % 256, number // 256 % 256, 7)
    return other


def jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    """Encode a photograph as a JPEG file's content."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()

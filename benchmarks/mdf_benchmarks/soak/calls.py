"""A seed in, the calls of one caller of the soak out, good and bad, and what each must give."""

import io
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mdf_benchmarks.inputs import TEXTS, jpeg, photograph
from mdf_sdk import BackendRunError, ImageError, InputError, MDFClassifier, Prediction, TextError
from mdf_sdk.photograph import ImageSource

Ask = Callable[[MDFClassifier], Sequence[Prediction]]

SOAK_TEXTS = (*TEXTS, 30 * "Sehschärfe rechts 0,3 – Familie: Mutter erblindet. ")  # the last is cut
EVIDENCE_CASES = (0, 7, 14, 21)  # a map costs as much as 49 predictions
# Of 1000 calls. What is kept of a photograph is asked for again by `same_image`, and by chance.
_SHARES = {
    "single": 400,
    "same_image": 200,
    "mask": 110,
    "batch": 80,
    "evidence": 5,
    "impatient": 60,
    "bad_input": 135,
    "failing": 10,
}
_BATCH = 3


@dataclass(frozen=True)
class Case:
    """A photograph and a text that have an answer."""

    image: ImageSource
    text: str


@dataclass(frozen=True)
class Call:
    """One call, and what is right: the answers to `cases`, or one of `errors`."""

    kind: str
    ask: Ask
    cases: tuple[int, ...] = ()
    errors: tuple[type[Exception], ...] = ()


def make_cases() -> list[Case]:
    """Make 24 cases, in this order: each of eight photographs with each of three texts."""
    images: list[ImageSource] = [
        _drawn(0, 512),
        jpeg(_drawn(1, 512)),
        _png(_drawn(2, 384)),
        jpeg(_drawn(3, 1411)),
        np.ascontiguousarray(_drawn(4, 512)[..., 1]),  # gray
        Image.fromarray(_drawn(5, 256)),
        jpeg(np.pad(_drawn(6, 400), ((40, 0), (150, 90), (0, 0)))),
        _drawn(7, 224),
    ]
    return [Case(image, text) for image in images for text in SOAK_TEXTS]


def plan_calls(cases: Sequence[Case], refused: Sequence[Call], seed: int) -> Iterator[Call]:
    """Yield one caller's calls, without end.

    Draws nothing: megabytes would stay in the heap of each caller's thread, and count as the
    classifier's.
    """
    rng, texts = random.Random(seed), len(SOAK_TEXTS)
    photograph_number = 0
    for kind in _kinds(rng):
        if kind == "bad_input":
            yield rng.choice(refused)
            continue
        if kind == "failing":
            yield Call(kind, _fail, errors=(BackendRunError,))
            continue
        if kind == "batch":
            chosen = tuple(rng.randrange(len(cases)) for _ in range(_BATCH))
        elif kind == "evidence":
            chosen = (rng.choice(EVIDENCE_CASES),)
        else:
            if kind != "same_image":  # the first ones come more often, so that some are kept
                last = len(cases) // texts
                photograph_number = min(rng.randrange(last), rng.randrange(last))
            chosen = (texts * photograph_number + rng.randrange(texts),)
        yield Call(kind, ask_cases(kind, [cases[i] for i in chosen]), chosen)


def ask_cases(kind: str, cases: Sequence[Case]) -> Ask:
    """The call by which cases are asked in that way."""
    if kind == "batch":
        images, texts = [case.image for case in cases], [case.text for case in cases]
        return lambda classifier: classifier.predict_batch(images, texts, mask=True)
    (case,) = cases
    return _ask(
        case.image,
        case.text,
        mask=kind == "mask",
        evidence=kind == "evidence",
        timeout_s=0.0 if kind == "impatient" else None,
    )


def refused_calls() -> list[Call]:
    """Make calls with unusable input, one of each sort."""
    good, text = _drawn(0, 128), TEXTS[0]
    png = _png(good)
    broken, oversized = bytearray(png), bytearray(_encode(good, "BMP"))
    broken[len(png) // 2] ^= 0xFF
    oversized[18:26] = struct.pack("<ii", 60_000, 60_000)  # width and height
    images: list[Any] = [
        b"",
        b"no picture",
        jpeg(good)[:1000],
        png[: len(png) // 2],
        bytes(broken),
        bytes(oversized),
        good / np.float32(255),
        np.full((64, 64, 3), np.nan, np.float32),
        good[:8, :8],
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3), np.uint8),  # black
        "absent.png",
        None,
    ]
    texts: list[Any] = ["", " \n", "\ud800", 100_001 * "a", b"bytes", None]
    calls = [
        *((_ask(image, text), ImageError) for image in images),
        *((_ask(good, wrong), TextError) for wrong in texts),
        (_ask_batch([good, b"x", good], [text] * 3), ImageError),
        (_ask_batch([good] * 3, [text, text, ""]), TextError),
        (_ask_batch([good] * 3, [text]), InputError),
        (_ask_batch("absent.png", [text]), InputError),
    ]
    return [Call("bad_input", ask, errors=(error,)) for ask, error in calls]


def _kinds(rng: random.Random) -> Iterator[str]:
    yield from rng.sample(list(_SHARES), len(_SHARES))  # each once, so that all is warm early
    while True:
        yield from rng.choices(list(_SHARES), list(_SHARES.values()), k=100)


def _ask(image: Any, text: Any, **options: Any) -> Ask:
    return lambda classifier: [classifier.predict(image, text, **options)]


def _ask_batch(images: Any, texts: Any) -> Ask:
    return lambda classifier: classifier.predict_batch(images, texts)


def _fail(classifier: MDFClassifier) -> Sequence[Prediction]:
    """Make a block fail while it runs: nothing before it checks the size of prepared pixels."""
    pixels = np.zeros((1, 3, 1, 1), np.float32)
    classifier.score(pixels, pixels, [TEXTS[0]])
    return []


def _drawn(number: int, side_px: int) -> Any:
    """A photograph whose answer is its own: no two have the same colors."""
    image = photograph(side_px, number)
    image[..., number % 3] //= 1 + number // 3
    return image


def _png(image: Any) -> bytes:
    return _encode(image, "PNG")


def _encode(image: Any, form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()

"""`MDFClassifier`: a photograph and a clinical text in, a `Prediction` out."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from mdf_sdk.engine import Engine
from mdf_sdk.errors import BackendRunError, InputError, ManifestError
from mdf_sdk.evidence import GRID, cover_cells
from mdf_sdk.prediction import EngineIdentity, Prediction
from mdf_sdk.preprocessing import (
    ImageSource,
    Pixels,
    Square,
    decode,
    find_square,
    read_source,
    to_pixels,
)
from mdf_sdk.prompt import EncodedText
from mdf_sdk.sessions import Array

Scores = npt.NDArray[np.float32]

_BATCH = 8  # cases in one run of a block: bounds the memory of a long batch


@dataclass(frozen=True)
class _Photograph:
    """One prepared photograph; `key` is the digest of its content."""

    key: bytes
    square: Square
    tower_pixels: Pixels  # (3, S, S)
    unet_pixels: Pixels  # (3, U, U)


@dataclass(frozen=True)
class _ImageState:
    """What depends on the photograph alone: tensors of batch 1, up to cross keys and values."""

    photograph: _Photograph
    tensors: dict[str, Array]


@dataclass(frozen=True)
class _Case:
    photograph: _Photograph
    text: EncodedText
    latency_ms: dict[str, float]


class _Clock:
    """Adds up the milliseconds of each stage."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.ms[stage] = self.ms.get(stage, 0.0) + 1000 * (time.perf_counter() - start)


class MDFClassifier:
    """An engine directory, loaded and checked; classifies photographs with their clinical texts.

        with MDFClassifier("engine_dir") as classifier:
            print(classifier.predict("eye.jpg", "58 years old, blurred vision"))

    What depends on the photograph alone is kept for the last one: another text about it is cheap.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str],
        *,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        """Args:
            engine_dir: what `mdf export` made. Every file is hashed before any is parsed.
            device: "cpu", or "auto" for the best that works here.
            threads: CPU threads; None leaves it to the runtime.

        Raises:
            EngineError: the directory cannot be used.
            BackendError: the device's runtime is missing or cannot load the engine.
        """
        self._engine = Engine(engine_dir, device=device, threads=threads)
        self.manifest = self._engine.manifest
        self.identity = EngineIdentity(
            model=self.manifest.model,
            precision=self.manifest.precision,
            backend=self._engine.backend.name,
            device=self._engine.backend.device,
            manifest_sha256=self._engine.manifest_sha256,
        )
        self._last: _ImageState | None = None
        for block in ("vision", "unet_encoder", "fusion", "decoder"):
            self._engine.open(block)  # unet_decoder waits until a mask is asked for

    def predict(
        self, image: ImageSource, text: str, *, mask: bool = False, evidence: bool = False
    ) -> Prediction:
        """Classify one photograph with its clinical text.

        Args:
            image: a path, the bytes of a picture file, a PIL image, or uint8 (H, W, 3) RGB or
                (H, W) gray.
            text: what is known of the patient. Special tokens in it are plain characters. Tokens
                beyond the engine's limit are cut off its end, and `dropped_tokens` counts them.
            mask: also segment the photograph.
            evidence: also map what in the photograph spoke for the label. Costs 49 predictions.

        Raises:
            InputError: the image or the text cannot be used.
            BackendRunError: a block failed, or gave NaN.
        """
        case = self._prepare(image, text, known={})
        return self._predict([case], mask=mask, evidence=evidence)[0]

    def predict_batch(
        self,
        images: Iterable[ImageSource],
        texts: Iterable[str],
        *,
        mask: bool = False,
        evidence: bool = False,
    ) -> list[Prediction]:
        """Classify pairs of photograph and text; all are checked before any is classified.

        Prepared photographs stay in memory until the end: pass some tens of cases at a time.

        Raises:
            InputError: names the case, counted from 0.
            BackendRunError: a block failed, or gave NaN.
        """
        if isinstance(images, str | bytes | os.PathLike) or isinstance(texts, str):
            raise InputError("predict_batch: found one image or one text, expected a list of each")
        images, texts = list(images), list(texts)
        if len(images) != len(texts):
            raise InputError(
                f"predict_batch: found {len(images)} images and {len(texts)} texts, "
                "expected as many of both"
            )
        cases: list[_Case] = []
        known: dict[bytes, _Photograph] = {}
        for number, (image, text) in enumerate(zip(images, texts, strict=True)):
            try:
                cases.append(self._prepare(image, text, known))
            except InputError as error:
                raise type(error)(f"case {number}: {error}") from error
        return [
            prediction
            for start in range(0, len(cases), _BATCH)
            for prediction in self._predict(
                cases[start : start + _BATCH], mask=mask, evidence=evidence
            )
        ]

    def score(self, tower_pixels: Pixels, unet_pixels: Pixels, texts: Sequence[str]) -> Scores:
        """Score prepared pixels, for evaluation: no cache, no calibration.

        Args:
            tower_pixels: float32 (B, 3, tower_px, tower_px), as `to_pixels` makes them.
            unet_pixels: float32 (B, 3, unet_px, unet_px).
            texts: B clinical texts.

        Returns:
            float32 (B, K), log-probabilities in the manifest's label order, as
            `PromptEncoder.score_pairs` defines them.
        """
        if not len(tower_pixels) == len(unet_pixels) == len(texts) > 0:
            raise InputError(
                f"score: found {len(tower_pixels)} and {len(unet_pixels)} pixel tensors and "
                f"{len(texts)} texts, expected as many of each, and at least one"
            )
        encoded = [self._engine.prompt.encode(text) for text in texts]
        tensors = self._image_tensors(tower_pixels, unet_pixels, _Clock())
        return self._decode(tensors, encoded, _Clock())["scores"]

    def text_only_scores(self, texts: Sequence[str]) -> Scores:
        """Score texts with the image path cut: all cross-attention keys and values are 0.

        Returns:
            float32 (B, K), log-probabilities in the manifest's label order.
        """
        encoded = [self._engine.prompt.encode(text) for text in texts]
        tensors = {}
        for spec in self.manifest.blocks["decoder"].inputs:
            if spec.name.startswith("cross_"):
                tokens, width = spec.shape[1:]
                if isinstance(tokens, str) or isinstance(width, str):
                    raise ManifestError(
                        f"block decoder: found the shape {spec.shape} of {spec.name}, expected "
                        "only the batch to be free. Export it again: mdf export CHECKPOINT ENGINE"
                    )
                tensors[spec.name] = np.zeros((len(texts), tokens, width), np.float32)
        return self._decode(tensors, encoded, _Clock())["scores"]

    def close(self) -> None:
        """Free the engine's memory; a second call does nothing."""
        self._last = None
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, image: ImageSource, text: str, known: dict[bytes, _Photograph]) -> _Case:
        """Check and prepare one case; decode no photograph that is kept or among `known`."""
        clock = _Clock()
        with clock("text"):
            encoded = self._engine.prompt.encode(text)
        with clock("image"):
            source = read_source(image)
            if self._last and self._last.photograph.key == source.key:
                known[source.key] = self._last.photograph
            if source.key not in known:
                picture = decode(source)
                square = find_square(picture)
                pixels = to_pixels(picture, self.manifest.image, square)
                known[source.key] = _Photograph(source.key, square, *pixels)
        return _Case(known[source.key], encoded, clock.ms)

    def _predict(self, cases: Sequence[_Case], *, mask: bool, evidence: bool) -> list[Prediction]:
        manifest, clock = self.manifest, _Clock()
        masks: list[dict[str, npt.NDArray[np.float32]]] = []
        maps: list[npt.NDArray[np.float32]] = []
        with clock("total"):
            states = self._image_states([case.photograph for case in cases], clock)
            tensors = {
                name: _join([state.tensors[name] for state in states]) for name in states[0].tensors
            }
            outputs = self._decode(tensors, [case.text for case in cases], clock)
            scores = outputs["scores"]
            log_probabilities = _log_softmax(scores / manifest.temperature)  # (B, K)
            if mask:
                with clock("unet_decoder"):
                    mask_outputs = self._engine.run("unet_decoder", tensors | outputs)
                values = mask_outputs["mask"]  # (B, M, U, U)
                _check_output("unet_decoder", values, (len(cases), len(manifest.mask_kinds)))
                masks = [dict(zip(manifest.mask_kinds, planes, strict=True)) for planes in values]
            if evidence:
                with clock("evidence"):
                    maps = [
                        self._evidence(case, whole)
                        for case, whole in zip(cases, log_probabilities, strict=True)
                    ]
        last = states[-1]  # its own copy: the others' tensors are views of the whole batch
        own = {name: values.copy() for name, values in last.tensors.items()}
        self._last = _ImageState(last.photograph, own)

        predictions = []
        for i, case in enumerate(cases):
            probabilities = np.exp(log_probabilities[i])
            best = int(scores[i].argmax())
            stages = ("image", "text", "vision", "unet_encoder", "fusion", "decoder")
            latency_ms = dict.fromkeys(stages, 0.0)
            for stage, ms in clock.ms.items():
                latency_ms[stage] = ms / len(cases)
            for stage, ms in case.latency_ms.items():
                latency_ms[stage] += ms
                latency_ms["total"] += ms
            predictions.append(
                Prediction(
                    label=manifest.labels[best],
                    probability=float(probabilities[best]),
                    probabilities=dict(zip(manifest.labels, probabilities.tolist(), strict=True)),
                    scores=dict(zip(manifest.labels, scores[i].tolist(), strict=True)),
                    mask=masks[i] if mask else None,
                    evidence=maps[i] if evidence else None,
                    square=case.photograph.square,
                    text_tokens=len(case.text.ids),
                    dropped_tokens=case.text.dropped_tokens,
                    latency_ms=latency_ms,
                    engine=self.identity,
                    notice=manifest.notice,
                )
            )
        return predictions

    def _image_states(self, photographs: Sequence[_Photograph], clock: _Clock) -> list[_ImageState]:
        """Compute what depends on each photograph alone, once for each that is not kept."""
        states = {self._last.photograph.key: self._last} if self._last else {}
        new = list({p.key: p for p in photographs if p.key not in states}.values())
        if new:
            tower = np.stack([photograph.tower_pixels for photograph in new])
            unet = np.stack([photograph.unet_pixels for photograph in new])
            tensors = self._image_tensors(tower, unet, clock)
            for i, photograph in enumerate(new):
                own = {name: values[i : i + 1] for name, values in tensors.items()}
                states[photograph.key] = _ImageState(photograph, own)
        return [states[photograph.key] for photograph in photographs]

    def _image_tensors(self, tower: Pixels, unet: Pixels, clock: _Clock) -> dict[str, Array]:
        """Run the blocks that read the photograph, up to the cross-attention keys and values."""
        tensors: dict[str, Array] = {}
        pixels = {"tower_pixels": tower, "unet_pixels": unet}
        for block in ("vision", "unet_encoder", "fusion"):
            with clock(block):
                tensors |= self._engine.run(block, pixels | tensors)
        return tensors

    def _decode(
        self, tensors: dict[str, Array], texts: Sequence[EncodedText], clock: _Clock
    ) -> dict[str, Array]:
        """Run the decoder: scores (B, K) and pooled cross-attention outputs."""
        with clock("text"):
            text_tensors = self._engine.text_tensors(self._engine.prompt.pack(texts))
        with clock("decoder"):
            outputs = self._engine.run("decoder", tensors | text_tensors)
        _check_output("decoder", outputs["scores"], (len(texts), len(self.manifest.labels)))
        return outputs

    def _evidence(self, case: _Case, whole: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Cover each cell in turn; by how much do the label's log-odds drop?

        Args:
            whole: float64 (K,), log-probabilities with nothing covered.

        Returns:
            float32 (GRID, GRID).
        """
        spec, photograph, best = self.manifest.image, case.photograph, int(whole.argmax())
        drops = np.zeros((GRID, GRID), np.float32)
        for row in range(GRID):
            tower = cover_cells(photograph.tower_pixels, spec.tower_mean, spec.tower_std, row)
            unet = cover_cells(photograph.unet_pixels, spec.unet_mean, spec.unet_std, row)
            tensors = self._image_tensors(tower, unet, _Clock())
            scores = self._decode(tensors, [case.text] * GRID, _Clock())["scores"]
            covered = _log_softmax(scores / self.manifest.temperature)
            drops[row] = _log_odds(whole, best) - _log_odds(covered, best)
        return drops


def _log_softmax(scores: Array) -> npt.NDArray[np.float64]:
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _log_odds(log_probabilities: Array, label: int) -> npt.NDArray[np.float64]:
    """log(p / (1 - p)) of one label from log-probabilities (..., K), also where p rounds to 1."""
    others = np.delete(log_probabilities, label, axis=-1)
    odds: npt.NDArray[np.float64] = log_probabilities[..., label] - np.logaddexp.reduce(
        others, axis=-1
    )
    return odds


def _join(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)  # one case is not copied


def _check_output(block: str, values: Array, leading: tuple[int, int]) -> None:
    """Refuse what would read as an answer and is none."""
    if values.shape[:2] != leading or not np.isfinite(values).all():
        found = "NaN or infinity" if values.shape[:2] == leading else f"shape {values.shape}"
        raise BackendRunError(
            f"block {block}: found {found} in its output, expected finite values of shape "
            f"{leading}. Check the engine on this machine: mdf verify ENGINE"
        )

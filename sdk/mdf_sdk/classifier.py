"""`MDFClassifier`: a photograph and a clinical text in, a `Prediction` out."""

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import ParamSpec, Self, TypeVar

import numpy as np
import numpy.typing as npt

from mdf_sdk.admission import Admission
from mdf_sdk.clock import Clock
from mdf_sdk.engine import Engine
from mdf_sdk.errors import BackendRunError, InputError, ManifestError
from mdf_sdk.evidence import GRID, cover_cells
from mdf_sdk.manifest import TrustedKey
from mdf_sdk.memory import KEPT_PHOTOGRAPHS
from mdf_sdk.photograph import ImageSource, decode, prepare, read_source
from mdf_sdk.prediction import EngineIdentity, Prediction
from mdf_sdk.preprocessing import Pixels, Square, shared_threads
from mdf_sdk.prompt import EncodedText
from mdf_sdk.sessions import Array, Tensor

Scores = npt.NDArray[np.float32]
_P = ParamSpec("_P")
_R = TypeVar("_R")

_STAGES = ("image", "text", "vision", "unet_encoder", "fusion", "decoder")


@dataclass(frozen=True)
class _Photograph:
    """One prepared photograph; `key` is the digest of its content."""

    key: bytes
    square: Square
    tower_pixels: Pixels  # (3, S, S)
    unet_pixels: Pixels  # (3, U, U)

    @property
    def batch(self) -> tuple[Pixels, Pixels]:
        """The pixels as a batch of one."""
        return self.tower_pixels[None], self.unet_pixels[None]


@dataclass(frozen=True)
class _ImageState:
    """What depends on the photograph alone: tensors of one case that the decoders read."""

    photograph: _Photograph
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Case:
    photograph: _Photograph
    text: EncodedText
    latency_ms: dict[str, float]


class MDFClassifier:
    """An engine directory, loaded and checked; classifies photographs with their clinical texts.

        with MDFClassifier("engine_dir") as classifier:
            print(classifier.predict("eye.jpg", "58 years old, blurred vision"))

    What depends on the photograph alone is kept for the last ones: another text about one of them
    is cheap. Any number of threads may call; the device takes one prediction after another (on the
    CPU, one for each `threads` of its cores), the rest wait in a bounded queue.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str],
        *,
        device: str = "auto",
        threads: int | None = None,
        reproducible: bool = False,
        trusted_key: TrustedKey | None = None,
        max_waiting: int = 64,
    ) -> None:
        """Args:
            engine_dir: what `mdf export` made. Every file is hashed before any of it is parsed.
            device: "tensorrt", "cuda", "cpu", or "auto" for the fastest that works here and has the
                memory; `mdf doctor` says why another does not.
            threads: CPU threads of one block; None leaves it to the runtime.
            reproducible: on "cuda", no kernel that is chosen by its time when it is loaded. Without
                it an INT4 decoder has such: within one process its answers never change, two
                processes may differ in rounding. With it that decoder is slower.
            trusted_key: an Ed25519 public key, PEM or its path. With one, an engine that this key
                did not sign is refused before anything of it is parsed.
            max_waiting: calls that may wait for the device; one more is turned away.

        Raises:
            EngineError: the directory cannot be used.
            BackendError: the device does not work, has too little memory, or cannot load it.
        """
        if not isinstance(max_waiting, int) or max_waiting < 0:
            raise InputError(f"max_waiting: found {max_waiting!r}, expected an integer from 0")
        self._engine = Engine(
            engine_dir,
            device=device,
            threads=threads,
            reproducible=reproducible,
            trusted_key=trusted_key,
            blocks=("vision", "unet_encoder", "fusion", "decoder"),  # unet_decoder: with a mask
        )
        backend = self._engine.backend
        self.manifest = self._engine.manifest
        self.identity = EngineIdentity(
            model=self.manifest.model,
            precision=self.manifest.precision,
            backend=backend.name,
            device=backend.device,
            card=backend.card,
            manifest_sha256=self._engine.manifest_sha256,
            passed_over=self._engine.passed_over,
        )
        self._admission = Admission(backend.slots, max_waiting)
        self._running = ThreadPoolExecutor(backend.slots, "mdf-run")
        self._beside = ThreadPoolExecutor(1, "mdf-beside") if backend.overlaps else None
        self._kept: dict[bytes, _ImageState] = {}  # the last used comes last
        self._keeping = threading.Lock()

    def predict(
        self,
        image: ImageSource,
        text: str,
        *,
        mask: bool = False,
        evidence: bool = False,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Classify one photograph with its clinical text.

        Args:
            image: a path, the bytes of a picture file, a PIL image, or uint8 (H, W, 3) RGB or
                (H, W) gray.
            text: what is known of the patient. Special tokens in it are plain characters. Tokens
                beyond the engine's limit are cut off its end, and `dropped_tokens` counts them.
            mask: also segment the photograph.
            evidence: also map what in the photograph spoke for the label. Costs 49 predictions, and
                of the photographs kept only this one stays.
            timeout_s: how long to wait for the device at most; what has begun is not broken off.

        Raises:
            InputError: the image or the text cannot be used.
            BusyError: too many calls wait, or this one waited too long.
            BackendRunError: a block failed, or gave NaN. The next call starts afresh.
            ClosedError: the classifier is closed.
        """
        case = self._prepare(image, text, known={})
        with self._admission.enter(timeout_s):
            return self._predict(case, mask=mask, evidence=evidence)

    def predict_batch(
        self,
        images: Iterable[ImageSource],
        texts: Iterable[str],
        *,
        mask: bool = False,
        evidence: bool = False,
        timeout_s: float | None = None,
    ) -> list[Prediction]:
        """Classify pairs of photograph and text; all are checked before any is classified.

        Each is computed by itself and gets the very answer of `predict`: computed together, a text
        padded to another's length rounds differently. Prepared photographs stay in memory until
        the end: pass some tens of cases at a time. Between two cases others have their turn.

        Raises:
            InputError: names the case, counted from 0.
            BusyError, BackendRunError, ClosedError: as `predict`; there is no partial result.
        """
        alone = isinstance(images, str | bytes | os.PathLike) or isinstance(texts, str)
        if alone or not (isinstance(images, Iterable) and isinstance(texts, Iterable)):
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
        predictions: list[Prediction] = []
        for case in cases:
            with self._admission.enter(timeout_s, again=bool(predictions)):
                predictions.append(self._predict(case, mask=mask, evidence=evidence))
        return predictions

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
        scores = []
        for i, text in enumerate(encoded):
            one = slice(i, i + 1)
            with self._admission.enter(again=i > 0):
                scores.append(self._run(self._score, tower_pixels[one], unet_pixels[one], text))
        return np.stack(scores)

    def text_only_scores(self, texts: Sequence[str]) -> Scores:
        """Score texts with the image path cut: all cross-attention keys and values are 0.

        Returns:
            float32 (B, K), log-probabilities in the manifest's label order.
        """
        tensors: dict[str, Tensor] = {}
        for spec in self.manifest.blocks["decoder"].inputs:
            if spec.name.startswith("cross_"):
                tokens, width = spec.shape[1:]
                if isinstance(tokens, str) or isinstance(width, str):
                    raise ManifestError(
                        f"block decoder: found the shape {spec.shape} of {spec.name}, expected "
                        "only the batch to be free. Export it again: mdf export CHECKPOINT ENGINE"
                    )
                tensors[spec.name] = np.zeros((1, tokens, width), np.float32)
        if not texts:
            raise InputError("text_only_scores: found no texts, expected at least one")
        scores: list[Scores] = []
        for text in [self._engine.prompt.encode(text) for text in texts]:
            with self._admission.enter(again=bool(scores)):
                scores.append(self._run(self._decode_text, tensors, text, Clock())[0])
        return np.stack(scores)

    def image_features(self, tower_pixels: Pixels, unet_pixels: Pixels) -> Pixels:
        """Average what the image encoders give over its places: what a probe looks at.

        Args:
            tower_pixels, unet_pixels: as for `score`.

        Returns:
            float32 (B, F): the vision states' average, then that of every U-Net feature map.
        """
        if len(tower_pixels) != len(unet_pixels) or len(tower_pixels) == 0:
            raise InputError(
                f"image_features: found {len(tower_pixels)} and {len(unet_pixels)} pixel tensors, "
                "expected as many of both, and at least one"
            )
        features = []
        for i in range(len(tower_pixels)):
            one = slice(i, i + 1)
            with self._admission.enter(again=i > 0):
                features.append(self._run(self._average, tower_pixels[one], unet_pixels[one]))
        return np.stack(features)

    def warm_up(self) -> None:
        """Run every shape of a single case once, so that the first prediction is a quick one.

        Costs a prediction, on a card one for each padded length of the text.
        """
        prompt, image = self._engine.prompt, self.manifest.image
        lengths = range(1, self.manifest.prompt.max_text_tokens + 1)
        by_rows = {self._engine.text_rows(length): length for length in lengths}
        tower = np.zeros((1, 3, image.tower_px, image.tower_px), np.float32)
        unet = np.zeros((1, 3, image.unet_px, image.unet_px), np.float32)
        # The longest first: the memory that it took serves the others.
        tried = reversed(by_rows.values()) if len(by_rows) < len(lengths) else (1,)
        texts = [EncodedText((prompt.image_id,) * length, dropped_tokens=0) for length in tried]
        with self._admission.enter():
            tensors, _ = self._run(self._encode, tower, unet, texts[0], Clock())
            for text in texts:
                self._run(self._decode_text, tensors, text, Clock())

    def device_bytes(self) -> int | None:
        """Bytes in use on the card, by all processes; None on the CPU."""
        return self._engine.backend.device_bytes()

    def close(self) -> None:
        """Wait for running predictions, then free the engine's memory; waiting ones fail.

        A second call does nothing, and neither does one in a forked process.
        """
        if self._admission.close():
            self._running.shutdown()  # what an interrupted caller left may still run
            if self._beside:
                self._beside.shutdown()
            self._kept = {}
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, image: ImageSource, text: str, known: dict[bytes, _Photograph]) -> _Case:
        """Check and prepare one case; decode no photograph that is kept or among `known`."""
        self._admission.check_open()
        clock = Clock()
        with clock("text"):
            encoded = self._engine.prompt.encode(text)
        with clock("image"):
            photograph = shared_threads().submit(self._photograph, image, known).result()
        return _Case(photograph, encoded, clock.ms())

    def _photograph(self, image: ImageSource, known: dict[bytes, _Photograph]) -> _Photograph:
        source = read_source(image)
        kept = self._kept.get(source.key)
        if kept:
            known[source.key] = kept.photograph
        if source.key not in known:
            spec = self.manifest.image
            photograph = decode(source, max(spec.tower_px, spec.unet_px))
            square = photograph.square.times(photograph.scale)
            pixels = prepare(photograph, spec, self._engine.backend.empty_pixels)
            known[source.key] = _Photograph(source.key, square, *pixels)
        return known[source.key]

    def _run(self, function: Callable[_P, _R], *args: _P.args, **options: _P.kwargs) -> _R:
        """Call a function that runs blocks, for a caller who holds a slot.

        In as many threads as there are slots, so that few keep a heap for tensors, however many
        call. Where a caller is interrupted the function goes on, and the next one waits for it.
        """
        return self._running.submit(function, *args, **options).result()

    def _predict(self, case: _Case, *, mask: bool, evidence: bool) -> Prediction:
        manifest, clock, photograph = self.manifest, Clock(), case.photograph
        masks: dict[str, npt.NDArray[np.float32]] | None = None
        with clock("total"):
            tensors, scores, planes = self._run(self._compute, case, clock, mask=mask)
            log_probabilities = _log_softmax(scores / manifest.temperature)  # (K,)
            if planes is not None:
                masks = dict(zip(manifest.mask_kinds, planes, strict=True))
            grid = None
            if evidence:
                with clock("evidence"):
                    grid = self._evidence(case, log_probabilities)
        self._keep(_ImageState(photograph, tensors))

        probabilities = np.exp(log_probabilities)
        best = int(scores.argmax())
        latency_ms = dict.fromkeys(_STAGES, 0.0) | clock.ms()
        for stage, ms in case.latency_ms.items():
            latency_ms[stage] += ms
            latency_ms["total"] += ms
        return Prediction(
            label=manifest.labels[best],
            probability=float(probabilities[best]),
            probabilities=dict(zip(manifest.labels, probabilities.tolist(), strict=True)),
            scores=dict(zip(manifest.labels, scores.tolist(), strict=True)),
            mask=masks,
            evidence=grid,
            square=photograph.square,
            text_tokens=len(case.text.ids),
            dropped_tokens=case.text.dropped_tokens,
            latency_ms=latency_ms,
            engine=self.identity,
            notice=manifest.notice,
        )

    def _compute(
        self, case: _Case, clock: Clock, *, mask: bool
    ) -> tuple[dict[str, Tensor], Scores, Pixels | None]:
        """Run the blocks: tensors to keep, scores (K,), and the masks (M, U, U) if asked for."""
        kept = self._kept.get(case.photograph.key)
        if kept:
            tensors, text = kept.tensors, self._text_tensors(case.text, clock)
        else:
            self._make_room()
            tensors, text = self._encode(*case.photograph.batch, case.text, clock)
        scores, outputs = self._decode(tensors, text, clock)
        if not mask:
            return tensors, scores, None
        with clock("unet_decoder"):
            values = self._engine.run("unet_decoder", {**tensors, **outputs})["mask"]
            planes: Pixels = self._engine.backend.to_host(values)[0]
        _check_output("unet_decoder", planes, len(self.manifest.mask_kinds))
        return tensors, scores, planes

    def _make_room(self) -> None:
        """Let the oldest photograph go before the next is computed, not after."""
        with self._keeping:
            newest = list(self._kept.items())[1 - KEPT_PHOTOGRAPHS :]
            self._kept = dict(newest)

    def _keep(self, state: _ImageState) -> None:
        """Keep a state for the next text about its photograph; the oldest goes."""
        with self._keeping:
            others = [kept for key, kept in self._kept.items() if key != state.photograph.key]
            newest = [*others, state][-KEPT_PHOTOGRAPHS:]
            self._kept = {kept.photograph.key: kept for kept in newest}

    def _encode(
        self, tower: Pixels, unet: Pixels, text: EncodedText, clock: Clock
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the blocks that read the photograph, and beside them on a card prepare the text;
        return what the decoders read of each."""

        def run_tower() -> dict[str, Tensor]:
            with clock("vision", self._engine.backend.mark):
                return self._engine.run("vision", {"tower_pixels": tower})

        def run_unet() -> dict[str, Tensor]:
            with clock("unet_encoder"):
                return self._engine.run("unet_encoder", {"unet_pixels": unet})

        if self._beside:
            features_later = self._beside.submit(run_unet)
            text_later = self._beside.submit(self._text_tensors, text, clock)
            try:
                states = run_tower()
            finally:
                wait([features_later, text_later])
            features, text_tensors = features_later.result(), text_later.result()
        else:
            states, features = run_tower(), run_unet()
            text_tensors = self._text_tensors(text, clock)
        with clock("fusion", self._engine.backend.mark):
            return features | self._engine.run("fusion", states | features), text_tensors

    def _text_tensors(self, text: EncodedText, clock: Clock) -> dict[str, Tensor]:
        with clock("text"):
            return self._engine.text_tensors([text])

    def _decode(
        self, tensors: Mapping[str, Tensor], text_tensors: Mapping[str, Tensor], clock: Clock
    ) -> tuple[Scores, dict[str, Tensor]]:
        """Run the decoder: scores (K,), and its other outputs."""
        with clock("decoder", self._engine.backend.mark):
            outputs = self._engine.run("decoder", {**tensors, **text_tensors})
            scores: Scores = self._engine.backend.to_host(outputs["scores"])[0]
        _check_output("decoder", scores, len(self.manifest.labels))
        return scores, outputs

    def _decode_text(
        self, tensors: Mapping[str, Tensor], text: EncodedText, clock: Clock
    ) -> tuple[Scores, dict[str, Tensor]]:
        return self._decode(tensors, self._text_tensors(text, clock), clock)

    def _average(self, tower: Pixels, unet: Pixels) -> Pixels:
        """Average what the image encoders give of one case over its places: (F,)."""
        states = self._engine.run("vision", {"tower_pixels": tower})
        maps = self._engine.run("unet_encoder", {"unet_pixels": unet})
        tokens, *planes = [
            self._engine.backend.to_host(t)[0] for t in (*states.values(), *maps.values())
        ]
        pooled = [tokens.mean(axis=0), *(plane.mean(axis=(1, 2)) for plane in planes)]
        return np.concatenate(pooled, dtype=np.float32)

    def _score(self, tower: Pixels, unet: Pixels, text: EncodedText) -> Scores:
        """Score one case, and keep nothing of it: scores (K,)."""
        scores, _ = self._decode(*self._encode(tower, unet, text, Clock()), Clock())
        return scores

    def _evidence(self, case: _Case, whole: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Cover each cell in turn; by how much do the label's log-odds drop?

        Args:
            whole: float64 (K,), log-probabilities with nothing covered.

        Returns:
            float32 (GRID, GRID).
        """
        with self._keeping:
            self._kept = {}  # room for this photograph and a covered one: KEPT_PHOTOGRAPHS
        spec, photograph, best = self.manifest.image, case.photograph, int(whole.argmax())
        drops = np.zeros((GRID, GRID), np.float32)

        def fill(row: int) -> None:
            tower = cover_cells(photograph.tower_pixels, spec.tower_mean, spec.tower_std, row)
            unet = cover_cells(photograph.unet_pixels, spec.unet_mean, spec.unet_std, row)
            for column in range(GRID):
                one = slice(column, column + 1)
                scores = self._score(tower[one], unet[one], case.text)
                covered = _log_softmax(scores / self.manifest.temperature)
                drops[row, column] = _log_odds(whole, best) - _log_odds(covered, best)

        for row in range(GRID):
            self._run(fill, row)  # row by row: after an interrupt only one is finished
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


def _check_output(block: str, values: Array, expected: int) -> None:
    """Refuse what would read as an answer and is none."""
    if len(values) != expected or not np.isfinite(values).all():
        found = "NaN or infinity" if len(values) == expected else f"{len(values)} values"
        raise BackendRunError(
            f"block {block}: found {found} in its output, expected {expected}, all finite. Check "
            "the engine on this machine: mdf verify ENGINE"
        )

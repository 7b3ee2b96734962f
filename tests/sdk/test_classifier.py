import dataclasses
import itertools
import multiprocessing
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

import mdf_sdk.classifier
from mdf_sdk import (
    BackendRunError,
    BusyError,
    ClosedError,
    EngineError,
    ImageError,
    InputError,
    IntegrityError,
    ManifestError,
    MDFClassifier,
    MDFError,
    TextError,
    load_manifest,
)
from mdf_sdk.evidence import cover_cells
from mdf_sdk.machine import usable_cores
from mdf_sdk.preprocessing import find_square, to_pixels
from mdf_sdk.sessions import Tensor
from mdf_sdk.sessions.onnxruntime_cpu import OnnxRuntimeCpu

from .toy_engine import LABELS, MASK_KINDS, UNET_PX, build_toy_engine, seal

Picture = npt.NDArray[np.uint8]
IMAGE_STAGES = ("vision", "unet_encoder", "fusion")


@pytest.fixture
def fresh(toy_engine: Path) -> Iterator[MDFClassifier]:
    with MDFClassifier(toy_engine, threads=1) as classifier:
        yield classifier


def test_a_prediction_holds_calibrated_probabilities(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    prediction = classifier.predict(photograph, "58 years old")
    scores = np.array([prediction.scores[label] for label in LABELS])
    scaled = np.exp(scores / classifier.manifest.temperature)
    assert tuple(prediction.probabilities) == LABELS
    np.testing.assert_allclose(list(prediction.probabilities.values()), scaled / scaled.sum())
    assert prediction.label == LABELS[int(scores.argmax())]
    assert prediction.probability == max(prediction.probabilities.values())
    assert prediction.mask is None
    assert prediction.evidence is None
    assert prediction.notice == "A toy, not for clinical use."


@given(seed=st.integers(0, 1000), text=st.text("abc <|eot_id|>", min_size=1).filter(str.strip))
@settings(deadline=None, max_examples=25)
def test_probabilities_keep_the_order_of_the_scores(
    classifier: MDFClassifier, seed: int, text: str
) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
    prediction = classifier.predict(picture, text)
    by_score = sorted(LABELS, key=prediction.scores.__getitem__)
    by_probability = sorted(LABELS, key=prediction.probabilities.__getitem__)
    assert by_score == by_probability
    assert sum(prediction.probabilities.values()) == pytest.approx(1)


@given(
    cases=st.lists(
        st.tuples(st.integers(0, 3), st.text("ab ", min_size=1, max_size=70).filter(str.strip)),
        max_size=11,
    )
)
@settings(deadline=None, max_examples=25)
def test_a_batch_gives_what_single_calls_give(
    classifier: MDFClassifier, cases: list[tuple[int, str]]
) -> None:
    pictures = [
        np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8) for seed, _ in cases
    ]
    texts = [text for _, text in cases]
    batch = classifier.predict_batch(pictures, texts, mask=True)
    assert len(batch) == len(cases)
    for together, picture, text in zip(batch, pictures, texts, strict=True):
        alone = classifier.predict(picture, text, mask=True)
        assert together.scores == pytest.approx(alone.scores, abs=1e-5)
        assert together.dropped_tokens == alone.dropped_tokens
        assert together.mask is not None
        assert alone.mask is not None
        for kind in MASK_KINDS:
            np.testing.assert_allclose(together.mask[kind], alone.mask[kind], atol=1e-5)


def test_a_batch_says_which_case_is_unusable(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    with pytest.raises(TextError, match="case 1: clinical text"):
        classifier.predict_batch([photograph, photograph], ["a", ""])
    with pytest.raises(ImageError, match="case 0: image"):
        classifier.predict_batch([b"x", photograph], ["a", "b"])


@pytest.mark.parametrize(("images", "texts"), [([b"x"], []), ("eye.png", ["a"]), ([b"x"], "a")])
def test_a_batch_of_unequal_lists_is_refused(
    classifier: MDFClassifier, images: Any, texts: Any
) -> None:
    with pytest.raises(InputError, match=r"predict_batch: found .* expected"):
        classifier.predict_batch(images, texts)


def test_both_image_and_text_change_the_scores(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    scores = classifier.predict(photograph, "58 years old").scores
    assert classifier.predict(photograph[:, ::-1], "58 years old").scores != scores
    assert classifier.predict(photograph, "7 years old").scores != scores


def test_a_mask_is_given_when_asked_for_and_its_block_not_loaded_before(
    fresh: MDFClassifier, toy_copy: Path, photograph: Picture
) -> None:
    (toy_copy / "unet_decoder.onnx").write_bytes(b"no graph")
    seal(toy_copy, load_manifest(toy_copy))
    with MDFClassifier(toy_copy) as maskless:
        maskless.predict(photograph, "a")
        with pytest.raises(BackendRunError, match=r"block unet_decoder"):
            maskless.predict(photograph, "a", mask=True)
    mask = fresh.predict(photograph, "a", mask=True).mask
    assert mask is not None
    assert tuple(mask) == MASK_KINDS
    for values in mask.values():
        assert (values.shape, values.dtype) == ((UNET_PX, UNET_PX), np.float32)
        assert values.min() >= 0
        assert values.max() <= 1


def test_another_text_on_the_same_photograph_runs_only_the_decoder(
    fresh: MDFClassifier, photograph: Picture, tmp_path: Path
) -> None:
    Image.fromarray(photograph).save(tmp_path / "eye.png")
    first = fresh.predict(tmp_path / "eye.png", "first")
    second = fresh.predict((tmp_path / "eye.png").read_bytes(), "second")
    other = fresh.predict(photograph[::-1], "second")
    assert all(first.latency_ms[stage] > 0 for stage in IMAGE_STAGES)
    assert all(second.latency_ms[stage] == 0 for stage in IMAGE_STAGES)
    assert all(other.latency_ms[stage] > 0 for stage in IMAGE_STAGES)
    assert second.square == first.square


def test_what_is_kept_changes_no_answer(
    classifier: MDFClassifier, fresh: MDFClassifier, photograph: Picture
) -> None:
    fresh.predict(photograph, "first")
    assert fresh.predict(photograph, "second").scores == pytest.approx(
        classifier.predict(photograph, "second").scores
    )


def test_the_oldest_photograph_goes_before_a_new_one_is_computed(
    fresh: MDFClassifier, photograph: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [photograph, photograph[::-1].copy(), photograph[:, ::-1].copy()]
    for picture in pictures[:2]:
        fresh.predict(picture, "a")
    run, kept = fresh._engine.run, []

    def counted(block: str, inputs: Any) -> Any:
        kept.append(len(fresh._kept))
        return run(block, inputs)

    monkeypatch.setattr(fresh._engine, "run", counted)
    fresh.predict(pictures[2], "a")
    assert set(kept) == {1}
    assert fresh.predict(pictures[1], "b").latency_ms["vision"] == 0
    assert fresh.predict(pictures[0], "b").latency_ms["vision"] > 0


def test_an_array_changed_in_place_is_a_new_photograph(
    fresh: MDFClassifier, photograph: Picture
) -> None:
    picture = photograph.copy()
    before = fresh.predict(picture, "a").scores
    picture[:] = picture[:, ::-1].copy()
    assert fresh.predict(picture, "a").scores != before


def test_the_total_latency_covers_every_stage(fresh: MDFClassifier, photograph: Picture) -> None:
    latency_ms = dict(fresh.predict(photograph, "a", mask=True, evidence=True).latency_ms)
    total = latency_ms.pop("total")
    assert total >= sum(latency_ms.values())


@pytest.fixture(scope="module")
def spotted(photograph: Picture) -> Picture:
    """The photograph with a white middle cell."""
    picture = photograph.copy()
    picture[106:135, 166:195] = 255
    return picture


def test_evidence_is_the_drop_of_the_labels_log_odds(
    classifier: MDFClassifier, spotted: Picture
) -> None:
    prediction = classifier.predict(spotted, "58 years old", evidence=True)
    spec = classifier.manifest.image
    tower, unet = to_pixels(spotted, spec)
    scores = classifier.score(
        cover_cells(tower, spec.tower_mean, spec.tower_std, 3),
        cover_cells(unet, spec.unet_mean, spec.unet_std, 3),
        ["58 years old"] * 7,
    )
    odds = np.exp(scores / classifier.manifest.temperature)
    covered = odds[:, LABELS.index(prediction.label)] / odds.sum(axis=1)
    p = prediction.probability
    drops = np.log(p / (1 - p)) - np.log(covered / (1 - covered))
    assert np.abs(drops).max() > 1e-2
    assert prediction.evidence is not None
    np.testing.assert_allclose(prediction.evidence[3], drops, atol=1e-4)


def test_evidence_is_strongest_where_the_picture_is_special(
    classifier: MDFClassifier, spotted: Picture
) -> None:
    evidence = classifier.predict(spotted, "58 years old", evidence=True).evidence
    assert evidence is not None
    assert (evidence.shape, evidence.dtype) == ((7, 7), np.float32)
    assert np.unravel_index(np.abs(evidence).argmax(), (7, 7)) == (3, 3)


def test_evidence_of_an_evenly_gray_field_is_zero(classifier: MDFClassifier) -> None:
    picture = np.pad(np.full((64, 64, 3), 128, np.uint8), ((8, 8), (8, 8), (0, 0)))
    evidence = classifier.predict(picture, "a", evidence=True).evidence
    np.testing.assert_allclose(evidence, np.zeros((7, 7)), atol=1e-5)


def test_scores_of_prepared_pixels_equal_the_predictions(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    pictures, texts = [photograph, photograph[:, ::-1]], ["58 years old", "a"]
    pixels = [to_pixels(p, classifier.manifest.image, find_square(p)) for p in pictures]
    tower, unet = (np.stack(side) for side in zip(*pixels, strict=True))
    scores = classifier.score(tower, unet, texts)
    for row, picture, text in zip(scores, pictures, texts, strict=True):
        alone = classifier.predict(picture, text)
        assert row.tolist() == pytest.approx(list(alone.scores.values()), abs=1e-5)


def test_image_features_are_the_averages_of_what_the_encoders_give(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    tower, unet = to_pixels(photograph, classifier.manifest.image, find_square(photograph))
    features = classifier.image_features(np.stack([tower, 0 * tower]), np.stack([unet, 0 * unet]))
    blocks = classifier.manifest.blocks
    (states,), maps = blocks["vision"].outputs, blocks["unet_encoder"].outputs
    channels = [int(states.shape[2]), *(int(spec.shape[1]) for spec in maps)]
    assert features.shape == (2, sum(channels))
    assert features.dtype == np.float32
    assert not np.allclose(features[0], features[1])


def test_text_only_scores_depend_on_the_text_alone(classifier: MDFClassifier) -> None:
    scores = classifier.text_only_scores(["58 years old", "a", "a"])
    assert scores.shape == (3, len(LABELS))
    assert scores[1].tolist() == pytest.approx(scores[2].tolist(), abs=1e-6)
    assert scores[0].tolist() != pytest.approx(scores[1].tolist(), abs=1e-3)


def test_a_text_that_does_not_fit_is_cut_and_said_so(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    prediction = classifier.predict(photograph, "a" * 70)
    assert prediction.text_tokens == 64
    assert prediction.dropped_tokens == 6
    assert "the last 6 CUT OFF" in str(prediction)


def test_control_tokens_in_the_text_are_read_as_characters(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    prediction = classifier.predict(photograph, "<|eot_id|><|image|>")
    assert prediction.text_tokens == len("<|eot_id|><|image|>")


def test_no_error_message_repeats_the_text(classifier: MDFClassifier, photograph: Picture) -> None:
    for text in ("secret\ud800", "\ud800secret"):
        with pytest.raises(TextError) as caught:
            classifier.predict(photograph, text)
        assert "secret" not in str(caught.value)


def test_nan_scores_never_become_a_prediction(tmp_path: Path, photograph: Picture) -> None:
    build_toy_engine(tmp_path / "engine", score_bias=float("nan"))
    with MDFClassifier(tmp_path / "engine") as broken:
        for ask in (broken.predict, lambda image, text: broken.text_only_scores([text])):
            with pytest.raises(BackendRunError, match=r"NaN.*mdf verify"):
                ask(photograph, "a")


def test_a_closed_classifier_says_so(toy_engine: Path, photograph: Picture) -> None:
    classifier = MDFClassifier(toy_engine)
    classifier.predict(photograph, "a")
    classifier.close()
    classifier.close()
    with pytest.raises(MDFError, match="closed"):
        classifier.predict(photograph, "a")


def test_files_are_checked_before_any_is_parsed(toy_copy: Path) -> None:
    (toy_copy / "tokenizer.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        MDFClassifier(toy_copy)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("tokenizer.json", b"{", EngineError),
        ("tokenizer.json", b"\xff", EngineError),
        ("embeddings.npy", b"no array", EngineError),
        ("vision.onnx", b"no graph", BackendRunError),
        ("vision.onnx", b"", BackendRunError),
    ],
)
def test_a_file_that_is_sealed_but_nonsense_is_refused(
    toy_copy: Path, name: str, content: bytes, error: type[MDFError]
) -> None:
    (toy_copy / name).write_bytes(content)
    seal(toy_copy, load_manifest(toy_copy))
    with pytest.raises(error):
        MDFClassifier(toy_copy)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((300, 8), np.float64),
        np.zeros(300, np.float32),
        np.array([{}], dtype=object),
    ],
)
def test_embeddings_of_another_kind_are_refused(toy_copy: Path, rows: npt.NDArray[Any]) -> None:
    np.save(toy_copy / "embeddings.npy", rows, allow_pickle=True)
    seal(toy_copy, load_manifest(toy_copy))
    with pytest.raises(EngineError, match=r"embeddings\.npy"):
        MDFClassifier(toy_copy)


def test_too_few_embeddings_are_refused(toy_copy: Path, photograph: Picture) -> None:
    np.save(toy_copy / "embeddings.npy", np.zeros((100, 8), np.float32))
    seal(toy_copy, load_manifest(toy_copy))
    with MDFClassifier(toy_copy) as classifier, pytest.raises(EngineError, match="100 rows"):
        classifier.predict(photograph, "a")


def test_a_graph_with_other_bindings_than_the_manifest_is_refused(toy_copy: Path) -> None:
    manifest = load_manifest(toy_copy)
    vision = manifest.blocks["vision"]
    (states,) = vision.outputs
    changed = dataclasses.replace(vision, outputs=(dataclasses.replace(states, dtype="float16"),))
    seal(toy_copy, dataclasses.replace(manifest, blocks=manifest.blocks | {"vision": changed}))
    with pytest.raises(ManifestError, match=r"block vision.*vision_states"):
        MDFClassifier(toy_copy)


def test_an_input_that_no_block_gives_is_named(toy_copy: Path, photograph: Picture) -> None:
    model = onnx.load(toy_copy / "unet_encoder.onnx")
    manifest = load_manifest(toy_copy)
    model.graph.node[0].output[0] = model.graph.output[0].name = "skip_9"
    onnx.save(model, toy_copy / "unet_encoder.onnx")
    encoder = manifest.blocks["unet_encoder"]
    first = dataclasses.replace(encoder.outputs[0], name="skip_9")
    changed = dataclasses.replace(encoder, outputs=(first, *encoder.outputs[1:]))
    seal(
        toy_copy, dataclasses.replace(manifest, blocks=manifest.blocks | {"unet_encoder": changed})
    )
    with MDFClassifier(toy_copy) as classifier, pytest.raises(ManifestError, match="'skip_0'"):
        classifier.predict(photograph, "a")


def test_a_block_that_fails_while_running_is_named(toy_copy: Path, photograph: Picture) -> None:
    model = onnx.load(toy_copy / "vision.onnx")
    (shape,) = (i for i, value in enumerate(model.graph.initializer) if value.name == "shape")
    model.graph.initializer[shape].CopyFrom(numpy_helper.from_array(np.array([0, 3, 5]), "shape"))
    del model.graph.output[0].type.tensor_type.shape.dim[1:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, toy_copy / "vision.onnx")
    seal(toy_copy, load_manifest(toy_copy))
    with (
        pytest.raises(BackendRunError, match="block vision"),
        MDFClassifier(toy_copy) as classifier,
    ):
        classifier.predict(photograph, "a")


def test_a_batch_takes_any_iterables(classifier: MDFClassifier, photograph: Picture) -> None:
    predictions = classifier.predict_batch((photograph for _ in range(2)), iter(["a", "b"]))
    assert len(predictions) == 2


def test_a_photograph_in_place_of_a_list_is_refused(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    with pytest.raises(InputError, match="expected a list of each"):
        classifier.predict_batch(Image.fromarray(photograph), ["a"])  # type: ignore[arg-type]


def test_nothing_to_score_is_refused(classifier: MDFClassifier, photograph: Picture) -> None:
    tower, unet = to_pixels(photograph, classifier.manifest.image)
    with pytest.raises(InputError, match="found no texts"):
        classifier.text_only_scores([])
    with pytest.raises(InputError, match="found 0 and 1 pixel tensors"):
        classifier.image_features(tower[None][:0], unet[None])


def test_scoring_as_many_texts_as_pictures_is_demanded(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    tower, unet = to_pixels(photograph, classifier.manifest.image)
    with pytest.raises(InputError, match="expected as many of each"):
        classifier.score(tower[None], unet[None], ["a", "b"])


def test_a_text_of_a_book_is_refused_before_it_is_tokenized(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    with pytest.raises(InputError, match="expected at most 100000"):
        classifier.predict(photograph, "a" * 100_001)


def test_threads_get_the_very_answers_of_a_single_one(
    toy_engine: Path, photograph: npt.NDArray[np.uint8]
) -> None:
    pictures = [np.roll(photograph, 7 * i, axis=1) for i in range(6)]
    texts = ("58 years old", "night blindness", "a" * 40)
    cases = [(picture, text) for picture in pictures for text in texts]
    with MDFClassifier(toy_engine, device="cpu", threads=1) as classifier:
        golden = [classifier.predict(*case, mask=True) for case in cases]

        def answer(number: int) -> bool:
            found = classifier.predict(*cases[number], mask=True)
            expected = golden[number]
            assert found.mask is not None
            assert expected.mask is not None
            same = [(found.mask[kind] == expected.mask[kind]).all() for kind in expected.mask]
            return found.scores == expected.scores and all(same)

        order = np.random.default_rng(0).integers(len(cases), size=400).tolist()
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(answer, order))


def test_a_failed_run_is_survived(
    toy_engine: Path, photograph: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    with MDFClassifier(toy_engine, device="cpu") as classifier:
        expected = classifier.predict(photograph, "58 years old").scores
        session = classifier._engine.open("decoder")
        with monkeypatch.context() as patch:

            def fail(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
                raise BackendRunError("block decoder: a planted failure")

            patch.setattr(session, "run", fail)
            for _ in range(3):
                with pytest.raises(BackendRunError, match="planted"):
                    classifier.predict(photograph, "58 years old")
        assert classifier.predict(photograph, "58 years old").scores == expected


def test_a_full_queue_turns_away_and_a_time_out_ends_the_wait(
    toy_engine: Path, photograph: npt.NDArray[np.uint8]
) -> None:
    with MDFClassifier(toy_engine, device="cpu", max_waiting=1) as classifier:
        inside, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with classifier._admission.enter():
                inside.set()
                leave.wait(10)

        with ThreadPoolExecutor(2) as pool:
            pool.submit(hold)
            assert inside.wait(10)
            with pytest.raises(BusyError, match=r"0\.01 s"):
                classifier.predict(photograph, "58 years old", timeout_s=0.01)
            waiting = pool.submit(classifier.predict, photograph, "58 years old")
            while not classifier._admission._queue:
                pass
            with pytest.raises(BusyError, match="1 waiting"):
                classifier.predict(photograph, "58 years old")
            leave.set()
            assert waiting.result(10).label


def test_a_batch_is_not_turned_away_between_its_cases(
    toy_engine: Path, photograph: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        MDFClassifier(toy_engine, device="cpu", max_waiting=0) as classifier,
        ThreadPoolExecutor(1) as pool,
    ):
        enter, calls = classifier._admission.enter, itertools.count()

        def enter_behind_another(*args: Any, **options: Any) -> AbstractContextManager[None]:
            if next(calls) == 1:
                inside = threading.Event()

                def stay() -> None:
                    with enter():
                        inside.set()
                        threading.Event().wait(0.05)

                pool.submit(stay)
                assert inside.wait(10)
            return enter(*args, **options)

        monkeypatch.setattr(classifier._admission, "enter", enter_behind_another)
        batch = classifier.predict_batch([photograph] * 2, ["58 years old", "9 years old"])
        assert len(batch) == 2


def test_blocks_that_do_not_depend_on_each_other_overlap_on_a_card_and_fail_together(
    toy_engine: Path, photograph: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntimeCpu, "overlaps", True)
    with MDFClassifier(toy_engine, device="cpu") as classifier:
        meeting = threading.Barrier(2)
        for block in ("vision", "unet_encoder"):
            session = classifier._engine.open(block)

            def meet(
                inputs: Mapping[str, Tensor],
                run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = session.run,
            ) -> dict[str, Tensor]:
                meeting.wait(10)  # both are running
                return run(inputs)

            monkeypatch.setattr(session, "run", meet)
        assert classifier.predict(photograph, "58 years old").label
        meeting.abort()
        with pytest.raises(threading.BrokenBarrierError):
            classifier.predict(photograph // 2, "58 years old")


def test_photographs_are_prepared_and_blocks_run_in_few_threads_none_of_them_the_callers(
    toy_engine: Path, photograph: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {"decode": set(), "run": set()}

    def note(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            seen[step].add(threading.current_thread().name)
            return function(*args)

        return noted

    monkeypatch.setattr(mdf_sdk.classifier, "decode", note("decode", mdf_sdk.classifier.decode))
    with MDFClassifier(toy_engine, device="cpu", threads=1) as classifier:
        for block in classifier.manifest.blocks:
            session = classifier._engine.open(block)
            monkeypatch.setattr(session, "run", note("run", session.run))

        def call(number: int) -> None:
            picture = np.roll(photograph, number, axis=1)
            classifier.predict(picture, "58 years old", mask=True, evidence=number == 0)
            classifier.predict_batch([picture // 2], ["58 years old"])

        with ThreadPoolExecutor(8, "caller") as pool:
            list(pool.map(call, range(16)))
        tower, unet = (p[None] for p in to_pixels(photograph, classifier.manifest.image))
        classifier.score(tower, unet, ["58 years old"])
        classifier.image_features(tower, unet)
        classifier.text_only_scores(["58 years old"])
        classifier.warm_up()
        slots = classifier._engine.backend.slots
    assert 0 < len(seen["decode"]) <= usable_cores()
    assert 0 < len(seen["run"]) <= slots
    assert all(name.startswith("mdf-pixels") for name in seen["decode"])
    assert all(name.startswith("mdf-run") for name in seen["run"])


def test_close_ends_the_threads_that_run_blocks(toy_engine: Path, photograph: Picture) -> None:
    before = set(threading.enumerate())
    with MDFClassifier(toy_engine, device="cpu") as classifier:
        classifier.predict(photograph, "58 years old")
        running = set(threading.enumerate()) - before
        assert any(thread.name.startswith("mdf-run") for thread in running)
    left = [t.name for t in running if t.is_alive() and not t.name.startswith("mdf-pixels")]
    assert not left


def test_a_photograph_is_let_go_after_the_call(toy_engine: Path, photograph: Picture) -> None:
    with MDFClassifier(toy_engine, device="cpu") as classifier:
        for text, fails in (("58 years old", False), ("", True)):
            picture = photograph.copy()
            held = weakref.ref(picture)
            with pytest.raises(TextError) if fails else nullcontext():
                classifier.predict(picture, text)
            del picture
            deadline = time.monotonic() + 10  # a thread lets go of it just after it has answered
            while held() is not None and time.monotonic() < deadline:
                pass
            assert held() is None


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background job is started deaf to interrupts, and Python then stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows waits for a lock without interrupt")
def test_what_an_interrupted_caller_left_ends_before_the_next_runs_and_before_close(
    toy_engine: Path, photograph: Picture, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    with (
        MDFClassifier(toy_engine, device="cpu", threads=None) as classifier,
        ThreadPoolExecutor(1) as pool,
    ):
        expected = classifier.predict(photograph, "58 years old").scores
        session, leave = classifier._engine.open("decoder"), threading.Event()
        run, ended = session.run, threading.Event()

        def interrupt(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            monkeypatch.setattr(session, "run", run)
            leave.wait(0.2)  # the caller waits by then; on its way there Python hears no signal
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert leave.wait(10)
            outputs = run(inputs)
            ended.set()
            return outputs

        for follow in (lambda: classifier.predict(photograph, "58 years old"), classifier.close):
            leave.clear()
            ended.clear()
            monkeypatch.setattr(session, "run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                classifier.predict(photograph, "9 years old")
            following = pool.submit(follow)
            with pytest.raises(TimeoutError):
                following.result(0.1)
            leave.set()
            found = following.result(10)
            assert ended.is_set()
            assert found is None or found.scores == expected


@pytest.mark.skipif(sys.platform == "win32", reason="Windows forks no process")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_is_told_to_make_its_own(toy_engine: Path, photograph: Picture) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with MDFClassifier(toy_engine, device="cpu") as classifier:
        classifier.predict(photograph, "58 years old")

        def child() -> None:
            try:
                classifier.predict(photograph, "58 years old")
            except ClosedError as error:
                answers.put(str(error))
            classifier.close()

        process = context.Process(target=child)
        process.start()
        process.join(20)
        assert process.exitcode == 0
        assert "after the fork" in answers.get()


@pytest.mark.parametrize("max_waiting", [-1, 1.5, None])
def test_the_length_of_the_queue_is_a_whole_number(toy_engine: Path, max_waiting: Any) -> None:
    with pytest.raises(InputError, match="max_waiting"):
        MDFClassifier(toy_engine, max_waiting=max_waiting)

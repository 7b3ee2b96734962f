"""The CUDA backend with the host's memory in the card's place: ONNX Runtime binds both alike.

What only a card can show (graph capture, memory, speed) is in docs/results/sdk-gpu.md.
"""

import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

from mdf_sdk import (
    BackendRunError,
    BackendUnavailableError,
    DeviceMemoryError,
    ManifestError,
    MDFClassifier,
    Prediction,
    load_manifest,
)
from mdf_sdk.engine import Engine
from mdf_sdk.integrity import digest
from mdf_sdk.manifest import FUSED_SUFFIX, save_manifest
from mdf_sdk.sessions import DeviceArray, Tensor, onnxruntime_cuda
from mdf_sdk.sessions.device_memory import concatenate, copy_all, empty_all
from mdf_sdk.sessions.onnxruntime_cuda import OnnxRuntimeCuda, import_with_cuda
from mdf_sdk.sessions.onnxruntime_load import load_graph, session_options

from .host_memory import HostMemory

ROOT = Path(__file__).parents[2]
# Resident memory, in bytes, that opening a block adds, and then its first run.
GROWTH = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
from mdf_sdk import load_manifest
from mdf_sdk.sessions.onnxruntime_cuda import OnnxRuntimeCuda
from tests.sdk.host_memory import HostMemory

def resident():
    status = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmRSS"))

engine = Path(sys.argv[1])
before = resident()
session = OnnxRuntimeCuda(engine, load_manifest(engine), HostMemory()).open("vision")
opened = resident()
session.run({"tower_pixels": np.ones((1, 3, 16, 16), np.float32)})
print(opened - before, resident() - opened)
"""
TEXTS = ("58 years old", "night blindness since childhood, a brother too", "58 years old")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """What `device="cuda"` finds."""
    memory = HostMemory()
    monkeypatch.setattr("mdf_sdk.sessions.cuda_memory.CudaMemory", lambda: memory)
    return memory


@pytest.fixture
def on_card(toy_engine: Path, memory: HostMemory) -> Iterator[MDFClassifier]:
    with MDFClassifier(toy_engine, device="cuda") as classifier:
        yield classifier


@pytest.fixture
def pictures(photograph: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    return [photograph, photograph[:, ::-1].copy(), photograph // 2]


def scores(prediction: Prediction) -> list[float]:
    return list(prediction.scores.values())


def test_it_answers_as_the_cpu_does(
    on_card: MDFClassifier, classifier: MDFClassifier, pictures: list[npt.NDArray[np.uint8]]
) -> None:
    for picture, text in zip(pictures, TEXTS, strict=True):
        found = on_card.predict(picture, text, mask=True, evidence=True)
        expected = classifier.predict(picture, text, mask=True, evidence=True)
        np.testing.assert_allclose(scores(found), scores(expected), rtol=1e-5)
        assert found.mask is not None
        assert expected.mask is not None
        for kind, values in expected.mask.items():
            np.testing.assert_allclose(found.mask[kind], values, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.evidence, expected.evidence, atol=1e-5)


def test_a_batch_gives_the_very_answers_of_single_calls(
    on_card: MDFClassifier, pictures: list[npt.NDArray[np.uint8]]
) -> None:
    batch = on_card.predict_batch(pictures, TEXTS, mask=True)
    for found, picture, text in zip(batch, pictures, TEXTS, strict=True):
        single = on_card.predict(picture, text, mask=True)
        assert scores(found) == scores(single)
        assert found.mask is not None
        assert single.mask is not None
        assert all((found.mask[kind] == single.mask[kind]).all() for kind in single.mask)


def test_pixels_are_prepared_where_the_card_copies_them_from(
    on_card: MDFClassifier,
    pictures: list[npt.NDArray[np.uint8]],
    memory: HostMemory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, read = list[Any](), list[Any]()
    empty_pixels, write = memory.empty_pixels, type(memory).write

    def note_made(size: int) -> Any:
        made.append(empty_pixels(size))
        return made[-1]

    def note_read(self: HostMemory, *copies: tuple[DeviceArray, Tensor]) -> None:
        read.extend(source for _, source in copies if isinstance(source, np.ndarray))
        write(self, *copies)

    monkeypatch.setattr(memory, "empty_pixels", note_made)
    monkeypatch.setattr(HostMemory, "write", note_read)
    on_card.predict(pictures[0], TEXTS[0])
    (pixels,) = made
    tower, unet = [source for source in read if np.shares_memory(source, pixels)]
    assert tower.nbytes + unet.nbytes == pixels.nbytes


def test_a_kept_photograph_is_not_overwritten_by_another(
    on_card: MDFClassifier, pictures: list[npt.NDArray[np.uint8]]
) -> None:
    first = on_card.predict(pictures[0], TEXTS[0])
    on_card.predict(pictures[1], TEXTS[1])
    again = on_card.predict(pictures[0], TEXTS[0])
    assert again.latency_ms["vision"] == 0.0
    assert scores(again) == scores(first)


def test_evidence_holds_its_photograph_and_one_that_is_covered(
    on_card: MDFClassifier,
    pictures: list[npt.NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed: list[weakref.ref[object]] = []
    alive: list[int] = []
    original = on_card._encode

    def spy(*arguments: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        alive.append(sum(owner() is not None for owner in computed))
        tensors, text_tensors = original(*arguments)
        tensor = tensors["cross_key_1"]
        assert isinstance(tensor, DeviceArray)
        computed.append(weakref.ref(tensor.owner))
        return tensors, text_tensors

    monkeypatch.setattr(on_card, "_encode", spy)
    on_card.predict(pictures[1], TEXTS[1])
    on_card.predict(pictures[0], TEXTS[0], evidence=True)
    assert alive == [0, 1] + 49 * [1]  # the photograph as it is, no longer the one before
    on_card.predict(pictures[0], TEXTS[1])
    assert len(alive) == 51


def test_the_text_is_prepared_beside_the_photograph(
    on_card: MDFClassifier,
    pictures: list[npt.NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tower waits for it: behind the tower, it would wait for ever."""
    prepared = threading.Event()
    prepare, run = on_card._engine.text_tensors, on_card._engine.run

    def text_tensors(*arguments: Any) -> dict[str, Tensor]:
        prepared.set()
        return prepare(*arguments)

    def wait_for_text(block: str, tensors: Any) -> dict[str, Tensor]:
        assert block != "vision" or prepared.wait(20)
        return run(block, tensors)

    monkeypatch.setattr(on_card._engine, "text_tensors", text_tensors)
    monkeypatch.setattr(on_card._engine, "run", wait_for_text)
    on_card.predict(pictures[0], TEXTS[0])


def test_what_one_block_gives_the_next_is_in_its_place_already(
    on_card: MDFClassifier, pictures: list[npt.NDArray[np.uint8]], memory: HostMemory
) -> None:
    on_card.predict(pictures[0], TEXTS[0])
    decoder = on_card._engine.open("decoder")
    assert isinstance(decoder, onnxruntime_cuda.OnnxRuntimeCudaSession)
    keys = {p.array.pointer for (name, _), p in decoder._places.items() if "cross_key" in name}
    assert keys
    memory.written.clear()
    on_card.predict(pictures[1], TEXTS[1])
    assert not keys & set(memory.written)
    on_card.predict(pictures[0], TEXTS[2])  # its own are kept elsewhere
    assert keys <= set(memory.written)


def test_a_prediction_names_the_card(
    on_card: MDFClassifier, pictures: list[npt.NDArray[np.uint8]]
) -> None:
    prediction = on_card.predict(pictures[0], TEXTS[0])
    assert prediction.engine.device == "cuda"
    assert "on cuda (a card played by the host)" in str(prediction)


def test_prompts_of_similar_length_share_a_shape_and_shapes_share_memory(
    on_card: MDFClassifier, pictures: list[npt.NDArray[np.uint8]]
) -> None:
    for length in range(1, 60):
        on_card.predict(pictures[0], "a" * length)
    decoder = on_card._engine.open("decoder")
    assert isinstance(decoder, onnxruntime_cuda.OnnxRuntimeCudaSession)
    assert 1 < len(decoder._bindings) <= 3
    assert sum(name == "cross_key_1" for name, _ in decoder._places) == 1


def test_a_block_that_cannot_be_opened_takes_no_place_from_the_others(
    on_card: MDFClassifier, pictures: list[npt.NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_card.predict(pictures[0], "short")
    decoder = on_card._engine.open("decoder")
    assert isinstance(decoder, onnxruntime_cuda.OnnxRuntimeCudaSession)
    before = {key: place.array.pointer for key, place in decoder._places.items()}

    def fail(self: onnxruntime_cuda.OnnxRuntimeCudaSession) -> None:
        raise DeviceMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime_cuda.OnnxRuntimeCudaSession, "capture", fail)
        with pytest.raises(DeviceMemoryError, match="planted"):
            on_card.predict(pictures[0], "short", mask=True)
    on_card.predict(pictures[0], "so long that it is a shape of its own " * 3)
    after = {key: place.array.pointer for key, place in decoder._places.items()}
    assert before.items() < after.items()
    places = decoder._places
    del decoder
    on_card.close()
    assert not places


def test_warming_up_runs_every_shape(on_card: MDFClassifier) -> None:
    on_card.warm_up()
    decoder = on_card._engine.open("decoder")
    assert isinstance(decoder, onnxruntime_cuda.OnnxRuntimeCudaSession)
    warm = set(decoder._bindings)
    for length in (1, 30, 64, 500):
        on_card.predict(np.eye(64, dtype=np.uint8) * 200, "a" * length)
    assert set(decoder._bindings) == warm


def test_every_shape_has_a_graph_of_its_own(toy_engine: Path, memory: HostMemory) -> None:
    with Engine(toy_engine, device="cuda", blocks=["vision"]) as engine:
        session = engine.open("vision")
        session.run({"tower_pixels": np.zeros((3, 3, 16, 16), np.float32)})
        assert isinstance(session, onnxruntime_cuda.OnnxRuntimeCudaSession)
        (binding,) = session._bindings.values()
        assert binding.options.get_run_config_entry("gpu_graph_id") == "1"


def test_a_block_of_one_shape_is_captured_while_it_is_opened(on_card: MDFClassifier) -> None:
    for block, captured in (("vision", 1), ("unet_encoder", 1), ("fusion", 1), ("decoder", 0)):
        session = on_card._engine.open(block)
        assert isinstance(session, onnxruntime_cuda.OnnxRuntimeCudaSession)
        assert len(session._bindings) == captured


def test_a_graph_is_captured_for_one_thread_whoever_calls(
    on_card: MDFClassifier, pictures: list[npt.NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = on_card._engine.open("vision")
    assert isinstance(session, onnxruntime_cuda.OnnxRuntimeCudaSession)
    threads, replay = set(), session._replay

    def spy(inputs: Mapping[str, Tensor]) -> dict[str, DeviceArray]:
        threads.add(threading.get_ident())
        return replay(inputs)

    monkeypatch.setattr(session, "_replay", spy)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(on_card.predict, pictures, TEXTS))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("shape", [(1, 3, 9, 9), (1, 3, 16), (2, 3, 9, 9)])
def test_a_wrong_shape_is_refused_before_it_runs(
    toy_engine: Path, memory: HostMemory, shape: tuple[int, ...]
) -> None:
    with Engine(toy_engine, device="cuda") as engine, pytest.raises(BackendRunError, match="shape"):
        engine.run("vision", {"tower_pixels": np.zeros(shape, np.float32)})


def test_a_tensor_on_the_card_is_not_cast_in_silence(toy_engine: Path, memory: HostMemory) -> None:
    wrong = memory.empty((1, 3, 16, 16), np.dtype(np.float16))
    with Engine(toy_engine, device="cuda") as engine, pytest.raises(ManifestError, match="float16"):
        engine.run("vision", {"tower_pixels": wrong})


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' proc")
def test_a_captured_run_takes_no_memory_beside_the_first_ones(toy_copy: Path) -> None:
    """A block is run when it is opened; on a card the next run is the one that is captured."""
    path = toy_copy / "vision.onnx"
    model = onnx.load(path)
    (result,) = model.graph.node[-1].output
    model.graph.node[-1].output[0] = "small"
    many = numpy_helper.from_array(np.array([4_000_000]), "many")  # 16 MB a tensor, two at a time
    model.graph.initializer.append(many)
    for operator, inputs, output in (
        ("ReduceSum", ["small"], "sum"),
        ("Expand", ["sum", "many"], "large"),
        ("Sin", ["large"], "sine"),
        ("Mul", ["large", "sine"], "product"),
        ("ReduceSum", ["product"], "total"),
        ("Add", ["small", "total"], result),
    ):
        attributes = {"keepdims": 0} if operator == "ReduceSum" else {}
        model.graph.node.append(helper.make_node(operator, inputs, [output], **attributes))
    onnx.save(model, path)

    # In a process of its own: this one has memory left over from other tests.
    run = subprocess.run(
        [sys.executable, "-c", GROWTH, toy_copy], cwd=ROOT, capture_output=True, check=True
    )
    opening, first_run = map(int, run.stdout.split())
    assert opening > 30_000_000
    assert first_run < 8_000_000


def test_a_copy_that_failed_is_made_again(
    toy_engine: Path, memory: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = OnnxRuntimeCuda(toy_engine, load_manifest(toy_engine), memory).open("vision")
    dark, bright = (memory.empty((1, 3, 16, 16), np.dtype(np.float32)) for _ in range(2))
    memory.write(
        (dark, np.zeros(dark.shape, np.float32)), (bright, np.ones(dark.shape, np.float32))
    )

    def states() -> npt.NDArray[Any]:
        states = session.run({"tower_pixels": dark})["vision_states"]
        assert isinstance(states, DeviceArray)
        return memory.to_host(states)

    def fail_behind(*copies: Any) -> None:
        HostMemory.write(memory, *copies)
        raise OSError("the card is gone")

    expected = states()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "write", fail_behind)
        with pytest.raises(BackendRunError, match="is gone"):
            session.run({"tower_pixels": bright})
    np.testing.assert_array_equal(states(), expected)
    session.close()


def test_a_closed_session_does_not_run(toy_engine: Path, memory: HostMemory) -> None:
    session = OnnxRuntimeCuda(toy_engine, load_manifest(toy_engine), memory).open("vision")
    session.close()
    assert memory.trimmed == 1  # what it freed is the card's again
    session.close()
    with pytest.raises(BackendRunError, match="closed"):
        session.run({"tower_pixels": np.zeros((1, 3, 16, 16), np.float32)})


def test_a_card_that_another_process_fills_is_refused_before_anything_is_loaded(
    toy_engine: Path, memory: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.free_bytes = 1_000
    monkeypatch.setattr(OnnxRuntimeCuda, "open", lambda self, block: pytest.fail("it was loaded"))
    with pytest.raises(DeviceMemoryError, match="GB"):
        MDFClassifier(toy_engine, device="cuda")


def test_a_runtime_without_cuda_says_which_package_to_swap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in = types.ModuleType("onnxruntime")
    vars(stand_in).update(
        __version__="1.31.1", get_available_providers=lambda: ["CPUExecutionProvider"]
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    with pytest.raises(BackendUnavailableError, match="pip uninstall -y onnxruntime"):
        import_with_cuda()


def test_rows_of_a_device_array_are_its_memory() -> None:
    memory = HostMemory()
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)
    array = memory.empty(rows.shape, rows.dtype)
    memory.write((array, rows))
    np.testing.assert_array_equal(memory.to_host(array[1:3]), rows[1:3])
    np.testing.assert_array_equal(memory.to_host(array[1:3][1:2]), rows[2:3])
    joined = concatenate(memory, [array[2:4], array[0:1]])
    np.testing.assert_array_equal(memory.to_host(joined), rows[[2, 3, 0]])
    own = copy_all(memory, {"rows": array})["rows"]
    memory.write((array, np.zeros_like(rows)))
    np.testing.assert_array_equal(memory.to_host(own), rows)


@pytest.mark.parametrize(("together", "copies"), [(True, 1), (False, 2)])
def test_arrays_that_lie_in_one_piece_are_copied_at_once(together: bool, copies: int) -> None:
    memory = HostMemory()
    values = {"a": np.arange(35, dtype=np.float16).reshape(5, 7), "b": np.arange(3, dtype=np.int64)}
    if together:
        arrays = empty_all(memory, {name: (v.shape, v.dtype) for name, v in values.items()})
    else:
        arrays = {name: memory.empty(v.shape, v.dtype) for name, v in values.items()}
    memory.write(*((arrays[name], values[name]) for name in values))
    memory.written.clear()
    own = copy_all(memory, arrays)
    assert len(memory.written) == copies
    memory.write(*((arrays[name], np.zeros_like(values[name])) for name in values))
    for name, array in own.items():
        assert array.pointer % 16 == 0
        np.testing.assert_array_equal(memory.to_host(array), values[name])


def test_what_loading_took_is_given_back_before_anything_is_captured(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def recorded(*args: Any) -> Any:
        session = load_graph(*args)

        def run(bound: Any, options: Any) -> None:
            graph = options.get_run_config_entry("gpu_graph_id")
            shrinks = True
            try:
                options.get_run_config_entry("memory.enable_memory_arena_shrinkage")
            except RuntimeError:  # there is none
                shrinks = False
            runs.append((graph, shrinks))
            session.run_with_iobinding(bound, options)

        return types.SimpleNamespace(io_binding=session.io_binding, run_with_iobinding=run)

    monkeypatch.setattr(onnxruntime_cuda, "load_graph", recorded)
    session = OnnxRuntimeCuda(toy_engine, load_manifest(toy_engine), HostMemory()).open("vision")
    session.run({"tower_pixels": np.ones((1, 3, 16, 16), np.float32)})
    session.close()
    assert runs == [("-1", True), ("1", False), ("1", False)]


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_reproducible_decoder_takes_no_kernel_by_its_time(
    toy_engine: Path, memory: HostMemory, monkeypatch: pytest.MonkeyPatch, reproducible: bool
) -> None:
    configs = []

    def recorded(runtime: Any, config: Mapping[str, str]) -> Any:
        configs.append(config)
        return session_options(runtime, config)

    monkeypatch.setattr(onnxruntime_cuda, "session_options", recorded)
    with MDFClassifier(toy_engine, device="cuda", reproducible=reproducible):
        pass
    timed = [config for config in configs if "ep.cuda.fpa_intb_gemm" in config]
    assert len(configs) == 4
    assert len(timed) == (0 if reproducible else 1)


def test_weights_lie_in_one_piece_where_no_kernel_repacks_them(
    toy_engine: Path, memory: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime does it only with patterns on and repacking off."""
    pieces = {}

    def recorded(*args: Any) -> Any:
        block, options = args[1], args[4]
        try:
            repacks = options.get_session_config_entry("session.disable_prepacking") != "1"
        except RuntimeError:  # there is no such entry
            repacks = True
        pieces[block] = (options.enable_mem_pattern, repacks)
        return load_graph(*args)

    monkeypatch.setattr(onnxruntime_cuda, "load_graph", recorded)
    with MDFClassifier(toy_engine, device="cuda"):
        pass
    one, many = (True, False), (False, True)
    assert pieces == {"vision": one, "unet_encoder": many, "fusion": one, "decoder": many}


def test_a_card_runs_the_fused_graph_where_there_is_one_and_the_processor_never(
    toy_copy: Path, memory: HostMemory, photograph: npt.NDArray[np.uint8]
) -> None:
    plain, fused = toy_copy / "vision.onnx", toy_copy / f"vision.onnx{FUSED_SUFFIX}"
    plain.rename(fused)
    plain.write_bytes(b"no graph")
    manifest = load_manifest(toy_copy)
    digests = {path.name: digest(path) for path in (plain, fused)}
    save_manifest(replace(manifest, files=manifest.files | digests), toy_copy)
    with MDFClassifier(toy_copy, device="cuda") as classifier:
        assert classifier.predict(photograph, TEXTS[0]).scores
    with pytest.raises(BackendRunError, match="vision"):
        MDFClassifier(toy_copy, device="cpu")

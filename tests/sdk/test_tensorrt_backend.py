"""The TensorRT backend against a stand-in for the package and for the card."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mdf_sdk import MDFClassifier, load_manifest, verify_engine
from mdf_sdk.engine import Engine
from mdf_sdk.errors import (
    BackendRunError,
    BackendUnavailableError,
    DeviceMemoryError,
    IntegrityError,
    ManifestError,
)
from mdf_sdk.manifest import BLOCKS, PlanSpec
from mdf_sdk.sessions.device_memory import DeviceArray
from mdf_sdk.sessions.tensorrt import TensorRTBackend

from . import fake_tensorrt
from .fake_tensorrt import Behavior, HostCard, compile_toy

PIXELS = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def behavior(monkeypatch: pytest.MonkeyPatch) -> Behavior:
    """The stand-ins are installed."""
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def compiled(toy_copy: Path, behavior: Behavior) -> Path:
    compile_toy(toy_copy)
    return toy_copy


def open_backend(engine_dir: Path) -> TensorRTBackend:
    return TensorRTBackend(engine_dir, load_manifest(engine_dir), HostCard())


def change_plan(engine_dir: Path, block: str, **changes: object) -> TensorRTBackend:
    """Open an engine of whose manifest a block's last plan is other."""
    manifest = load_manifest(engine_dir)
    plans = list(manifest.plans)
    i = max(i for i, plan in enumerate(plans) if plan.block == block)
    plans[i] = dataclasses.replace(plans[i], **changes)  # type: ignore[arg-type]
    changed = dataclasses.replace(manifest, plans=tuple(plans))
    return TensorRTBackend(engine_dir, changed, HostCard())


def plan_of(engine_dir: Path, block: str) -> PlanSpec:
    return next(plan for plan in load_manifest(engine_dir).plans if plan.block == block)


def test_an_engine_with_plans_is_verified_on_tensorrt(compiled: Path) -> None:
    report = verify_engine(compiled, "tensorrt")
    assert report.ok
    assert (report.device, report.backend) == ("tensorrt", "tensorrt_rtx 1.7.1.116")
    assert max(block.max_error for block in report.blocks) < 1e-5


def test_auto_takes_tensorrt_before_the_others(compiled: Path) -> None:
    with Engine(compiled) as engine:
        assert (engine.backend.device, engine.backend.card) == ("tensorrt", HostCard.card)


@pytest.mark.parametrize("cases", [1, 3])
def test_predictions_are_those_of_the_cpu(
    compiled: Path, photograph: np.ndarray, cases: int
) -> None:
    texts = ["58 years old", "night blindness since childhood", "x"][:cases]
    results = []
    for device in ("cpu", "tensorrt"):
        with MDFClassifier(compiled, device=device, threads=1) as classifier:
            predictions = classifier.predict_batch([photograph] * cases, texts, mask=True)
        results.append(predictions)
    for on_cpu, on_card in zip(*results, strict=True):
        assert on_card.engine.device == "tensorrt"
        assert on_card.probabilities == pytest.approx(on_cpu.probabilities, abs=1e-5)
        for kind, plane in on_cpu.mask.items():
            np.testing.assert_allclose(on_card.mask[kind], plane, atol=1e-5)


def test_the_files_of_a_block_are_its_plans_in_the_order_of_the_manifest(compiled: Path) -> None:
    backend = open_backend(compiled)
    assert backend.files("vision") == ("plans/tensorrt_rtx/vision.0.plan",)
    assert backend.files("decoder") == (
        "plans/tensorrt_rtx/decoder.0.plan",
        "plans/tensorrt_rtx/decoder.1.plan",
    )


def test_an_altered_plan_is_never_given_to_the_package(
    compiled: Path, behavior: Behavior, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        fake_tensorrt.Runtime, "deserialize_cuda_engine", lambda _, data: seen.append(data)
    )
    with (compiled / "plans/tensorrt_rtx/vision.0.plan").open("r+b") as file:
        file.write(b"X")
    with pytest.raises(IntegrityError, match=r"vision\.0\.plan"):
        Engine(compiled, device="tensorrt", blocks=("vision",))
    assert seen == []


def test_a_prompt_is_padded_to_few_lengths_within_the_plans(compiled: Path) -> None:
    with Engine(compiled, device="tensorrt") as engine:
        lengths = range(1, engine.manifest.prompt.max_text_tokens + 1)
        prefix, most = len(engine.prompt.prefix_ids), engine.prompt.count_rows(max(lengths))
        attended = {prefix + engine.text_rows(n) for n in lengths}
        assert attended == {64, 96, prefix + most}
        longest = engine.prompt.encode("x" * 200)
        assert engine.text_tensors([longest])["inputs_embeds"].shape[1] == most


def test_without_plans_the_cure_is_to_compile(toy_copy: Path, behavior: Behavior) -> None:
    with pytest.raises(BackendUnavailableError, match=r"no plans.*played by.*mdf compile ENGINE"):
        open_backend(toy_copy)


def test_plans_for_other_cards_are_refused(toy_copy: Path, behavior: Behavior) -> None:
    compile_toy(toy_copy, capabilities=("8.6", "12.0"))
    words = r"8\.6, 12\.0.*mdf compile ENGINE --package tensorrt_rtx --compute-capability 8\.9"
    with pytest.raises(BackendUnavailableError, match=words):
        open_backend(toy_copy)


def test_plans_of_another_release_are_refused(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_tensorrt, "__version__", "1.8.0.1")
    words = r"found a plan by tensorrt_rtx 1\.7\.1\.116 and tensorrt_rtx 1\.8\.0\.1.*mdf compile"
    with pytest.raises(BackendUnavailableError, match=words):
        open_backend(compiled)


def test_a_missing_package_names_the_extra(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'mdf-mllm\[tensorrt-rtx\]'"):
        open_backend(compiled)


def test_the_plans_of_either_package_will_do(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_toy(compiled, package="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert open_backend(compiled).name == "tensorrt_rtx 1.7.1.116"
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    assert open_backend(compiled).name == "tensorrt 1.7.1.116"
    assert verify_engine(compiled, "tensorrt").ok
    assert not compiled.with_name("engine.cache").exists()  # a thing of TensorRT-RTX
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailableError, match=r"working tensorrt .*working tensorrt_rtx "):
        open_backend(compiled)


def test_a_block_without_a_plan_is_refused(compiled: Path) -> None:
    manifest = load_manifest(compiled)
    plans = tuple(plan for plan in manifest.plans if plan.block != "fusion")
    with pytest.raises(ManifestError, match="block fusion: found no plan that gives"):
        TensorRTBackend(compiled, dataclasses.replace(manifest, plans=plans), HostCard())


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("block", ["decoder", "unet_decoder"])
def test_plans_that_do_not_make_up_their_block_are_refused(
    compiled: Path, block: str, side: str
) -> None:
    tensors = getattr([p for p in load_manifest(compiled).plans if p.block == block][-1], side)
    wrong = (dataclasses.replace(tensors[0], dtype="float16"), *tensors[1:])
    with pytest.raises(ManifestError, match=f"block {block}: found .* Compile it again"):
        change_plan(compiled, block, **{side: wrong})


def test_a_part_that_gives_what_is_known_already_is_refused(compiled: Path) -> None:
    decoder = [plan for plan in load_manifest(compiled).plans if plan.block == "decoder"]
    twice = (*decoder[1].outputs, *decoder[1].inputs)
    with pytest.raises(ManifestError, match=r"decoder: found a plan that gives .*each tensor once"):
        change_plan(compiled, "decoder", outputs=twice)


@pytest.mark.parametrize("what", ["name", "dtype", "shape", "profile"])
def test_a_plan_whose_bindings_the_manifest_does_not_describe_is_refused(
    compiled: Path, what: str
) -> None:
    """The manifest is right about the block; the plan in the file is another."""
    file = compiled / plan_of(compiled, "vision").file
    content = file.read_bytes()
    replaced = {
        "name": content.replace(b'"tower_pixels": {', b'"other_pixels": {'),
        "dtype": content.replace(b'"float32"', b'"float16"', 1),
        "shape": content.replace(b'["batch", 3, 16, 16]', b'["batch", 3, 99, 16]'),
        "profile": content.replace(b'["batch", 3', b'["tokens", 3'),
    }[what]
    assert replaced != content
    file.write_bytes(replaced)
    with pytest.raises(ManifestError, match=r"block vision: found (tower|other)_pixels of plans/"):
        open_backend(compiled).open("vision")


@pytest.mark.parametrize("method", ["deserialize_cuda_engine", "create_execution_context"])
def test_what_the_package_says_of_a_failed_load_is_told(
    compiled: Path, behavior: Behavior, method: str
) -> None:
    behavior.fails = method
    words = rf"block vision: TensorRT could not load it .*{method} went wrong.*--device tensorrt"
    with pytest.raises(BackendRunError, match=words):
        open_backend(compiled).open("vision")


@pytest.mark.parametrize("method", ["set_input_shape", "execute_async_v3"])
def test_a_failed_run_is_told_and_the_next_one_works(
    compiled: Path, behavior: Behavior, method: str
) -> None:
    session = open_backend(compiled).open("unet_encoder")
    behavior.fails = method
    with pytest.raises(BackendRunError, match=f"unet_encoder: .*run it.*{method} went wrong"):
        session.run({"unet_pixels": PIXELS[:1]})
    behavior.fails = ""
    assert session.run({"unet_pixels": PIXELS[:1]}).keys() >= {"skip_0", "bottleneck"}


def test_memory_in_use_is_waited_for_when_a_run_fails(compiled: Path, behavior: Behavior) -> None:
    session = open_backend(compiled).open("unet_encoder")
    behavior.fails = "execute_async_v3"
    with pytest.raises(BackendRunError):
        session.run({"unet_pixels": PIXELS[:1]})
    assert behavior.waits == 1


@pytest.mark.parametrize("method", ["deserialize_cuda_engine", "execute_async_v3"])
def test_too_little_memory_is_its_own_error(
    compiled: Path, behavior: Behavior, method: str
) -> None:
    behavior.fails, behavior.code = method, "FAILED_ALLOCATION"
    with pytest.raises(DeviceMemoryError, match=r"8\.0 GB free of the card's 8\.0.*went wrong"):
        open_backend(compiled).open("vision").run({"tower_pixels": PIXELS[:1, :, :16, :16]})


@pytest.mark.parametrize(
    ("diagnostics", "error", "words"),
    [
        (5, BackendUnavailableError, r"\(VERSION_MISMATCH, OLD_CUDA_DRIVER\).*mdf compile"),
        (16, DeviceMemoryError, "INSUFFICIENT_GPU_MEMORY"),
    ],
)
def test_a_plan_is_asked_for_its_validity_before_it_is_loaded(
    compiled: Path, behavior: Behavior, diagnostics: int, error: type[Exception], words: str
) -> None:
    behavior.diagnostics, behavior.fails = diagnostics, "deserialize_cuda_engine"
    with pytest.raises(error, match=words):
        open_backend(compiled).open("vision")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((9, 3, 32, 32), "found batch = 9, expected 1 to 8"),
        ((1, 3, 32, 31), r"unet_pixels: found \(1, 3, 32, 31\)"),
        ((1, 3, 32), r"unet_pixels: found \(1, 3, 32\)"),
    ],
)
def test_a_shape_outside_the_plans_is_refused(
    compiled: Path, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(BackendRunError, match=words):
        open_backend(compiled).open("unet_encoder").run({"unet_pixels": np.zeros(shape, "f4")})


def test_inputs_that_disagree_on_a_free_dimension_are_refused(compiled: Path) -> None:
    spec = load_manifest(compiled).blocks["unet_decoder"]
    inputs = {t.name: np.zeros((1, *t.shape[1:]), "f4") for t in spec.inputs}  # type: ignore[arg-type]
    inputs["pooled"] = np.zeros((2, *inputs["pooled"].shape[1:]), "f4")
    with pytest.raises(BackendRunError, match=r"pooled: found \(2, .*expected \('batch'"):
        open_backend(compiled).open("unet_decoder").run(inputs)


def test_a_single_case_runs_at_the_same_addresses_and_its_outputs_stay(
    compiled: Path, behavior: Behavior
) -> None:
    backend = open_backend(compiled)
    session = backend.open("unet_encoder")
    first = session.run({"unet_pixels": PIXELS[:1]})["skip_3"]
    before = backend.to_host(first)
    second = session.run({"unet_pixels": PIXELS[1:2]})["skip_3"]
    assert isinstance(first, DeviceArray)
    assert behavior.replays == 1
    np.testing.assert_array_equal(backend.to_host(first), before)
    assert np.abs(backend.to_host(second) - before).max() > 0.01


def test_two_lengths_of_text_do_not_disturb_each_other(compiled: Path, behavior: Behavior) -> None:
    with Engine(compiled, device="tensorrt") as engine:
        spec = engine.manifest.blocks["decoder"]
        known = {
            t.name: np.ones((1, *t.shape[1:]), "f4")  # type: ignore[arg-type]
            for t in spec.inputs
            if t.name.startswith("cross_")
        }
        scores = []
        for text in ("x", "x" * 60, "x", "x" * 60):
            texts = engine.text_tensors([engine.prompt.encode(text)])
            output = engine.run("decoder", known | texts)["scores"]
            scores.append(engine.backend.to_host(output))
    np.testing.assert_array_equal(scores[0], scores[2])
    np.testing.assert_array_equal(scores[1], scores[3])
    assert np.abs(scores[0] - scores[1]).max() > 0
    assert behavior.replays >= 2


def test_scratch_memory_grows_to_the_largest_run_and_is_shared_by_the_parts(
    compiled: Path, behavior: Behavior
) -> None:
    session = open_backend(compiled).open("unet_encoder")
    for batch in (1, 8, 2):
        session.run({"unet_pixels": PIXELS[:batch]})
    assert behavior.sizes == [1000, 8000, 8000]


def test_a_closed_session_does_not_run(compiled: Path) -> None:
    session = open_backend(compiled).open("vision")
    session.close()
    session.close()
    with pytest.raises(BackendRunError, match="it is closed"):
        session.run({"tower_pixels": np.zeros((1, 3, 16, 16), np.float32)})


def test_compiled_kernels_are_kept_beside_the_engine(compiled: Path, behavior: Behavior) -> None:
    for _ in range(2):
        session = open_backend(compiled).open("unet_encoder")
        for batch in (1, 2, 2):
            session.run({"unet_pixels": PIXELS[:batch]})
    assert behavior.compiled == [(1, 3, 32, 32), (2, 3, 32, 32)]
    (kept,) = compiled.with_name("engine.cache").iterdir()
    assert kept.name == "tensorrt_rtx-8.9-unet_encoder.bin"
    assert behavior.deserialized == [kept.read_bytes()]


@pytest.mark.skipif(os.name == "nt", reason="has no such permissions")
def test_kernels_that_another_account_can_write_are_not_read(
    compiled: Path, behavior: Behavior
) -> None:
    open_backend(compiled).open("vision").run({"tower_pixels": PIXELS[:1, :, :16, :16]})
    (kept,) = compiled.with_name("engine.cache").iterdir()
    kept.chmod(0o666)
    open_backend(compiled).open("vision")
    assert behavior.deserialized == []


def test_an_engine_on_its_own_needs_no_place_for_a_cache(
    compiled: Path, behavior: Behavior, tmp_path: Path
) -> None:
    compiled.with_name("engine.cache").write_bytes(b"a file is in the way")
    assert verify_engine(compiled, "tensorrt").ok


def test_the_memory_of_the_card_is_told(compiled: Path) -> None:
    backend = TensorRTBackend(compiled, load_manifest(compiled), HostCard(3, 10))
    assert backend.device_bytes() == 7
    assert backend.free_and_total_bytes() == (3, 10)


def test_every_block_has_a_file(compiled: Path) -> None:
    backend = open_backend(compiled)
    assert all((compiled / name).is_file() for block in BLOCKS for name in backend.files(block))


def test_the_engine_moves_with_its_name(compiled: Path, tmp_path: Path) -> None:
    """The cache is found by the directory's name, whatever way the path is written."""
    other = Path(shutil.copytree(compiled, tmp_path / "other"))
    pixels = {"tower_pixels": PIXELS[:1, :, :16, :16]}
    open_backend(other / "." / ".." / "other").open("vision").run(pixels)
    assert (tmp_path / "other.cache").is_dir()

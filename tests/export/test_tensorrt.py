"""Every graph compiles with the real TensorRT-RTX compiler; running a plan needs a card."""

import contextlib
import ctypes
import dataclasses
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import tensorrt_rtx
from onnx import helper

from mdf_export import build_engine
from mdf_export.recipe import ExportRecipe
from mdf_export.tensorrt import compile_engine, install_plans, plans_workspace, shape_profile
from mdf_sdk import (
    EngineError,
    IntegrityError,
    Manifest,
    MDFError,
    MissingExtraError,
    StorageError,
    check_files,
    load_manifest,
)
from mdf_sdk.errors import BackendError, BackendUnavailableError, InputError
from mdf_sdk.integrity import digest
from mdf_sdk.manifest import BLOCKS, PlanSpec, save_manifest
from mdf_sdk.prompt import EncodedText, PromptEncoder

THREE_CARDS = ("8.6", "8.9", "12.0")
ALL_CARDS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@pytest.fixture
def copy(int4_engine: Path, tmp_path: Path) -> Path:
    """To be compiled, or damaged."""
    return Path(shutil.copytree(int4_engine, tmp_path / "engine"))


@pytest.fixture(scope="module")
def compiled(int4_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled for three card families, the decoder in parts of three layers; not to be changed."""
    folder = Path(shutil.copytree(int4_engine, tmp_path_factory.mktemp("compiled") / "engine"))
    compile_engine(folder, layers_per_plan=3)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def change(folder: Path, **changes: Any) -> None:
    """Save the manifest anew, with other values and the digests of the files as they are now."""
    manifest = load_manifest(folder)
    files = {name: digest(folder / name) for name in manifest.files}
    save_manifest(dataclasses.replace(manifest, files=files, **changes), folder)


def size_of_plans(folder: Path) -> int:
    manifest = load_manifest(folder)
    return sum(manifest.files[plan.file].bytes for plan in manifest.plans)


def test_an_engine_for_processors_is_refused_before_a_compiler_sees_it(
    w8a8_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    before = sorted(path.name for path in w8a8_engine.iterdir())
    with pytest.raises(InputError, match=r"found an engine in w8a8.*--precision int4"):
        compile_engine(w8a8_engine)
    assert sorted(path.name for path in w8a8_engine.iterdir()) == before


def test_every_block_compiles_for_three_card_families(compiled: Path) -> None:
    manifest = load_manifest(compiled)
    check_files(compiled, manifest)
    assert [p.block for p in manifest.plans] == [
        *("vision", "unet_encoder", "fusion", "decoder", "decoder", "decoder", "unet_decoder")
    ]
    for plan in manifest.plans:
        assert plan.compute_capabilities == ("8.6", "8.9", "12.0")
        assert plan.builder == f"tensorrt_rtx {tensorrt_rtx.__version__}"
        assert manifest.files[plan.file].bytes > 100_000
        assert plan.build_s > 0


def test_the_portable_engine_stays_as_it_was(int4_engine: Path, compiled: Path) -> None:
    before, after = contents(int4_engine), contents(compiled)
    assert before.pop("manifest.json") != after.pop("manifest.json")
    assert before.items() <= after.items()


def test_the_plans_of_a_block_take_and_give_what_its_graph_does(compiled: Path) -> None:
    manifest = load_manifest(compiled)
    for block in BLOCKS:
        spec = manifest.blocks[block]
        known, given = set(spec.inputs), set()
        for plan in (plan for plan in manifest.plans if plan.block == block):
            assert set(plan.inputs) <= known
            known.update(plan.outputs)
            given.update(plan.outputs)
        assert given >= set(spec.outputs)


def test_plans_for_three_families_share_their_weights(copy: Path, compiled: Path) -> None:
    compile_engine(copy, compute_capabilities=["8.9"], layers_per_plan=3)
    assert size_of_plans(compiled) < 1.02 * size_of_plans(copy)


@pytest.mark.parametrize("words", ["shortest", "longest"])
def test_the_profile_holds_every_prompt_that_can_be_packed(int4_engine: Path, words: str) -> None:
    manifest = load_manifest(int4_engine)
    tokenizer_json = (int4_engine / "tokenizer.json").read_text(encoding="utf-8")
    encoder = PromptEncoder(tokenizer_json, manifest.prompt, manifest.labels)
    tokens = 1 if words == "shortest" else manifest.prompt.max_text_tokens
    packed = encoder.pack([EncodedText((5,) * tokens, 0)])
    rows = packed.input_ids.shape[1]
    profile, bound = shape_profile(int4_engine, manifest), 0 if words == "shortest" else 2
    assert profile["S"][bound] == rows
    assert profile["T"][bound] == rows - packed.prefix_length
    assert all(low <= typical <= high for low, typical, high in profile.values())


def test_compiling_again_replaces_the_plans(copy: Path) -> None:
    compile_engine(copy, compute_capabilities=["8.9"], layers_per_plan=4)
    (copy / "plans" / "left_by_a_kill").write_bytes(b"half a plan")
    manifest = compile_engine(copy, compute_capabilities=["8.6"])
    assert len(manifest.plans) == 5
    assert {plan.compute_capabilities for plan in manifest.plans} == {("8.6",)}
    assert contents(copy).keys() == manifest.files.keys() | {"manifest.json"}
    check_files(copy, load_manifest(copy))


@pytest.mark.parametrize(
    ("recipe", "wanted", "capabilities"),
    [
        (ExportRecipe("fp16"), ALL_CARDS, ALL_CARDS),
        (ExportRecipe("int8", vision_precision="int8", method="rtn"), None, THREE_CARDS),
        (
            ExportRecipe("fp16", vision_precision="fp8", calibration="synthetic:8:5"),
            None,
            ("8.9", "12.0"),
        ),
    ],
    ids=["fp16", "int8", "fp8"],
)
def test_every_precision_compiles_for_the_cards_that_have_it(
    tiny_checkpoint: Path,
    tmp_path: Path,
    recipe: ExportRecipe,
    wanted: tuple[str, ...] | None,
    capabilities: tuple[str, ...],
) -> None:
    build_engine(tiny_checkpoint, tmp_path / "engine", recipe)
    manifest = compile_engine(tmp_path / "engine", compute_capabilities=wanted)
    assert {plan.compute_capabilities for plan in manifest.plans} == {capabilities}


def test_a_graph_that_the_compiler_refuses_is_named_with_its_words(
    tiny_engine: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    before = contents(folder)
    with pytest.raises(BackendError, match=r"vision: .*could not compile.*Attention.*mdf export"):
        compile_engine(folder)
    assert contents(folder) == before


@pytest.mark.slow
def test_smol_135m_compiles(tmp_path: Path) -> None:
    from mdf_training.checkpoint import Checkpoint, save_checkpoint
    from mdf_training.config import load_preset
    from mdf_training.model import build_model
    from mdf_training.tokenizer import load_tokenizer

    model = build_model("smol-135m").eval()
    provenance = {"notice": "Untrained, for tests.", "history": []}
    checkpoint = Checkpoint(model, load_tokenizer(load_preset("smol-135m")), provenance)
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    build_engine(tmp_path / "checkpoint", tmp_path / "engine", ExportRecipe("int4", method="rtn"))
    manifest = compile_engine(tmp_path / "engine")
    assert [plan.block for plan in manifest.plans] == list(BLOCKS)
    # Weights of 124 MB and their kernels.
    assert 124e6 < size_of_plans(tmp_path / "engine") < 200e6
    check_files(tmp_path / "engine", manifest)


def test_a_node_that_the_parser_refuses_is_named(copy: Path) -> None:
    model = onnx.load(copy / "unet_encoder.onnx", load_external_data=False)
    node = helper.make_node("Det", ["skip_0"], ["lost"], name="/unet_encoder/determinant")
    model.graph.node.append(node)
    onnx.save(model, copy / "unet_encoder.onnx")
    change(copy)
    before = contents(copy)
    with pytest.raises(BackendError, match=r"unet_encoder: .*'/unet_encoder/determinant'.*Det"):
        compile_engine(copy)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        (["9.0"], r"found 9\.0, expected .*one of: 8\.0, 8\.6, 8\.9, 12\.0, 12\.1"),
        (["8.6", "seven"], "found seven"),
        (["7.5"], "found 7.5, expected .*int4 weights, as in fusion"),
        ([], "found none"),
    ],
)
def test_a_card_that_cannot_be_compiled_for_is_refused(
    copy: Path, capabilities: list[str], words: str
) -> None:
    before = contents(copy)
    with pytest.raises(InputError, match=words):
        compile_engine(copy, compute_capabilities=capabilities)
    assert contents(copy) == before


def test_the_compiler_is_told_every_card(copy: Path) -> None:
    blocks = load_manifest(copy).blocks
    hidden = {name: dataclasses.replace(spec, precision="fp16") for name, spec in blocks.items()}
    change(copy, blocks=hidden)  # else we would refuse the card ourselves
    with pytest.raises(BackendError, match=r"fusion: .*Cannot compile for target\(s\) sm75.*int4"):
        compile_engine(copy, compute_capabilities=["8.6", "7.5"])


def test_a_graph_that_its_manifest_does_not_describe_is_refused(copy: Path) -> None:
    manifest = load_manifest(copy)
    vision = manifest.blocks["vision"]
    (output,) = vision.outputs
    wrong = dataclasses.replace(vision, outputs=(dataclasses.replace(output, shape=("B", 3, 3)),))
    change(copy, blocks={**manifest.blocks, "vision": wrong})
    with pytest.raises(EngineError, match="vision: found the outputs"):
        compile_engine(copy)


def test_a_free_dimension_without_bounds_is_refused(copy: Path) -> None:
    manifest = load_manifest(copy)
    vision = manifest.blocks["vision"]
    (pixels,) = vision.inputs
    free = dataclasses.replace(pixels, shape=("batch", *pixels.shape[1:]))
    wrong = dataclasses.replace(vision, inputs=(free,))
    change(copy, blocks={**manifest.blocks, "vision": wrong})
    with pytest.raises(EngineError, match="vision: found the free dimensions batch"):
        compile_engine(copy)


def test_a_damaged_engine_is_not_compiled(copy: Path) -> None:
    with (copy / "vision.onnx.data").open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(IntegrityError, match=r"vision\.onnx\.data"):
        compile_engine(copy)


@pytest.mark.parametrize("layers", [0, -1])
def test_a_plan_has_a_layer_at_least(int4_engine: Path, layers: int) -> None:
    with pytest.raises(InputError, match=f"found {layers}"):
        compile_engine(int4_engine, layers_per_plan=layers)


def test_an_unknown_package_is_refused(int4_engine: Path) -> None:
    with pytest.raises(InputError, match="found 'tensor', expected one of tensorrt_rtx, tensorrt"):
        compile_engine(int4_engine, package="tensor")  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["tensorrt_rtx", "tensorrt"])
def test_a_package_that_is_not_installed_is_named(
    int4_engine: Path, monkeypatch: pytest.MonkeyPatch, package: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"{package}: could not be imported.*Install it"):
        compile_engine(int4_engine, package=package)


def no_driver(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def test_full_tensorrt_says_that_it_needs_a_card(
    int4_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    with pytest.raises(BackendUnavailableError, match=r"no NVIDIA card.*--package tensorrt_rtx"):
        compile_engine(int4_engine, package="tensorrt")


def test_full_tensorrt_compiles_for_the_card_of_the_machine(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX under the other's name: the API is the same, and the card is made up."""
    folder = Path(shutil.copytree(compiled, tmp_path / "engine"))
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    monkeypatch.setattr("mdf_export.tensorrt._own_capability", lambda: "9.0")
    with pytest.raises(InputError, match=r"found 8\.9, expected of tensorrt .* one of: 9\.0"):
        compile_engine(folder, package="tensorrt", compute_capabilities=["8.9"])
    manifest = compile_engine(folder, package="tensorrt")
    by_package = {plan.builder.split()[0]: plan.compute_capabilities for plan in manifest.plans}
    assert by_package == {"tensorrt_rtx": ("8.6", "8.9", "12.0"), "tensorrt": ("9.0",)}
    check_files(folder, load_manifest(folder))


def test_a_full_disk_leaves_the_engine_as_it_was(copy: Path) -> None:
    before = contents(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(StorageError, match="The engine is as it was"):
            compile_engine(copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(copy) == before


class KilledError(BaseException):
    """What stands for the end of the process: no later change of the disk gets through."""


def kill_at(monkeypatch: pytest.MonkeyPatch, boundary: int) -> Callable[[], int]:
    """Let `boundary` changes of the disk's names through; return how many were tried."""
    tried = 0

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def change_names(*args: Any, **kwargs: Any) -> Any:
            nonlocal tried
            tried += 1
            if tried > boundary:
                raise KilledError
            return real(*args, **kwargs)

        return change_names

    for name in ("replace", "rename", "mkdir", "unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, counted(name))
    return lambda: tried


def install(folder: Path, content: bytes) -> Manifest:
    """Install two plans of these bytes."""
    manifest = load_manifest(folder)
    with plans_workspace(folder) as workspace:
        plans = []
        for block in ("vision", "unet_encoder"):
            name = f"{block}.{content.hex()}.plan"
            (workspace / name).write_bytes(content)
            spec = manifest.blocks[block]
            plan = PlanSpec(
                block=block,
                file=f"plans/tensorrt_rtx/{name}",
                builder="tensorrt_rtx 1",
                compute_capabilities=("8.9",),
                inputs=spec.inputs,
                outputs=spec.outputs,
                profile={"B": (1, 1, 8)},
                build_s=0.0,
            )
            plans.append((plan, digest(workspace / name)))
        return install_plans(folder, manifest, "tensorrt_rtx", plans, workspace)


def test_a_kill_at_any_moment_leaves_the_old_plans_or_the_new(
    int4_engine: Path, tmp_path: Path
) -> None:
    boundary = 0
    seen = set()
    while True:
        folder = Path(shutil.copytree(int4_engine, tmp_path / f"engine{boundary}"))
        old = install(folder, b"old")
        with pytest.MonkeyPatch.context() as monkeypatch:
            tried = kill_at(monkeypatch, boundary)
            with contextlib.suppress(KilledError):
                install(folder, b"new")
        manifest = load_manifest(folder)
        check_files(folder, manifest)
        seen.add(manifest == old)
        last = install(folder, b"last")
        assert contents(folder).keys() == last.files.keys() | {"manifest.json"}
        shutil.rmtree(folder)
        if tried() <= boundary:
            break
        boundary += 1
    assert boundary >= 8
    assert seen == {True, False}


def test_errors_are_ours(int4_engine: Path) -> None:
    with pytest.raises(MDFError, match="mdf export CHECKPOINT ENGINE"):
        compile_engine(int4_engine / "nowhere")

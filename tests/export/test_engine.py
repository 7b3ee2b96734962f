"""mdf_export.engine: a checkpoint becomes an engine directory, whole or not at all."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdf_export import build_engine
from mdf_export import engine as engine_module
from mdf_export.engine import Target
from mdf_export.gptq_checkpoint import GptqCheckpoint
from mdf_export.planning import plan_checkpoint, plan_preset
from mdf_export.proof.constants import compare_graphs
from mdf_export.quantize import pack_int4, round_to_nearest
from mdf_export.recipe import ExportRecipe
from mdf_export.resuming import resumed_directory
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk import MDFClassifier, load_manifest
from mdf_sdk.errors import (
    CheckpointError,
    DataError,
    InputError,
    MissingExtraError,
    StorageError,
)
from mdf_sdk.manifest import (
    BLOCKS,
    FUSED_SUFFIX,
    PROCESSORS_ALONE,
    Precision,
    QuantizationMethod,
)
from mdf_sdk.verify import verify_engine
from mdf_training.checkpoint import checkpoint_digest, load_checkpoint, save_checkpoint
from mdf_training.data.folder import open_data, save_data
from mdf_training.data.pixels import PixelSet
from mdf_training.data.synthetic import SyntheticData
from mdf_training.evaluation.checkpoint_scorer import CheckpointScorer


@pytest.mark.parametrize("kind", ["tiny", "skip"])
def test_an_engine_scores_as_its_checkpoint_does(kind: str, request: pytest.FixtureRequest) -> None:
    scorer = CheckpointScorer.open(request.getfixturevalue(f"{kind}_checkpoint"))
    data = SyntheticData(4, 11)
    cases = [PixelSet(data, scorer.image, ())[i] for i in range(4)]
    tower, unet = (
        np.stack([c.tower_pixels for c in cases]),
        np.stack([c.unet_pixels for c in cases]),
    )
    texts = [c.row.text for c in cases]
    expected = scorer.score(tower, unet, texts)
    with MDFClassifier(request.getfixturevalue(f"{kind}_engine")) as classifier:
        np.testing.assert_allclose(classifier.score(tower, unet, texts), expected, atol=1e-4)
        predictions = [classifier.predict(data[i].image, text) for i, text in enumerate(texts)]
        found = [list(prediction.scores.values()) for prediction in predictions]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        np.testing.assert_allclose(
            classifier.text_only_scores(texts), scorer.text_only_scores(texts), atol=1e-4
        )


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("tiny", "fp32"),
        ("tiny", "fp16"),
        ("tiny", "int8"),
        ("tiny", "int4"),
        ("tiny", "w8a8"),
        ("skip", "int4"),
    ],
)
def test_a_fresh_engine_verifies(
    kind: str, precision: Precision, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    build_engine(request.getfixturevalue(f"{kind}_checkpoint"), tmp_path / "engine", precision)
    report = verify_engine(tmp_path / "engine")
    assert report.ok, report


def test_the_manifest_says_where_the_engine_comes_from(
    tiny_checkpoint: Path, tiny_engine: Path
) -> None:
    manifest = load_manifest(tiny_engine)
    config = load_checkpoint(tiny_checkpoint).config
    assert manifest.checkpoint == checkpoint_digest(tiny_checkpoint)
    assert manifest.notice == "Random weights, for tests."
    assert (manifest.labels, manifest.image, manifest.prompt) == (
        config.labels,
        config.image,
        config.prompt,
    )
    assert set(manifest.files) == {p.name for p in tiny_engine.iterdir()} - {"manifest.json"}


def test_a_target_that_is_taken_is_refused_and_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty directory"):
        build_engine(tiny_checkpoint, tmp_path / "engine", "fp32")
    assert (tmp_path / "engine" / "notes.txt").read_text() == "mine"


def test_an_unknown_precision_is_refused_with_the_known_ones(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match="found 'int3', expected one of fp32, fp16, int8, int4, w8a8"
    ):
        build_engine(tiny_checkpoint, tmp_path / "engine", "int3")  # type: ignore[arg-type]


def test_a_folder_without_a_checkpoint_is_refused_with_the_command_that_makes_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError, match="mdf train"):
        build_engine(tmp_path / "none", tmp_path / "engine", "fp32")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("recipe", ["fp32", "int4", "w8a8"])
def test_two_exports_hold_the_same_bytes(
    tiny_checkpoint: Path, tmp_path: Path, recipe: Precision
) -> None:
    for name in ("first", "second"):
        build_engine(tiny_checkpoint, tmp_path / name, recipe)
    first, second = (tmp_path / name for name in ("first", "second"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for_card = any(name.endswith(FUSED_SUFFIX) for name in names)
    assert for_card == (recipe not in PROCESSORS_ALONE)


def test_the_plan_is_what_the_engine_holds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Weights alone: what is left over is a graph's nodes, and the gaps that align tensors."""
    recipe = ExportRecipe("int4", method="rtn")
    plan = plan_checkpoint(tiny_checkpoint, recipe)
    build_engine(tiny_checkpoint, tmp_path / "engine", recipe)
    for name, planned in plan.blocks.items():
        graph = onnx.load(tmp_path / "engine" / f"{name}.onnx", load_external_data=False).graph
        held = sum(_bytes(tensor) for tensor in graph.initializer)
        assert planned == pytest.approx(held, rel=0.02), name


def test_the_11b_plan_needs_no_weights_and_fits_an_8_gb_card() -> None:
    plan = plan_preset("llama-3.2-11b", ExportRecipe("int4"))
    assert plan.device_bytes <= 6.5e9
    assert plan.blocks["decoder"] == pytest.approx(4.88e9, rel=0.01)


def _bytes(tensor: onnx.TensorProto) -> int:
    kinds = onnx.TensorProto
    bits = {kinds.INT4: 4, kinds.INT8: 8, kinds.FLOAT16: 16, kinds.FLOAT: 32, kinds.INT64: 64}
    return int(np.prod(tensor.dims)) * bits[tensor.data_type] // 8


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_an_export_goes_on_where_it_was_interrupted(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed again and again at the seventh file that it finishes, it ends in the same bytes."""
    recipe = ExportRecipe("int4", calibration_cases=8)
    build_engine(tiny_checkpoint, tmp_path / "whole", recipe)
    replace, kills = Path.replace, 0

    def die(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", die)
    while not (tmp_path / "engine").exists():
        left = 7
        try:
            build_engine(tiny_checkpoint, tmp_path / "engine", recipe)
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 8  # 60 linears and more
    assert files_below(tmp_path / "engine") == files_below(tmp_path / "whole")
    assert load_manifest(tmp_path / "engine") == load_manifest(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine", "whole"]


def test_what_is_calibrated_already_is_not_calibrated_again(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ExportRecipe("int4", calibration_cases=8)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "save_golden", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_engine(tiny_checkpoint, tmp_path / "engine", recipe)
    monkeypatch.setattr(engine_module, "calibrate", interrupt)
    build_engine(tiny_checkpoint, tmp_path / "engine", recipe)
    assert verify_engine(tmp_path / "engine").ok


def test_an_interrupted_export_of_another_recipe_is_not_gone_on_with(
    tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "save_golden", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_engine(tiny_checkpoint, tmp_path / "engine", "fp16")
    build_engine(tiny_checkpoint, tmp_path / "engine", "fp32")
    assert load_manifest(tmp_path / "engine").files == load_manifest(tiny_engine).files


def test_two_exports_into_one_target_at_once_are_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with resumed_directory(tmp_path / "engine", "another export") as work:
        (work / "result" / "file").touch()
        with pytest.raises(InputError, match="found another process that is making it"):
            build_engine(tiny_checkpoint, tmp_path / "engine", "fp32")
    assert files_below(tmp_path) == ["engine", "engine/file"]


def test_a_full_disk_is_told_before_the_work_begins(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(StorageError, match=r"found 0.0 GB free, expected .* GB"):
        build_engine(tiny_checkpoint, tmp_path / "engine", "fp32")
    assert files_below(tmp_path) == []


def test_a_disk_that_fills_up_is_a_typed_error_and_the_next_try_goes_on(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "save_golden", fill)
        with pytest.raises(
            StorageError, match=r"No space left on device.*goes on where it stopped"
        ):
            build_engine(tiny_checkpoint, tmp_path / "engine", "fp32")
    assert not (tmp_path / "engine").exists()
    build_engine(tiny_checkpoint, tmp_path / "engine", "fp32")
    assert verify_engine(tmp_path / "engine").ok


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    tiny_checkpoint: Path, tmp_path: Path, value: float
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        checkpoint.model.fusion[2].q_proj.weight[1, 2] = value
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in fusion\.2\.q_proj\.weight"):
        build_engine(tmp_path / "checkpoint", tmp_path / "engine", "int4")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("change", ["missing", "reshaped", "unknown"])
def test_a_tensor_that_does_not_fit_is_named_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    path, name = tmp_path / "checkpoint" / "model.safetensors", "fusion.0.o_proj.weight"
    tensors = load_file(path)
    if change == "unknown":
        name = "fusion.9.gate"
        tensors[name] = torch.zeros(1)
    elif change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        build_engine(tmp_path / "checkpoint", tmp_path / "engine", "int4")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("spec", ["synthetic:1:0", "synthetic:0:0"])
def test_too_small_a_calibration_set_is_refused_and_nothing_is_left(
    tiny_checkpoint: Path, tmp_path: Path, spec: str
) -> None:
    with pytest.raises(DataError, match="cases, expected at least"):
        build_engine(tiny_checkpoint, tmp_path / "e", ExportRecipe("int4", calibration=spec))
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "precision", "error", "words"),
    [
        ("tensorrt", "int4", MissingExtraError, "tensorrt"),
        ("tensorrt-rtx", "fp32", InputError, "found fp32 .* expected fp16, int8 or int4"),
        ("tensorrt-rtx", "w8a8", InputError, "found w8a8 .* expected fp16, int8 or int4"),
        ("cuda", "int4", InputError, "found cuda, expected some of onnx, tensorrt-rtx, tensorrt"),
    ],
)
def test_a_target_that_cannot_be_built_is_told_before_anything_is_written(
    tiny_checkpoint: Path,
    tmp_path: Path,
    target: Target,
    precision: Precision,
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        build_engine(tiny_checkpoint, tmp_path / "e", precision, targets=("onnx", target))
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("kind", ["tiny", "skip"])
def test_an_engine_is_exported_with_its_plans(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    recipe, targets = ExportRecipe("int4", method="rtn"), ("onnx", "tensorrt-rtx")
    manifest = build_engine(checkpoint, tmp_path / "engine", recipe, targets=targets)
    assert {plan.block for plan in manifest.plans} == set(BLOCKS)
    assert load_manifest(tmp_path / "engine") == manifest
    assert verify_engine(tmp_path / "engine").ok


def write_gptq_checkpoint(checkpoint_dir: Path, folder: Path, order: torch.Tensor) -> str:
    """Quantize one linear of a checkpoint and write it as auto-gptq does; return its name."""
    name = "model.language_model.layers.0.mlp.down_proj"
    linear = load_checkpoint(checkpoint_dir).model.backbone.get_submodule(name)
    quantized = round_to_nearest(linear.weight.detach()[:, order], bits=4, block_size=32)
    k, n = quantized.codes.shape
    groups = torch.empty(k, dtype=torch.int32)
    groups[order] = torch.arange(k, dtype=torch.int32) // 32
    codes = torch.empty(k, n, dtype=torch.int64)
    codes[order] = quantized.codes.long() + 8
    shifts = torch.arange(8) * 4
    packed = (codes.reshape(k // 8, 8, n) << shifts[None, :, None]).sum(1)
    tensors = {
        "qweight": packed.to(torch.uint32).view(torch.int32),
        "qzeros": torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32),
        "scales": quantized.scales.half(),
        "g_idx": groups,
    }
    folder.mkdir()
    save_file({f"{name}.{part}": t for part, t in tensors.items()}, folder / "model.safetensors")
    settings = {"bits": 4, "group_size": 32, "sym": True, "desc_act": True, "quant_method": "gptq"}
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    return name


def test_an_interrupted_export_with_other_weights_of_gptq_is_not_gone_on_with(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def build(engine: str) -> None:
        build_engine(
            tiny_checkpoint,
            tmp_path / engine,
            ExportRecipe("int4", method="rtn"),
            gptq_checkpoint=tmp_path / "gptq",
        )

    write_gptq_checkpoint(tiny_checkpoint, tmp_path / "gptq", torch.arange(256))
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "save_golden", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build("engine")
    (tmp_path / "gptq").rename(tmp_path / "gptq-before")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    write_gptq_checkpoint(tiny_checkpoint, tmp_path / "gptq", order)
    build("engine")
    build("anew")
    assert load_manifest(tmp_path / "engine") == load_manifest(tmp_path / "anew")


def test_an_interrupted_export_with_other_calibration_cases_is_not_gone_on_with(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand under the same name: only their content tells."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    data = tmp_path / "data"
    recipe = ExportRecipe("int4", calibration=str(data), calibration_cases=8)
    save_data(open_data("synthetic:8:1"), data)
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "save_golden", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_engine(tiny_checkpoint, tmp_path / "engine", recipe)
    shutil.rmtree(data)
    save_data(open_data("synthetic:8:2"), data)
    for name in ("engine", "anew"):
        build_engine(tiny_checkpoint, tmp_path / name, recipe)
    assert load_manifest(tmp_path / "engine") == load_manifest(tmp_path / "anew")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_gptq_quantized_already_are_taken_as_they_are(
    tiny_checkpoint: Path, tmp_path: Path, method: QuantizationMethod, act_order: bool
) -> None:
    order = torch.arange(256)
    if act_order:
        order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    name = write_gptq_checkpoint(tiny_checkpoint, tmp_path / "gptq", order)
    recipe = ExportRecipe("int4", method=method, calibration_cases=8)
    build_engine(tiny_checkpoint, tmp_path / "e", recipe, gptq_checkpoint=tmp_path / "gptq")
    given = GptqCheckpoint(tmp_path / "gptq")[f"backbone.{name}"]
    graph = onnx.load(tmp_path / "e" / "decoder.onnx").graph
    held = {t.name: t for t in graph.initializer}["/decoder/layers.0/mlp/down_proj/weight"]
    assert held.raw_data == pack_int4(given.codes).numpy().tobytes()
    assert ("/decoder/layers.0/mlp/down_proj/Gather" in {n.name for n in graph.node}) == act_order
    assert verify_engine(tmp_path / "e").ok
    checkpoint = StreamedCheckpoint.open(tiny_checkpoint)
    decoder = compare_graphs(tmp_path / "e", load_manifest(tmp_path / "e"), checkpoint)["decoder"]
    assert decoder.nodes == ()
    assert max(constant.relative_l2 for constant in decoder.constants) < 0.2


def test_gptq_weights_are_not_for_w8a8(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found w8a8 with a GPTQ checkpoint"):
        build_engine(tiny_checkpoint, tmp_path / "e", "w8a8", gptq_checkpoint=tmp_path / "gptq")
    assert files_below(tmp_path) == []


def test_gptq_weights_of_another_model_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    name = write_gptq_checkpoint(tiny_checkpoint, tmp_path / "gptq", torch.arange(256))
    other = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        other.model.backbone.get_submodule(name).weight.normal_()
    save_checkpoint(tmp_path / "other", other)
    recipe = ExportRecipe("int4", method="rtn")
    with pytest.raises(CheckpointError, match=r"down_proj: found a weight .*% away"):
        build_engine(tmp_path / "other", tmp_path / "e", recipe, gptq_checkpoint=tmp_path / "gptq")
    assert not (tmp_path / "e").exists()

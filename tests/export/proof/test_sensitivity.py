"""mdf_export.proof.sensitivity: each linear's own damage, and what is bought with bytes."""

import dataclasses
import json
import math
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mdf_export.commands import parse_bytes
from mdf_export.planning import plan_checkpoint
from mdf_export.proof import decoder_run as decoder_run_module
from mdf_export.proof.decoder_run import DecoderRun, hold_checkpoint, replaced, rounded_weight
from mdf_export.proof.sensitivity import (
    LinearDamage,
    Sensitivity,
    choose_kept,
    choose_kept_by_flips,
    load_sensitivity,
    measure_sensitivity,
    mixed_recipe,
    promotions,
)
from mdf_export.recipe import ExportRecipe
from mdf_sdk.cli import main
from mdf_sdk.errors import InputError
from mdf_sdk.manifest import load_manifest
from mdf_training.data.pixels import PixelSet, stack_pixels
from mdf_training.data.synthetic import SyntheticData
from mdf_training.evaluation.checkpoint_scorer import CheckpointScorer

DATA = "synthetic:12:4243"
INT4 = ExportRecipe("int4", method="rtn")
BITS_OF = {"int4": 4, "int8": 8, "fp16": 16}
LAYERS = "backbone.model.language_model.layers"


@pytest.fixture(scope="module")
def sensitivity(tiny_checkpoint: Path) -> Sensitivity:
    return measure_sensitivity(tiny_checkpoint, DATA, cases=6)


def made_up(sizes_and_kl: list[tuple[int, float]]) -> Sensitivity:
    linears = tuple(
        LinearDamage(f"linear.{i}", 9 * n, 17 * n, 32 * n, kl, 0)
        for i, (n, kl) in enumerate(sizes_and_kl)
    )
    return Sensitivity("0" * 64, DATA, 6, "int4", 32, linears)


def stored_elements(engine: Path, data_type: int) -> int:
    """Count the weights of a type in decoder and fusion."""
    graphs = [
        onnx.load(engine / f"{block}.onnx", load_external_data=False).graph
        for block in ("decoder", "fusion")
    ]
    tensors = [tensor for graph in graphs for tensor in graph.initializer]
    return sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type == data_type)


@pytest.mark.parametrize("kind", ["tiny", "skip"])
@torch.no_grad()
def test_running_from_a_layer_on_scores_as_the_whole_model_does(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """For weights that do not touch the instruction's constants."""
    names = [f"{LAYERS}.5.cross_attn.v_proj", f"{LAYERS}.7.mlp.down_proj", "fusion.2.o_proj"]
    with hold_checkpoint(request.getfixturevalue(f"{kind}_checkpoint"), "cpu") as checkpoint:
        pixels = PixelSet(SyntheticData(3, 5), checkpoint.config.image, ())
        cases = pixels.read(range(3))
        run = DecoderRun(checkpoint, cases, keep_streams=True)
        scorer = CheckpointScorer(checkpoint.model, checkpoint.prompt_encoder())
        texts = [case.row.text for case in cases]
        whole = scorer.score(*stack_pixels(cases), texts)
        assert run.scores == pytest.approx(whole, abs=1e-5)
        for name in names:
            linear = checkpoint.model.get_submodule(name)
            with replaced(linear, 1.5 * linear.weight):
                changed = run.score_from(name)
                assert changed == pytest.approx(scorer.score(*stack_pixels(cases), texts), abs=1e-5)
                assert changed == pytest.approx(run.score_all(), abs=1e-5)
            assert abs(changed - whole).max() > 1e-3, name
        assert run.score_all() == pytest.approx(whole, abs=1e-5)


def test_every_quantized_linear_is_measured_and_does_some_damage(sensitivity: Sensitivity) -> None:
    names = {linear.name for linear in sensitivity.linears}
    # 4 self-attention layers of 7, 4 cross-attention layers of 7, 4 fusion blocks of 4
    assert len(names) == len(sensitivity.linears) == 72
    assert all(linear.kl > 0 for linear in sensitivity.linears)
    assert sensitivity.cases == 6


def test_finer_precisions_are_nearer_to_the_weight(tiny_checkpoint: Path) -> None:
    with hold_checkpoint(tiny_checkpoint, "cpu") as checkpoint:
        linear = checkpoint.model.get_submodule("fusion.0.q_proj")
        assert isinstance(linear.weight, torch.Tensor)
        int4, int8, fp16 = (
            (rounded_weight(linear, precision, 32) - linear.weight).norm()
            for precision in ("int4", "int8", "fp16")
        )
        assert int4 > 10 * int8 > 10 * fp16


def test_the_planned_bytes_are_the_linears_bytes(
    tiny_checkpoint: Path, sensitivity: Sensitivity
) -> None:
    base = plan_checkpoint(tiny_checkpoint, INT4).device_bytes
    first, second = sensitivity.linears[0], sensitivity.linears[-1]
    kept = {first.name: "int8", second.name: "fp16"}
    plan = plan_checkpoint(tiny_checkpoint, dataclasses.replace(INT4, kept=kept))
    extra = first.bytes_int8 - first.bytes_int4 + second.bytes_fp16 - second.bytes_int4
    # A linear that is finer than its neighbors leaves their joined product: a Split goes with it.
    assert plan.device_bytes == pytest.approx(base + extra, abs=100)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=12),
    st.integers(0, 5000),
    st.integers(0, 5000),
)
@example([(50, 1.0), (1, 1e-4)], 10, 400)  # the small one fits where the large one does not
def test_more_bytes_are_never_exceeded_and_never_mean_less_of_a_linear(
    sizes_and_kl: list[tuple[int, float]], first: int, second: int
) -> None:
    sensitivity = made_up(sizes_and_kl)
    linears = {linear.name: linear for linear in sensitivity.linears}
    less, more = (choose_kept(sensitivity, extra) for extra in sorted((first, second)))
    for kept, extra in ((less, min(first, second)), (more, max(first, second))):
        spent = (linears[n].bytes_at(p) - linears[n].bytes_int4 for n, p in kept.items())
        assert sum(spent) <= extra
    for name, precision in less.items():
        assert BITS_OF[more[name]] >= BITS_OF[precision]


def test_of_equal_linears_the_most_damaging_is_kept_first() -> None:
    sensitivity = made_up([(10, 0.1), (10, 0.3), (10, 0.2)])
    assert [linear.name for linear in sensitivity.ranked()] == ["linear.1", "linear.2", "linear.0"]
    assert choose_kept(sensitivity, 79) == {}
    assert choose_kept(sensitivity, 80) == {"linear.1": "int8"}
    assert choose_kept(sensitivity, 160) == {"linear.1": "int8", "linear.2": "int8"}
    everything = dict.fromkeys(("linear.0", "linear.1", "linear.2"), "fp16")
    assert choose_kept(sensitivity, 10**6) == everything


def test_int8_is_promoted_to_fp16_alone() -> None:
    sensitivity = dataclasses.replace(made_up([(10, 0.1)]), precision="int8")
    assert [precision for _, precision in promotions(sensitivity)] == ["fp16"]
    assert choose_kept(sensitivity, 150) == {"linear.0": "fp16"}


def test_flips_are_bought_off_with_as_few_promotions_as_do(
    tiny_checkpoint: Path, sensitivity: Sensitivity
) -> None:
    kept, flips = choose_kept_by_flips(sensitivity, tiny_checkpoint, 0.0)
    assert (flips.correct, flips.n) == (0, 6)
    order = promotions(sensitivity)
    steps = [name for name in order if BITS_OF[kept.get(name[0].name, "int4")] >= BITS_OF[name[1]]]
    assert order[: len(steps)] == steps
    free, flips = choose_kept_by_flips(sensitivity, tiny_checkpoint, 0.99)
    assert free == {}
    assert flips.n == 6


def test_an_engine_stays_within_max_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = [str(tiny_checkpoint), "--precision", "int4"]
    out = tmp_path / "report"
    assert main(["sensitivity", *words, "--data", DATA, "--cases", "2", "--out", str(out)]) == 0
    bound = plan_checkpoint(tiny_checkpoint, INT4).device_bytes + 50_000
    mixed = [*words[:1], str(tmp_path / "engine"), *words[1:], "--method", "rtn"]
    mixed += ["--sensitivity", str(out), "--max-bytes", str(bound)]
    assert main(["export", *mixed]) == 0
    kept = load_manifest(tmp_path / "engine").quantization.kept
    assert kept
    recipe = dataclasses.replace(INT4, kept=kept)
    assert bound - 20_000 < plan_checkpoint(tiny_checkpoint, recipe).device_bytes <= bound
    in_int8 = {name for name, precision in kept.items() if precision == "int8"}
    assert stored_elements(tmp_path / "engine", onnx.TensorProto.INT8) == sum(
        linear.bytes_fp16 // 2 for linear in load_sensitivity(out).linears if linear.name in in_int8
    )
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert load_sensitivity(out) == load_sensitivity(out / "sensitivity.json")


def test_less_than_all_int4_is_refused_with_the_least(
    tiny_checkpoint: Path, sensitivity: Sensitivity, tmp_path: Path
) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(sensitivity.to_dict()))
    least = plan_checkpoint(tiny_checkpoint, INT4).device_bytes
    with pytest.raises(InputError, match=f"found {least - 1}, expected at least {least}"):
        mixed_recipe(INT4, tiny_checkpoint, path, max_bytes=least - 1)
    recipe, _ = mixed_recipe(INT4, tiny_checkpoint, path, max_bytes=least)
    assert recipe.kept == {}


def test_a_sensitivity_of_another_checkpoint_or_block_size_is_refused(
    tiny_checkpoint: Path, sensitivity: Sensitivity, tmp_path: Path
) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(sensitivity.to_dict()))
    with pytest.raises(InputError, match=r"expected one of .*, 64"):
        mixed_recipe(dataclasses.replace(INT4, block_size=64), tiny_checkpoint, path, max_bytes=1)
    with pytest.raises(InputError, match="expected int4 or int8"):
        mixed_recipe(ExportRecipe("fp16"), tiny_checkpoint, path, max_bytes=1)
    path.write_text(json.dumps(dataclasses.replace(sensitivity, checkpoint="0" * 64).to_dict()))
    with pytest.raises(InputError, match="found a sensitivity of checkpoint 000000000000"):
        mixed_recipe(INT4, tiny_checkpoint, path, max_bytes=10**9)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"linears": [{"name": "a"}]}'])
def test_what_mdf_sensitivity_did_not_write_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "sensitivity.json").write_text(content)
    with pytest.raises(InputError, match="mdf sensitivity CHECKPOINT"):
        load_sensitivity(tmp_path)


def test_a_bound_without_a_sensitivity_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = [str(tiny_checkpoint), str(tmp_path / "engine"), "--precision", "int4"]
    assert main(["export", *words, "--max-bytes", "1GB"]) == 2
    assert main(["export", *words, "--sensitivity", str(tmp_path)]) == 2
    assert not (tmp_path / "engine").exists()


def test_a_checkpoint_larger_than_the_memory_is_refused(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_run_module, "_memory_bytes", lambda _: 1_000_000)
    with pytest.raises(InputError, match=r"expected at most 80 % of the 0\.0 GB"):
        measure_sensitivity(tiny_checkpoint, DATA, cases=2)


def test_sizes_are_read_with_their_units() -> None:
    assert [parse_bytes(w) for w in ("12", "1.5MB", "6.5 GB", "3k")] == [
        12,
        1_500_000,
        6_500_000_000,
        3000,
    ]

"""mdf_benchmarks.parity.compare: a fault-free pair passes; a planted fault fails where it is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mdf_benchmarks.parity.checks import CHECKS
from mdf_benchmarks.parity.compare import Parity, compare_engine
from mdf_benchmarks.parity.reference import Reference, run_reference
from mdf_sdk import verify_engine
from mdf_sdk.errors import DataError
from mdf_sdk.manifest import Manifest
from mdf_training.data.folder import open_data

from .conftest import DATA, WIDE, Planter

LAYER = 5  # of cross-attention


def first(parity: Parity) -> tuple[str, str]:
    """Return check and place of the first fault."""
    assert not parity.ok
    assert parity.first_fault is not None
    name, fault = parity.first_fault
    return name, fault.where


def failing(parity: Parity) -> set[str]:
    return {check.name for check in parity.checks if not check.ok}


@pytest.mark.parametrize("engine", ["tiny_engine", "int4_engine", "w8a8_engine"])
def test_a_fault_free_pair_passes(
    engine: str, reference: Reference, request: pytest.FixtureRequest
) -> None:
    parity = compare_engine(reference, request.getfixturevalue(engine), WIDE)
    assert [check.name for check in parity.checks] == list(CHECKS)
    assert [fault for check in parity.checks for fault in check.faults] == []
    assert parity.ok
    assert parity.first_fault is None


def test_a_fault_free_pair_whose_skips_ask_passes(skip_checkpoint: Path, skip_engine: Path) -> None:
    reference = run_reference(skip_checkpoint, open_data(DATA), DATA)
    parity = compare_engine(reference, skip_engine, WIDE)
    assert [fault for check in parity.checks for fault in check.faults] == []


@pytest.mark.parametrize("block", ["vision", "unet_encoder", "fusion", "decoder", "unet_decoder"])
def test_a_block_of_an_fp32_engine_scaled_by_2_percent_is_found(
    block: str, tiny_engine: Path, reference: Reference, planter: Planter
) -> None:
    faulty = planter.change_constants(
        tiny_engine, block, lambda name: name.endswith("weight"), lambda w: w * 1.02
    )
    parity = compare_engine(reference, faulty, WIDE)
    assert first(parity)[0] == block
    assert failing(parity) <= {block, "decisions"}
    # Without PyTorch, golden.npz points at the same block.
    assert [report.block for report in verify_engine(faulty).blocks if not report.ok] == [block]


@pytest.mark.parametrize("factor", [1.02, 1 / 1.02])
@pytest.mark.parametrize(
    ("block", "scope"), [("fusion", "/fusion/"), ("decoder", "/decoder/layers.2/mlp/down_proj/")]
)
def test_int4_weights_scaled_by_2_percent_are_found_and_named(
    block: str,
    scope: str,
    factor: float,
    int4_engine: Path,
    reference: Reference,
    planter: Planter,
) -> None:
    """Their outputs stay within int4's tolerance: the weights themselves tell it."""
    faulty = planter.change_constants(
        int4_engine,
        block,
        lambda name: name.startswith(scope) and name.endswith("scales"),
        lambda scales: scales * np.float16(factor),
    )
    parity = compare_engine(reference, faulty, WIDE)
    check, where = first(parity)
    assert check == block
    assert where.startswith(scope)
    assert "times the checkpoint's" in parity.check(block).faults[0].found
    assert not any(fault.where.startswith("output") for fault in parity.check(block).faults)
    assert failing(parity) <= {block, "decisions"}


@pytest.mark.parametrize(
    ("part", "change"),
    [("scales", lambda scales: scales * 1.02), ("weight", lambda codes: np.roll(codes, 1, axis=1))],
    ids=["scales", "columns"],
)
def test_w8a8_weights_that_are_not_the_checkpoints_are_found_and_named(
    part: str,
    change: Callable[[np.ndarray], np.ndarray],
    w8a8_engine: Path,
    reference: Reference,
    planter: Planter,
) -> None:
    scope = "/decoder/layers.2/mlp/down_proj/"
    faulty = planter.change_constants(
        w8a8_engine, "decoder", lambda name: name == scope + part, change
    )
    assert first(compare_engine(reference, faulty, WIDE)) == ("decoder", f"{scope}weight")


def test_int4_groups_shifted_by_one_are_found_and_named(
    int4_engine: Path, reference: Reference, planter: Planter
) -> None:
    weight = "/decoder/layers.4/self_attention/o_proj"
    faulty = planter.change_constants(
        int4_engine,
        "decoder",
        lambda name: name == f"{weight}/scales",
        lambda scales: np.roll(scales, 1, axis=0),
    )
    parity = compare_engine(reference, faulty, WIDE)
    assert first(parity) == ("decoder", f"{weight}/weight")
    assert "groups whose scales are off" in parity.check("decoder").faults[0].found


def test_a_node_that_int4_would_hide_is_named(
    int4_engine: Path, reference: Reference, planter: Planter
) -> None:
    """Every constant is right and every output within tolerance, but one sum is scaled."""

    def scale(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(np.array(1.02, np.float16), "factor"))
        down = next(n for n in graph.node if n.name == "/decoder/layers.2/mlp/down_proj/MatMul")
        place = list(graph.node).index(down)
        made = down.output[0]
        down.output[0] = "unscaled"
        graph.node.insert(place + 1, helper.make_node("Mul", ["unscaled", "factor"], [made]))

    parity = compare_engine(reference, planter.change_graph(int4_engine, "decoder", scale), WIDE)
    assert first(parity) == ("decoder", "/decoder/layers.2/mlp/down_proj/MatMul")
    assert failing(parity) <= {"decoder", "decisions"}


@pytest.mark.parametrize("engine", ["tiny_engine", "int4_engine", "w8a8_engine"])
def test_a_cross_attention_fed_zeros_is_found_in_its_layer(
    engine: str, reference: Reference, planter: Planter, request: pytest.FixtureRequest
) -> None:
    def feed_zeros(graph: onnx.GraphProto) -> None:
        for kind in ("key", "value"):
            name = f"cross_{kind}_{LAYER}"
            for node in graph.node:
                node.input[:] = [f"{name}/zero" if read == name else read for read in node.input]
            graph.node.insert(0, helper.make_node("Sub", [name, name], [f"{name}/zero"]))

    faulty = planter.change_graph(request.getfixturevalue(engine), "decoder", feed_zeros)
    parity = compare_engine(reference, faulty, WIDE)
    assert first(parity) == ("decoder", f"layer {LAYER}, cross-attention")
    others = [fault.where for fault in parity.check("decoder").faults]
    assert not any(f"layer {i}" in where for where in others for i in range(8) if i != LAYER)


def test_a_dead_cross_attention_is_told_by_the_scores_too(
    tiny_engine: Path, reference: Reference, planter: Planter
) -> None:
    def cut_every_layer(graph: onnx.GraphProto) -> None:
        for tensor in [t.name for t in graph.input if t.name.startswith("cross_")]:
            for node in graph.node:
                node.input[:] = [f"{tensor}/zero" if x == tensor else x for x in node.input]
            graph.node.insert(0, helper.make_node("Sub", [tensor, tensor], [f"{tensor}/zero"]))

    faulty = planter.change_graph(tiny_engine, "decoder", cut_every_layer)
    places = [f.where for f in compare_engine(reference, faulty, WIDE).check("sensitivity").faults]
    assert [place for place in places if "text" not in place] == [
        "engine, swapped image",
        "engine, blank image",
        "engine, shuffled image",
    ]


def test_swapped_mean_and_std_are_found_in_the_preprocessing(
    int4_engine: Path, reference: Reference, planter: Planter
) -> None:
    def swap(manifest: Manifest) -> Manifest:
        image = manifest.image
        changed = replace(image, tower_mean=image.tower_std, tower_std=image.tower_mean)
        return replace(manifest, image=changed)

    parity = compare_engine(reference, planter.change_manifest(int4_engine, swap), WIDE)
    assert first(parity) == ("preprocessing", "tower pixels")
    assert "tower_mean and tower_std differ" in parity.check("preprocessing").faults[0].found
    assert not failing(parity) & {"vision", "unet_encoder", "fusion", "decoder", "unet_decoder"}


def test_a_label_that_is_scored_by_wrong_tokens_is_found_in_the_decoder(
    tiny_engine: Path, reference: Reference, planter: Planter
) -> None:
    def shift(graph: onnx.GraphProto) -> None:
        sums = next(
            node for node in graph.node if node.op_type == "ReduceSum" and "Gather" in node.input[0]
        )
        gather = next(node for node in graph.node if sums.input[0] in node.output)
        indices = next(t for t in graph.initializer if t.name == gather.input[1])
        changed = numpy_helper.to_array(indices).copy()
        changed[0] += 1
        indices.CopyFrom(numpy_helper.from_array(changed, indices.name))

    faulty = planter.change_graph(tiny_engine, "decoder", shift)
    parity = compare_engine(reference, faulty, WIDE)
    assert first(parity)[0] == "decoder"
    assert parity.check("decoder").faults[0].found == "other indices or shapes"
    assert "output scores" in [fault.where for fault in parity.check("decoder").faults]


def test_a_label_that_the_tokenizer_spells_wrong_is_named(
    tiny_engine: Path, reference: Reference, planter: Planter
) -> None:
    faulty = planter.copy(tiny_engine)
    path = faulty / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    ids["Acquired"], ids["ter"] = ids["ter"], ids["Acquired"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    parity = compare_engine(reference, planter.seal(faulty), WIDE)
    assert first(parity) == ("preprocessing", "tokens, label Acquired")
    assert not any("label Inherited" in f.where for f in parity.check("preprocessing").faults)
    assert not failing(parity) & {"fusion", "decoder"}


def test_another_temperature_fails_the_scores(
    tiny_engine: Path, reference: Reference, planter: Planter
) -> None:
    faulty = planter.change_manifest(tiny_engine, lambda m: replace(m, temperature=1.5))
    assert first(compare_engine(reference, faulty, WIDE)) == ("scores", "temperature")


def test_nan_is_a_failing_verdict_that_names_the_block(
    tiny_engine: Path, reference: Reference, planter: Planter
) -> None:
    faulty = planter.change_constants(
        tiny_engine,
        "fusion",
        lambda name: name == "/fusion/fusion.1/q_proj/weight",
        lambda w: np.full_like(w, np.nan),
    )
    parity = compare_engine(reference, faulty, WIDE)
    assert first(parity)[0] == "fusion"
    assert {"sensitivity", "scores", "decisions"} <= failing(parity)
    assert parity.to_dict()["agreement"] is None


def test_golden_tensors_that_are_not_the_references_are_found(
    tiny_engine: Path, reference: Reference, planter: Planter
) -> None:
    faulty = planter.copy(tiny_engine)
    with np.load(faulty / "golden.npz") as arrays:
        golden = dict(arrays)
    golden["case1/vision_states"] = golden["case1/vision_states"] * 1.01
    np.savez(faulty / "golden.npz", **golden)
    parity = compare_engine(reference, planter.seal(faulty), WIDE)
    assert first(parity) == ("golden", "golden.npz, case1/vision_states")
    assert failing(parity) == {"golden"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: replace(m, labels=("healthy", "ill")), "labels healthy, ill"),
        (lambda m: replace(m, model="smol-135m"), "model smol-135m"),
        (lambda m: replace(m, mask_kinds=("disc",)), "mask kinds disc"),
    ],
)
def test_an_engine_of_another_model_is_refused(
    change, named: str, tiny_engine: Path, reference: Reference, planter: Planter
) -> None:
    with pytest.raises(DataError, match=f"found the {named}.*The two are different models"):
        compare_engine(reference, planter.change_manifest(tiny_engine, change), WIDE)


def test_an_engine_of_another_fusion_is_refused(skip_engine: Path, reference: Reference) -> None:
    with pytest.raises(DataError, match="found the rows of cross-attention keys 64, 37, 64, 37"):
        compare_engine(reference, skip_engine, WIDE)

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from mdf_export.parts import cut_layers, layer_outputs, tensor_specs, weight_bytes
from mdf_sdk import EngineError

LAYERS = 8  # of the nano preset
RTOL = 1e-6  # equal bits were seen


@pytest.fixture(scope="module")
def engine(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, for parts beside the weights; float32, so that passing a value on rounds nothing."""
    return Path(shutil.copytree(tiny_engine, tmp_path_factory.mktemp("parts") / "engine"))


@pytest.fixture(scope="module")
def decoder(engine: Path) -> onnx.ModelProto:
    return onnx.load(engine / "decoder.onnx", load_external_data=False)


def golden(engine: Path, model: onnx.ModelProto) -> dict[str, Any]:
    """The first golden case's tensors, in the dtypes that a graph reads."""
    with np.load(engine / "golden.npz") as arrays:
        return {
            spec.name: arrays[f"case0/{spec.name}"].astype(spec.dtype)
            for spec in tensor_specs(model.graph.input)
        }


def run(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {value.name: tensors[value.name] for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("layers_per_part", [1, 3, 4])
def test_the_parts_one_after_another_give_what_the_whole_gives(
    engine: Path, decoder: onnx.ModelProto, layers_per_part: int
) -> None:
    tensors = golden(engine, decoder)
    whole = run(engine / "decoder.onnx", tensors)
    for part in cut_layers(decoder, layers_per_part):
        path = engine / f"{part.graph.name}.{layers_per_part}.onnx"  # beside the weights
        onnx.save(part, path)
        onnx.checker.check_model(path)
        tensors |= run(path, tensors)
        path.unlink()
    for name, expected in whole.items():
        np.testing.assert_allclose(tensors[name], expected, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize(("layers_per_part", "parts"), [(1, 8), (3, 3), (4, 2), (8, 1), (99, 1)])
def test_a_part_has_as_many_layers_as_asked_for(
    decoder: onnx.ModelProto, layers_per_part: int, parts: int
) -> None:
    cut = cut_layers(decoder, layers_per_part)
    assert len(cut) == parts
    counts = [len(layer_outputs(part.graph)) for part in cut]
    assert sum(counts) == LAYERS
    assert max(counts) <= layers_per_part


def test_every_weight_is_in_one_part(decoder: onnx.ModelProto) -> None:
    parts = cut_layers(decoder, 3)
    weights = [t.name for part in parts for t in part.graph.initializer if len(t.dims) == 2]
    shared = {name for name in weights if weights.count(name) > 1}
    assert all("cos" in name or "sin" in name for name in shared)
    assert sum(weight_bytes(part.graph) for part in parts) < 1.1 * weight_bytes(decoder.graph)


def test_a_part_is_fed_only_what_it_reads(decoder: onnx.ModelProto) -> None:
    for part in cut_layers(decoder, 1):
        layers = [name.split(".")[1].split("/")[0] for name in layer_outputs(part.graph)]
        fed = [v.name for v in part.graph.input if v.name.startswith("cross_")]
        assert {name.rsplit("_", 1)[1] for name in fed} <= set(layers)


def test_a_part_gives_only_what_is_read(decoder: onnx.ModelProto) -> None:
    parts = cut_layers(decoder, 3)
    read = {value.name for value in decoder.graph.output}
    for part in reversed(parts):
        assert {value.name for value in part.graph.output} <= read
        read.update(value.name for value in part.graph.input)


def test_a_graph_that_names_no_layers_cannot_be_cut(engine: Path) -> None:
    vision = onnx.load(engine / "vision.onnx", load_external_data=False)
    with pytest.raises(EngineError, match=r"vision: found no value named .*mdf export"):
        cut_layers(vision, 1)

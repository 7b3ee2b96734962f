"""Every graph compiles with the real TensorRT-RTX compiler; running a plan needs a card."""

from pathlib import Path

import pytest
import tensorrt_rtx as trt

from mdf_export import build_engine
from mdf_sdk import load_manifest
from mdf_sdk.manifest import BLOCKS, BlockSpec

# min, opt and max of the free dimensions; S is T behind the constant instruction.
BATCHES, TOKENS = (1, 1, 4), (16, 64, 140)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensorrt") / "engine"
    build_engine(tiny_checkpoint, folder, "int4")
    return folder


def compile_block(engine: Path, spec: BlockSpec, prefix: int) -> int:
    """Return the size of the plan for compute capability 8.6."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network()
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parsed = parser.parse_from_file(str(engine / spec.file))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        shapes = []
        for batch, tokens in zip(BATCHES, TOKENS, strict=True):
            free = {"B": batch, "T": tokens, "S": prefix + tokens}
            shapes.append([free[d] if isinstance(d, str) else d for d in tensor.shape])
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return int(plan.nbytes)


@pytest.mark.parametrize("block", BLOCKS)
def test_tensorrt_rtx_compiles_a_block(engine: Path, block: str, tiny_checkpoint: Path) -> None:
    from mdf_training.checkpoint import load_checkpoint

    prefix = len(load_checkpoint(tiny_checkpoint).prompt_encoder().prefix_ids)
    spec = load_manifest(engine).blocks[block]
    assert compile_block(engine, spec, prefix) > 100_000

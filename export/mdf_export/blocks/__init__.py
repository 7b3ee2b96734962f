"""A streamed checkpoint in, the five blocks of an engine out, one ONNX graph each.

Dimensions in the graphs: B batch, T fed tokens (all but the constant prefix), S prefix and fed
tokens, V vision tokens, R states that a cross-attention layer reads, D width, K labels.
"""

from pathlib import Path

import onnx

from mdf_export.activations import activation_bytes, longest_dimensions
from mdf_export.blocks.decoder import build_decoder
from mdf_export.blocks.fusion import build_fusion
from mdf_export.blocks.source import BlockSource
from mdf_export.blocks.unet import build_unet_decoder, build_unet_encoder
from mdf_export.blocks.vision import build_vision
from mdf_export.parts import tensor_specs
from mdf_sdk.manifest import BlockSpec, Precision
from mdf_sdk.prompt import PromptEncoder


def build_block(name: str, source: BlockSource, folder: Path | None) -> int:
    """Write one of the five graphs; with no folder, only count.

    Returns:
        Bytes of its weights.
    """
    if name == "decoder":
        return build_decoder(source, source.checkpoint.prompt_encoder(), folder)
    build = {
        "vision": build_vision,
        "unet_encoder": build_unet_encoder,
        "fusion": build_fusion,
        "unet_decoder": build_unet_decoder,
    }[name]
    return build(source, folder)


def read_spec(path: Path, precision: Precision, encoder: PromptEncoder) -> BlockSpec:
    """Read a finished block's bindings off its graph, and the memory of its longest case."""
    graph = onnx.load(path, load_external_data=False).graph
    return BlockSpec(
        file=path.name,
        precision=precision,
        inputs=tensor_specs(graph.input),
        outputs=tensor_specs(graph.output),
        activation_bytes=activation_bytes(path, longest_dimensions(encoder)),
    )

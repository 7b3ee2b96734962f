"""The U-Net's two halves, convolutions: through torch's own exporter."""

import copy
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from mdf_export.blocks.source import BlockSource
from mdf_export.graph import save_graph
from mdf_training.model import MDFModel, decode_mask

SKIPS = tuple(f"skip_{i}" for i in range(4))
FEATURES = (*SKIPS, "bottleneck")
# ONNX Runtime 1.31 has no MaxPool of opset 22 or later on CUDA, and puts it on the CPU unasked.
_CONVOLUTION_OPSET = 20


# The U-Net stays in float32: on photographs FiLM's output (smol-135m) went past float16's 65504,
# and the mask was gone.
class _UNetEncoder(nn.Module):
    def __init__(self, model: MDFModel) -> None:
        super().__init__()
        self.encoder = _host_copy(model.unet.encoder)

    def forward(self, unet_pixels: Tensor) -> tuple[Tensor, ...]:
        _, *features = self.encoder(unet_pixels)
        return tuple(features)


class _UNetDecoder(nn.Module):
    def __init__(self, model: MDFModel) -> None:
        super().__init__()
        self.unet = _host_copy(model.unet)
        films: Any = _host_copy(model.film)
        for film in films:
            film.proj = _as_convolution(film.proj)
        self.film = films

    def forward(self, *tensors: Tensor) -> Tensor:
        *skips, bottleneck, pooled = tensors
        return decode_mask(self.unet, self.film, skips, bottleneck, pooled).sigmoid()


def _host_copy(module: nn.Module) -> Any:
    """A copy that torch's exporter takes; weights that are nowhere become any."""
    copied = copy.deepcopy(module).eval()
    nowhere = any(weight.is_meta for weight in copied.parameters())
    return copied.to_empty(device="cpu") if nowhere else copied.to("cpu")


def _as_convolution(linear: nn.Linear) -> nn.Module:
    """The same as a 1 x 1 convolution: TensorRT-RTX has no float32 GEMM for Turing cards."""
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1)
    conv.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})
    return nn.Sequential(nn.Unflatten(1, (linear.in_features, 1, 1)), conv, nn.Flatten())


def build_unet_encoder(source: BlockSource, folder: Path | None) -> int:
    """U-Net encoder: unet_pixels (B, 3, U, U) -> four skips and the bottleneck (B, C, H, W)."""
    model = source.checkpoint.model
    if folder is None:
        return _float32_bytes(model.unet.encoder)
    pixels = torch.zeros(2, 3, model.config.image.unet_px, model.config.image.unet_px)
    with source.checkpoint.loaded(model.unet.encoder):
        module = _UNetEncoder(model)
    return _export_module(folder, "unet_encoder", module, {"unet_pixels": pixels}, FEATURES)


def build_unet_decoder(source: BlockSource, folder: Path | None) -> int:
    """FiLM and U-Net decoder: features, pooled states -> mask (B, M, U, U), probabilities."""
    model = source.checkpoint.model
    if folder is None:
        return _float32_bytes(model.unet.decoder, model.unet.segmentation_head, model.film)
    config = model.config
    channels = model.unet.encoder.out_channels[1:]
    inputs = {
        name: torch.zeros(2, c, *2 * (config.image.unet_px >> (i + 1),))
        for i, (name, c) in enumerate(zip(FEATURES, channels, strict=True))
    }
    inputs["pooled"] = torch.zeros(2, len(config.fusion.layers), config.text["hidden_size"])
    with source.checkpoint.loaded(model.unet, model.film):
        module = _UNetDecoder(model)
    return _export_module(folder, "unet_decoder", module, inputs, ("mask",))


def _export_module(
    folder: Path,
    name: str,
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: tuple[str, ...],
) -> int:
    """Export a convolutional block through torch's own exporter, the batch left free."""
    path = folder / f"{name}.onnx"
    batch = torch.export.Dim("B", min=1, max=1024)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notes on its own opset registry
        shapes = tuple({0: batch} for _ in inputs)
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=_CONVOLUTION_OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(shapes,) if _is_variadic(module) else shapes,
        )
        assert program is not None
    proto = _without_traces(program.model_proto)
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    save_graph(proto, path)
    return size


def _float32_bytes(*modules: nn.Module) -> int:
    """Count what torch's exporter will write; it takes no weights on the meta device."""
    return sum(4 * weight.numel() for module in modules for weight in module.parameters())


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what torch's exporter notes of its own run: names of files and lines on this machine."""
    graph = model.graph
    model.doc_string = graph.doc_string = ""
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    for initializer in graph.initializer:
        del initializer.metadata_props[:]
        initializer.doc_string = ""
    return model


def _is_variadic(module: nn.Module) -> bool:
    return isinstance(module, _UNetDecoder)

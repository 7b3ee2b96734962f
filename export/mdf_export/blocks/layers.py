"""What the blocks share: a module of PyTorch in, its nodes out; x (B, T, D) goes through."""

from typing import Any

from torch import Tensor, nn

from mdf_export.graph import GraphBuilder


def layer_norm(g: GraphBuilder, x: str, norm: nn.LayerNorm) -> str:
    return g.layer_norm(x, norm.weight, norm.bias, norm.eps)


def rms_norm(g: GraphBuilder, x: str, norm: Any) -> str:
    return g.rms_norm(x, norm.weight, norm.variance_epsilon)


def gated(g: GraphBuilder, x: str, gate: Tensor) -> str:
    """Multiply by tanh(gate)."""
    return g.op("Mul", x, g.constant(gate.tanh()))


def embed_patches(g: GraphBuilder, x: str, side: int, conv: nn.Conv2d) -> str:
    """Apply a convolution whose kernel is its stride, no bias: (B, C, S, S) -> (B, G * G, D).

    Written as a product: cuDNN has no plan for some of these in float16, and slow ones for others.
    """
    channels, patch = conv.in_channels, conv.stride[0]
    grid = side // patch
    x = g.op("Reshape", x, g.ints(0, channels, grid, patch, grid, patch))
    x = g.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    x = g.op("Reshape", x, g.ints(0, grid * grid, channels * patch * patch))
    return g.op("MatMul", x, g.constant(conv.weight.flatten(1).T, "weight"))

"""The two roads between U-Net and language model: fusion blocks one way, FiLM the other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusionBlock(nn.Module):
    """Adds one U-Net skip to the vision states that one cross-attention layer reads.

    fused = states + alpha * tanh(gate) * Attention(query=states, key=value=patches of the skip)

    with the gate at 0 in the beginning: a pretrained language model starts undisturbed (as in
    Flamingo, Alayrac et al., 2022).
    """

    def __init__(
        self, skip_channels: int, skip_px: int, width: int, heads: int, grid: int, alpha: float
    ) -> None:
        """Args:
        skip_channels, skip_px: C and side of the skip.
        width: D of the backbone.
        heads: of the attention; D is divided among them.
        grid: patches per side, a divisor of skip_px.
        alpha: fixed scale of the addition.
        """
        super().__init__()
        patch = skip_px // grid
        self.heads = heads
        self.alpha = alpha
        self.patch_proj = nn.Conv2d(skip_channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(grid * grid, width).normal_(std=0.02))
        self.state_norm = nn.LayerNorm(width)
        self.patch_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor, skip: Tensor) -> Tensor:
        """Return fused states (B, V, D) from vision states (B, V, D) and a skip (B, C, H, W)."""
        patches = self.patch_proj(skip).flatten(2).transpose(1, 2) + self.position  # (B, G*G, D)
        patches = self.patch_norm(patches)
        attended = F.scaled_dot_product_attention(
            self._split(self.q_proj(self.state_norm(states))),
            self._split(self.k_proj(patches)),
            self._split(self.v_proj(patches)),
        )
        added = self.o_proj(attended.transpose(1, 2).flatten(2))
        return states + self.alpha * self.gate.tanh() * added

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, D / heads)


class FiLM(nn.Module):
    """Feature-wise linear modulation of one skip (Perez et al., 2018); starts as the identity.

    modulated = skip * (1 + gamma) + beta, (gamma, beta) = linear(pooled language states)
    """

    def __init__(self, width: int, skip_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * skip_channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, skip: Tensor, pooled: Tensor) -> Tensor:
        """Modulate a skip (B, C, H, W) by pooled states (B, D)."""
        gamma, beta = self.proj(pooled)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        return skip * (1 + gamma) + beta

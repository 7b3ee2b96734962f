"""The two roads between U-Net and language model: fusion blocks one way, FiLM the other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusionBlock(nn.Module):
    """Joins one U-Net skip and the vision states for one cross-attention layer.

    query "vision": fused = states + alpha * tanh(gate) * Attention(query=states, key=value=patches)
    query "skip": fused = patches + alpha * tanh(gate) * Attention(query=patches, key=value=states)

    with layer-normalized patches of the skip, and the gate at 0 in the beginning: a pretrained
    language model starts undisturbed (as in Flamingo, Alayrac et al., 2022), where vision asks.
    With alpha 0 the vision states pass as they are.
    """

    def __init__(
        self,
        skip_channels: int,
        skip_px: int,
        width: int,
        heads: int,
        grid: int,
        alpha: float,
        query: str,
    ) -> None:
        """Args:
        skip_channels, skip_px: C and side of the skip.
        width: D of the backbone.
        heads: of the attention; D is divided among them.
        grid: patches per side, a divisor of skip_px.
        alpha: fixed scale of the addition.
        query: "vision" or "skip": whose tokens ask.
        """
        super().__init__()
        patch = skip_px // grid
        self.heads = heads
        self.alpha = alpha
        self.query = query
        self.patch_proj = nn.Conv2d(skip_channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(grid * grid, width).normal_(std=0.02))
        self.state_norm = nn.LayerNorm(width)
        self.patch_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        if not alpha:
            self.requires_grad_(False)

    def forward(self, states: Tensor, skip: Tensor) -> Tensor:
        """Fuse vision states (B, V, D) and a skip (B, C, H, W).

        Returns:
            (B, V, D) where vision asks, (B, grid * grid, D) where the skip does.
        """
        if not self.alpha:
            return states
        patches = self.patch_proj(skip).flatten(2).transpose(1, 2) + self.position  # (B, G*G, D)
        patches = self.patch_norm(patches)
        if self.query == "skip":
            return patches + self._attend(patches, self.state_norm(states))
        return states + self._attend(self.state_norm(states), patches)

    def _attend(self, asking: Tensor, answering: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(
            self._split(self.q_proj(asking)),
            self._split(self.k_proj(answering)),
            self._split(self.v_proj(answering)),
        )
        added: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return self.alpha * self.gate.tanh() * added

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, D / heads)


class FiLM(nn.Module):
    """Feature-wise linear modulation of one skip (Perez et al., 2018); starts as the identity.

    modulated = skip * (1 + gamma) + beta, (gamma, beta) = linear(pooled language states)
    """

    def __init__(self, width: int, skip_channels: int, enabled: bool) -> None:
        """Args:
        width: D of the backbone.
        skip_channels: C of the skip.
        enabled: or else the skip passes as it is.
        """
        super().__init__()
        self.enabled = enabled
        self.proj = nn.Linear(width, 2 * skip_channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        if not enabled:
            self.requires_grad_(False)

    def forward(self, skip: Tensor, pooled: Tensor) -> Tensor:
        """Modulate a skip (B, C, H, W) by pooled states (B, D)."""
        if not self.enabled:
            return skip
        gamma, beta = self.proj(pooled)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        return skip * (1 + gamma) + beta

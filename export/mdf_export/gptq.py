"""GPTQ: a float weight and the second moments of its inputs in, integers of least output error out.

Frantar et al., "GPTQ" (2022), computed as Chee et al., "QuIP" (2023), theorem 6, prove equal to it.
With H = E[x x^T] = U D U^T, U unit upper triangular, the error that rounding W to Q causes is

    tr((W - Q) H (W - Q)^T) = sum_k D_k |T_k - Q_k|^2,  T_k = W_k + sum_(j<k) (W_j - Q_j) U_jk

so each feature k (a column of W) is rounded from T_k, in turn. It takes one Cholesky factor of H
and no inverse. D, the part of a feature's second moment that later features cannot make good,
weighs the errors when scales are searched.
"""

import torch
from torch import Tensor

from mdf_export.quantize import QuantizedWeight, round_to_levels, search_scales, widest_scales
from mdf_sdk.errors import CheckpointError

DAMPING = 0.01  # of the mean diagonal, as in the GPTQ paper
LAZY_FEATURES = 128  # whose errors reach the features after them in one product, as in the paper
CHUNK_ROWS = 4096


class Hessian:
    """Accumulates the second moments of a linear's inputs over a calibration set."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self._total = torch.zeros(features, features, device=device)

    @torch.no_grad()
    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs: float (..., K), on any device."""
        rows = inputs.reshape(-1, self._total.shape[0])
        for chunk in rows.split(CHUNK_ROWS):
            chunk = chunk.to(self._total.device, torch.float32)
            self._total.addmm_(chunk.T, chunk)
        self.rows += rows.shape[0]

    def mean(self) -> Tensor:
        """Return E[x x^T]: float32 (K, K), zeros where nothing was added."""
        return self._total / max(self.rows, 1)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    block_size: int,
    *,
    act_order: bool,
    search: bool,
) -> QuantizedWeight:
    """Round a weight so that its outputs on the calibration set change least.

    Outputs do not touch each other: weights that read the same input can be joined along N, and
    the result split. A feature that was always zero is rounded plainly.

    Args:
        weight: float (N, K), finite; K a multiple of block_size.
        hessian: float32 (K, K), the mean of x x^T over inputs x, on the weight's device.
        bits: 4 or 8, or W8A8_BITS.
        block_size: weights along K that share a scale.
        act_order: round the features of largest second moment first, with scales fitted to the
            weight beforehand, so that groups stay consecutive. Otherwise the features go in their
            own order, and a group's scales are fitted when its turn comes.
        search: take for each group the scale of least error, instead of the one that clips nothing.

    Raises:
        CheckpointError: the Hessian holds NaN or infinity, or is not positive semidefinite.
    """
    if not hessian.isfinite().all():
        raise CheckpointError(
            "calibration: found NaN or infinity among the inputs of a linear, expected finite "
            "numbers. Measure the checkpoint, and train it again if it fails: "
            "mdf evaluate CHECKPOINT DATA"
        )
    (n, k), device = weight.shape, weight.device
    order = torch.arange(k, device=device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    feedback, remainder = _factorize(hessian, order)
    importance = remainder[order.argsort()]
    original = weight.float().T
    errors = original[order]  # (K, N): the weight's rows, each replaced by its error once rounded
    codes = torch.empty(k, n, dtype=torch.int8, device=device)
    scales = torch.empty(k // block_size, n, device=device)

    def fit(group: int, features: Tensor) -> None:
        groups = features.T  # (N, block_size)
        weights = importance[group * block_size :][:block_size]
        scales[group] = (
            search_scales(groups, bits, weights) if search else widest_scales(groups, bits)
        )

    if act_order:
        for group, features in enumerate(original.split(block_size)):
            fit(group, features)
    groups = (order // block_size).tolist()
    # Without act_order a group is fitted in its turn, and has to lie in one portion.
    lazy = LAZY_FEATURES if act_order else max(LAZY_FEATURES // block_size, 1) * block_size
    for start in range(0, k, lazy):
        rows = errors[start : start + lazy]
        stop = start + rows.shape[0]
        near = feedback[start:stop, start:stop].contiguous()
        targets = rows + feedback[:start, start:stop].T @ errors[:start]
        levels = torch.empty_like(rows)
        for i, group in enumerate(groups[start:stop]):
            if not act_order and i % block_size == 0:
                turn = slice(i, i + block_size)
                fit(group, _foresee(rows[turn], targets[turn], near[turn, turn]))
            levels[i] = round_to_levels(targets[i], scales[group], bits)
            rows[i].addcmul_(levels[i], scales[group], value=-1)
            targets[i + 1 :].addr_(near[i, i + 1 :], rows[i])
        codes[start:stop] = levels
    return QuantizedWeight(codes[order.argsort()], scales, bits)


def _factorize(hessian: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (K, K) and the diagonal of D (K,) of the damped Hessian, its features in order."""
    # LAPACK factorizes from the first feature on; U D U^T starts at the last.
    reverse = order.flip(0)
    damped = hessian[reverse[:, None], reverse]
    mean = float(damped.diagonal().mean())
    damping = DAMPING * mean if mean > 0 else 1.0
    for _ in range(6):
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            scale = factor.diagonal().clone()
            factor /= scale
            return factor.flip((0, 1)), scale.square().flip(0)
        damping *= 10
    raise CheckpointError(
        f"calibration: found second moments of {order.shape[0]} features that are not positive "
        "semidefinite, expected a mean of x x^T. Calibrate again: mdf export CHECKPOINT ENGINE"
    )


def _foresee(rows: Tensor, targets: Tensor, near: Tensor) -> Tensor:
    """Return the targets (block_size, N) that a group would have if it caused no error itself.

    Only its first target is final. The others still wait for the errors of the features between,
    of which the part is known that answers the errors before the group.
    """
    return rows + torch.linalg.solve_triangular(
        near.T, targets - rows, upper=False, unitriangular=True
    )

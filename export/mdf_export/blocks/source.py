"""A streamed checkpoint and a recipe in; each linear's weight as the engine stores it, out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from mdf_export.graph import GraphBuilder, Weight
from mdf_export.quantize import (
    BITS,
    QuantizedWeight,
    as_w8a8,
    round_to_nearest,
    to_float8,
    to_w8a8,
)
from mdf_export.recipe import ExportRecipe
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.errors import CheckpointError
from mdf_sdk.manifest import PROCESSORS_ALONE, Precision

# Relative L2. Rounding to 4 bits moves a weight by some 10 %; another model's is 100 % away.
MAX_GIVEN_ERROR = 0.3


def check_given(name: str, given: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """Return a weight of a GPTQ checkpoint, if it is this model's.

    Raises:
        CheckpointError: another shape, or too far from the checkpoint's own weight.
    """
    stands_for = given.dequantize().to(weight.device)
    if stands_for.shape != weight.shape:
        found, expected = f"of {list(stands_for.shape)}", f"{list(weight.shape)}"
    else:
        error = float((stands_for - weight).norm() / weight.norm())
        if error <= MAX_GIVEN_ERROR:
            return given
        found, expected = (
            f"{error:.0%} away from the checkpoint's",
            f"{MAX_GIVEN_ERROR:.0%} at most",
        )
    raise CheckpointError(
        f"GPTQ checkpoint, {name}: found a weight {found}, expected {expected}. It was made of "
        "another model: leave --gptq-checkpoint out, and the export calibrates by itself."
    )


@dataclass(frozen=True)
class BlockSource:
    """What every block is built from.

    Attributes:
        checkpoint: its weights are on disk until a layer is written.
        recipe: the precisions.
        given: by linear, what a GPTQ checkpoint has.
        calibrated: by linear, what GPTQ made here; the rest is rounded to nearest.
        input_max: by linear of an fp8 block, the largest magnitude of its input.
    """

    checkpoint: StreamedCheckpoint
    recipe: ExportRecipe
    given: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    calibrated: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    input_max: Mapping[str, float] = field(default_factory=dict)

    def builder(self, block: str, folder: Path | None) -> GraphBuilder:
        """Begin a block's graph."""
        recipe = self.recipe
        precision = recipe.block_precision(block)

        def store(linear: nn.Linear) -> Weight:
            return self.weight(linear, precision)

        for_card = recipe.precision not in PROCESSORS_ALONE
        return GraphBuilder(folder, block, recipe.float_type, store, for_card=for_card)

    def weight(self, linear: nn.Linear, precision: Precision) -> Weight:
        """Return a loaded linear's weight in the form in which the engine stores it."""
        name = self.checkpoint.name_of(linear)
        if name in self.given:
            return check_given(name, self.given[name], linear.weight)
        precision = self.recipe.kept.get(name, precision)
        if name in self.calibrated:
            weight = self.calibrated[name]
            return as_w8a8(weight) if precision == "w8a8" else weight
        block_size = self.recipe.block_size
        if precision in BITS and linear.in_features % block_size == 0:
            return round_to_nearest(linear.weight, BITS[precision], block_size)
        if precision == "w8a8":
            return to_w8a8(linear.weight)
        if precision == "fp8" and name in self.input_max:
            return to_float8(linear.weight, self.input_max[name])
        return linear.weight

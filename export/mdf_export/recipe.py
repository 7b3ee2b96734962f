"""How an engine is made of a checkpoint: the one value that all stages of an export share."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from mdf_export.graph import FloatType
from mdf_sdk.errors import InputError
from mdf_sdk.manifest import Precision, QuantizationMethod

BLOCK_SIZES = (32, 64, 128)
VISION_PRECISIONS = ("fp16", "int8", "fp8")
# With activations in float32, and the vision tower in the same precision.
_WHOLE = ("fp32", "w8a8")
QUANTIZED_BLOCKS = ("fusion", "decoder")


@dataclass(frozen=True)
class ExportRecipe:
    """How an engine is made.

    Attributes:
        precision: of the language model and the fusion: "fp32", "fp16", "int8", "int4", or for
            processors "w8a8", the vision tower's too.
        vision_precision: of the vision tower: "fp16"; "int8", weight-only; or "fp8", Q/DQ, for
            cards of compute capability 8.9 on. By default "int8" beside "int4", and "fp16" beside
            the others; what the engine's is where that is "fp32" or "w8a8".
        method: "gptq", calibrated through the fused forward; or "rtn", round to nearest.
        block_size: weights along K that share a scale: 32, 64 or 128; of "w8a8" all of them do.
        act_order: GPTQ takes the input features by falling energy; for "w8a8" it always does.
        search: scales of least squared error, instead of those that clip nothing.
        calibration: where GPTQ's cases, and those of the fp8 scales, come from: a folder with
            labels.csv, or synthetic:COUNT:SEED.
        calibration_cases: as many, spread evenly over it, are taken.
        kept: linears in another precision than their block's, by name.
    """

    precision: Precision
    vision_precision: Precision | None = None
    method: QuantizationMethod = "gptq"
    block_size: int = 32
    act_order: bool = True
    search: bool = True
    calibration: str = "synthetic:64:20260102"
    calibration_cases: int = 64
    kept: Mapping[str, Precision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise InputError for a value that no export can use."""
        whole = self.precision in _WHOLE
        if self.vision_precision is None:
            narrow = "int8" if self.precision == "int4" else "fp16"
            object.__setattr__(self, "vision_precision", self.precision if whole else narrow)
        choices: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("precision", ("fp32", "fp16", "int8", "int4", "w8a8")),
            ("vision_precision", (self.precision,) if whole else VISION_PRECISIONS),
            ("method", get_args(QuantizationMethod)),
            ("block_size", BLOCK_SIZES),
        )
        for name, allowed in choices:
            if (found := getattr(self, name)) not in allowed:
                raise InputError(
                    f"{name}: found {found!r}, expected one of {', '.join(map(str, allowed))}"
                )

    @property
    def float_type(self) -> FloatType:
        """Of activations, and of weights that are not quantized."""
        return "float32" if self.precision in _WHOLE else "float16"

    @property
    def quantizes(self) -> bool:
        """Whether the language model's matrices become integers."""
        return self.precision in ("int8", "int4", "w8a8")

    @property
    def calibrates(self) -> bool:
        """Whether cases go through the model before it is written."""
        return (self.quantizes and self.method == "gptq") or self.vision_precision == "fp8"

    def block_precision(self, block: str) -> Precision:
        """What the manifest says of a block; the U-Net's weights stay float32."""
        if block in QUANTIZED_BLOCKS:
            return self.precision
        if block == "vision" and self.vision_precision is not None:
            return self.vision_precision
        return "fp32" if self.precision in _WHOLE else "tf32"

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "kept": dict(self.kept)}

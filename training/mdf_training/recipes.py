"""How each preset trains, unless told otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mdf_sdk.errors import InputError

PARTS = ("unet", "fusion", "vision", "language")
COMPUTE = ("float32", "bfloat16")
POLICIES = ("joint", "stop_parts", "in_step")


@dataclass(frozen=True)
class Schedule:
    """A learning rate over the run: up in a line, then down to zero as half a cosine.

    Attributes:
        warmup: share of the run's steps in which it rises.
        end: share of the run's steps after which it stays zero.
    """

    warmup: float = 0.05
    end: float = 1.0

    def __post_init__(self) -> None:
        """Raise InputError for a schedule that never trains."""
        if not 0 <= self.warmup < self.end <= 1:
            raise InputError(
                f"schedule: found warmup {self.warmup} and end {self.end}, expected "
                "0 <= warmup < end <= 1"
            )


@dataclass(frozen=True)
class Recipe:
    """How a run trains: what the paper leaves open, with the reason for each default.

    Attributes:
        epochs: passes over the training cases.
        batch_size: cases per step.
        unet_lr, fusion_lr, backbone_lr: peak learning rates. A U-Net and fusion blocks from scratch
            learn faster than a language model forgets.
        encoder_lr: of a U-Net encoder that starts from ImageNet weights; `unet_lr` otherwise.
        grafted_lr: of the backbone's vision tower, projector and cross-attention layers, where
            they start from scratch beside pretrained language weights; `backbone_lr` otherwise.
            AdamW moves a gate by about its learning rate a step: at 2e-4 it would stay shut.
        gates: where the gates of cross-attention layers and fusion blocks start, if not where the
            preset has them. A shut gate passes no gradient to what lies behind it.
        weight_decay: of AdamW, on matrices alone.
        warmup: share of the steps in which the learning rates rise; then they fall as a cosine to
            zero.
        schedules: of the parts (PARTS) that have one of their own.
        policy: what each part's own validation loss does to it (see mdf_training.schedule):
            "joint", nothing; "stop_parts", early stopping; "in_step", a slower rate for the part
            that is ahead.
        patience: of "stop_parts", epochs without a better loss.
        frozen: parts (PARTS) that stay as they are.
        max_grad_norm: gradients are clipped to it.
        mask_weight: of the segmentation loss (Dice + binary cross-entropy) beside the label loss.
        drop_text, drop_image: share of the cases whose text becomes NEUTRAL_TEXT, or whose picture
            goes black: neither half is then leant on alone, and the controls of `evaluate` are
            inputs that the model was trained for.
        augment: strength of the changes that make a training picture another camera's, from 0,
            mirrored alone, to 1 (see mdf_training.data.augmentation).
        compute: "float32", or "bfloat16" for the layers of a model that is trained on CUDA, beside
            float32 weights.
        recompute: keep the inputs of the layers alone and compute their activations again in the
            backward pass: less memory, a third more work.
        validation: share of the patients held out, for the epoch's report and the temperature.
        seed: of weights, order, split and augmentation.
    """

    epochs: int = 6
    batch_size: int = 32
    unet_lr: float = 2e-3
    fusion_lr: float = 1e-3
    backbone_lr: float = 1e-3
    encoder_lr: float = 3e-4
    grafted_lr: float | None = None
    gates: float | None = None
    weight_decay: float = 0.05
    warmup: float = 0.05
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    policy: str = "joint"
    patience: int = 5
    frozen: tuple[str, ...] = ()
    max_grad_norm: float = 1.0
    mask_weight: float = 0.5
    drop_text: float = 0.1
    drop_image: float = 0.05
    augment: float = 0.0
    compute: str = "float32"
    recompute: bool = False
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for a value that no run can use."""
        for name, low, high in (
            ("epochs", 1, 10**6),
            ("batch_size", 1, 10**6),
            ("patience", 1, 10**6),
            ("warmup", 0, 1 - 1e-6),
            ("augment", 0, 1),
            ("validation", 1e-6, 1 - 1e-6),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name}: found {value}, expected {low} to {high}")
        if self.policy not in POLICIES:
            raise InputError(
                f"policy: found {self.policy!r}, expected one of {', '.join(POLICIES)}"
            )
        if self.compute not in COMPUTE:
            raise InputError(
                f"compute: found {self.compute!r}, expected one of {', '.join(COMPUTE)}"
            )
        for name, parts in (("frozen", self.frozen), ("schedules", tuple(self.schedules))):
            if not set(parts) <= set(PARTS):
                raise InputError(f"{name}: found {parts!r}, expected parts of {', '.join(PARTS)}")
        if set(self.frozen) == set(PARTS):
            raise InputError("frozen: found every part, expected at least one that trains")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Read what `asdict` made of a recipe, through JSON or not."""
        schedules = {part: Schedule(**s) for part, s in values.get("schedules", {}).items()}
        frozen = tuple(values.get("frozen", ()))
        return cls(**{**values, "schedules": schedules, "frozen": frozen})

    def schedule(self, part: str) -> Schedule:
        """Return a part's schedule."""
        return self.schedules.get(part, Schedule(self.warmup))


# Pretrained language weights want a gentler hand than random ones.
RECIPES = {
    "nano": Recipe(),
    # docs/results/training.md: what it comes to on photographs, and the cameras that chose
    # `augment`. Gates that start shut, and two to three times the learning rates, gave 0.60 instead
    # of 0.70 on 363 photographs (24 epochs of 16 cases, one run each, one H100, 2026-11-22).
    "smol-135m": Recipe(
        epochs=30,
        batch_size=32,
        unet_lr=5e-4,
        fusion_lr=3e-4,
        backbone_lr=1e-4,
        grafted_lr=3e-4,
        gates=1.0,
        mask_weight=0.2,
        drop_text=0.3,
        augment=0.5,
    ),
    "llama-3.2-11b": Recipe(
        epochs=20,
        batch_size=8,
        unet_lr=1e-3,
        fusion_lr=1e-4,
        backbone_lr=1e-5,
        compute="bfloat16",
        recompute=True,
    ),
}

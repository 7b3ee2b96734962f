"""The studies of the paper as tables: what each variant changes, and what it is held against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mdf_sdk.errors import InputError


@dataclass(frozen=True)
class Variant:
    """One row of a study: what it changes of the preset.

    Attributes:
        name: of the row and of its runs' directories; two variants of one name are the same.
        fusion: fields of FusionConfig.
        recipe: fields of Recipe.
        model: "fused", or "cnn": the small network that sees the picture alone.
    """

    name: str
    fusion: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    model: str = "fused"

    def changes(self) -> str:
        """Say what it changes, for a table's cell."""
        if self.model == "cnn":
            return "a small CNN that sees the picture alone"
        changed = {**self.fusion, **self.recipe}
        return ", ".join(f"{k} {_words(v)}" for k, v in changed.items()) or "the preset as it is"


@dataclass(frozen=True)
class Study:
    """A question and the variants that answer it.

    Attributes:
        name: of the study and of its files.
        question: in one line.
        reference: what every other variant is held against, case by case and seed by seed.
        others: in the order of the table.
        claim: what the paper says the reference is to all others, where the study tests it.
        note: what a reader must know to judge the table.
    """

    name: str
    question: str
    reference: Variant
    others: tuple[Variant, ...]
    claim: str | None = None
    note: str = ""

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (self.reference, *self.others)


FUSED = Variant("fused")
NO_FUSION = Variant("no-fusion", fusion={"depths": (), "film": False})

STUDIES = {
    study.name: study
    for study in (
        Study(
            "frozen",
            "What must be trained?",
            FUSED,
            (
                Variant("frozen-unet", recipe={"frozen": ("unet",)}),
                Variant("frozen-language", recipe={"frozen": ("language",)}),
                Variant("frozen-backbone", recipe={"frozen": ("vision", "language")}),
            ),
            claim="everything trained is better than any part frozen",
            note="A frozen part stays as it started: pretrained where it was given weights, at "
            "random where it was not, as all of the preset nano.",
        ),
        Study(
            "fusion",
            "Which road between U-Net and language model matters?",
            FUSED,
            (
                Variant("cross-attention", fusion={"film": False}),
                Variant("film", fusion={"depths": ()}),
                NO_FUSION,
            ),
        ),
        Study(
            "depths",
            "Is one fused depth of the U-Net as good as four?",
            FUSED,
            tuple(Variant(f"depth-{d}", fusion={"depths": (d,)}) for d in range(4)),
        ),
        Study(
            "query",
            "Which side asks in the fusing cross-attention: the vision states or the skip?",
            FUSED,
            (Variant("query-skip", fusion={"query": "skip"}),),
        ),
        Study(
            "alpha",
            "How strongly is the fused part added?",
            Variant("alpha-1", fusion={"alpha": 1.0}),
            tuple(Variant(f"alpha-{a:g}", fusion={"alpha": a}) for a in (0.25, 0.5, 2.0)),
        ),
        Study(
            "policy",
            "U-Net and language model learn at different speeds: which policy serves both?",
            Variant("joint", recipe={"policy": "joint"}),
            tuple(Variant(p, recipe={"policy": p}) for p in ("stop_parts", "in_step")),
            note="The plot marks the epoch where each validation loss is least.",
        ),
        Study(
            "augment",
            "How far from its own camera should a training picture be?",
            Variant("augment-0", recipe={"augment": 0.0}),
            tuple(Variant(f"augment-{a:g}", recipe={"augment": a}) for a in (0.5, 1.0)),
            note="Choose by photographs of a camera that was left out: mdf split "
            "--leave-source-out.",
        ),
        Study(
            "baseline",
            "Is the fused model better than the plain one, and than a small CNN?",
            FUSED,
            (NO_FUSION, Variant("cnn", model="cnn")),
        ),
    )
}


def find_studies(names: Sequence[str]) -> tuple[Study, ...]:
    """Return the studies of these names.

    Raises:
        InputError: no study of a name, or a name twice.
    """
    unknown = [name for name in names if name not in STUDIES]
    if unknown or not names or len(set(names)) < len(names):
        raise InputError(
            f"study: found {', '.join(map(repr, names)) or 'nothing'}, expected distinct names of "
            f"{', '.join(STUDIES)}. Example: --study frozen,fusion"
        )
    return tuple(STUDIES[name] for name in names)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

"""ablation.studies: the tables of variants are what the presets can be trained with."""

import dataclasses

import pytest

from mdf_sdk.errors import InputError
from mdf_training.ablation.studies import FUSED, STUDIES, Study, Variant, find_studies
from mdf_training.config import PRESETS
from mdf_training.recipes import RECIPES


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_variant_is_one_that_the_preset_can_have(study: Study, preset: str) -> None:
    changed = [
        (
            variant.model,
            dataclasses.replace(PRESETS[preset].fusion, **variant.fusion),
            dataclasses.replace(RECIPES[preset], **variant.recipe),
        )
        for variant in study.variants
    ]
    assert all(first not in changed[:i] for i, first in enumerate(changed))


def test_two_variants_of_one_name_are_the_same() -> None:
    variants = [variant for study in STUDIES.values() for variant in study.variants]
    named = {variant.name: variant for variant in variants}
    assert all(named[variant.name] == variant for variant in variants)


# Presets have strengths of their own; the study's reference is a picture that is only mirrored.
@pytest.mark.parametrize("study", [s for s in STUDIES.values() if s.name != "augment"])
def test_the_reference_is_the_preset_as_it_is(study: Study) -> None:
    for preset, config in PRESETS.items():
        assert dataclasses.replace(config.fusion, **study.reference.fusion) == config.fusion
        recipe = RECIPES[preset]
        assert dataclasses.replace(recipe, **study.reference.recipe) == recipe


def test_only_the_frozen_study_tests_a_claim_of_the_paper() -> None:
    assert [name for name, study in STUDIES.items() if study.claim] == ["frozen"]


@pytest.mark.parametrize("names", [(), ("frozen", "frozen"), ("colour",)])
def test_studies_that_are_none_are_refused_with_the_names_there_are(names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="expected distinct names of frozen, fusion, depths"):
        find_studies(names)


def test_studies_come_in_the_order_asked_for() -> None:
    assert [study.name for study in find_studies(("query", "alpha"))] == ["query", "alpha"]


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (FUSED, "the preset as it is"),
        (Variant("v", fusion={"depths": (), "film": False}), "depths none, film off"),
        (Variant("v", recipe={"frozen": ("vision", "language")}), "frozen vision+language"),
        (Variant("v", fusion={"alpha": 0.25}), "alpha 0.25"),
    ],
)
def test_a_variant_says_what_it_changes(variant: Variant, words: str) -> None:
    assert variant.changes() == words

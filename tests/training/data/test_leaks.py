"""data.leaks: the answer written into the question is refused, a helpful text is not."""

from collections.abc import Callable

import pytest

from mdf_sdk.errors import DataError
from mdf_training.data.cases import Row
from mdf_training.data.diseases import read_diseases
from mdf_training.data.leaks import (
    check_leaks,
    find_label_words,
    find_leaks,
    label_names,
    text_only,
)
from mdf_training.data.synthetic import LABELS, NEUTRAL_TEXT, SyntheticData


def make_rows(count: int, text: Callable[[int, str], str], labels: tuple[str, ...] = LABELS):
    """`count` rows of patients of their own whose labels take turns."""
    turns = [labels[i % len(labels)] for i in range(count)]
    return [Row(f"{i}.png", lb, text(i, lb), f"p{i}", "s") for i, lb in enumerate(turns)]


def words_of(rows: list[Row], labels: tuple[str, ...] = LABELS) -> list[tuple[str, str, int, int]]:
    found = find_label_words(rows, label_names(labels))
    return [(w.word, w.label, w.own, w.others) for w in found]


def test_synthetic_texts_help_and_name_no_diagnosis() -> None:
    data = SyntheticData(1000, seed=1)
    report = check_leaks(data.rows, data.labels, allow=False)
    assert report.words == ()
    assert report.text_only is not None
    assert 0.65 < report.text_only.balanced_accuracy < 0.75
    assert report.text_only.chance == 0.5
    assert len(report.warnings) == 1


@pytest.mark.parametrize(
    "sentence",
    [
        "Known Stargardt disease.",
        "Referred for RETINITIS-PIGMENTOSA, right eye.",
        "An inherited disease.",
        "Retinitis\npigmentosa since 1990.",
    ],
)
def test_a_text_that_names_its_label_or_a_disease_of_it_is_refused(sentence: str) -> None:
    rows = make_rows(4, lambda i, label: sentence if i == 1 else "Blurred vision.")
    with pytest.raises(DataError, match=r"of label Inherited is in 1 texts .* in 1\.png") as caught:
        check_leaks(rows, LABELS, allow=False)
    assert "--allow-label-words" in str(caught.value)


def test_label_words_can_be_allowed_and_are_reported() -> None:
    rows = make_rows(4, lambda i, label: "Known Stargardt disease." if i == 1 else "Blurred.")
    report = check_leaks(rows, LABELS, allow=True)
    assert [word.word for word in report.words] == ["stargardt disease"]
    assert report.to_dict()["words"][0]["own"] == 1


def test_a_part_of_a_longer_word_is_no_label_word() -> None:
    assert words_of(make_rows(4, lambda i, label: "Uninherited best-corrected acuity.")) == []


def test_words_that_every_label_has_alike_are_no_leak() -> None:
    labels = ("healthy", "Best")
    rows = make_rows(40, lambda i, label: "Otherwise healthy, best corrected 6/9.", labels)
    assert words_of(rows, labels) == []


def test_a_word_much_more_frequent_in_its_own_label_is_a_leak() -> None:
    labels = ("glaucoma", "healthy")
    rows = make_rows(
        40, lambda i, label: "Has glaucoma." if label == "glaucoma" or i == 1 else "Well.", labels
    )
    assert words_of(rows, labels) == [("glaucoma", "glaucoma", 20, 1)]


def test_labels_that_are_diseases_are_known_by_their_synonyms() -> None:
    labels = ("age-related macular degeneration", "glaucoma")
    names = label_names(labels)
    assert names["armd"] == names["wet age related macular degeneration"] == labels[0]
    assert names["poag"] == "glaucoma"
    assert "stargardt" not in names


def test_every_packaged_disease_with_a_label_is_looked_for() -> None:
    names = label_names(LABELS)
    for disease in read_diseases():
        if disease.label in LABELS:
            assert names[disease.names[0].casefold().replace("-", " ")] == disease.label


def test_a_code_that_stands_for_the_label_is_refused_without_any_name() -> None:
    rows = make_rows(
        60, lambda i, label: f"Code {'H40' if label == 'Acquired' else 'H35'}, age {i}."
    )
    with pytest.raises(DataError, match=r"balanced accuracy 1\.000 \(chance 0\.500\)"):
        check_leaks(rows, LABELS, allow=False)


def test_texts_that_say_nothing_of_the_label_raise_no_word() -> None:
    report = find_leaks(make_rows(60, lambda i, label: f"Age {i % 7}."), LABELS)
    assert (report.errors, report.warnings) == ([], [])


def test_a_patient_is_never_on_both_sides_of_the_word_test() -> None:
    # Each patient's own name tells the label of that patient's other pictures, and no other's.
    rows = [Row(f"{i}.png", LABELS[i // 2 % 2], f"n{i // 2}", f"p{i // 2}", "s") for i in range(80)]
    found = text_only(rows)
    assert found is not None
    assert found.balanced_accuracy < 0.7


def test_texts_that_only_one_label_has_are_a_warning() -> None:
    rows = make_rows(
        60, lambda i, label: NEUTRAL_TEXT if label == "Acquired" or i % 4 == 1 else f"Age {i}."
    )
    report = find_leaks(rows, LABELS)
    assert report.neutral_share == {"Acquired": 1.0, "Inherited": 0.5}
    rows = make_rows(60, lambda i, label: NEUTRAL_TEXT if label == "Acquired" else f"Age {i}.")
    warning = find_leaks(rows, LABELS).warnings[-1]
    assert warning.startswith("texts that say nothing (Acquired 100%, Inherited 0%)")


@pytest.mark.parametrize("count", [1, 2, 19])
def test_too_few_patients_say_nothing(count: int) -> None:
    assert text_only(make_rows(count, lambda i, label: label)) is None

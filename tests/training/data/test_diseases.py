"""data.diseases: a disease's label, by a map that a user edits."""

from pathlib import Path

import pytest

from mdf_sdk.errors import DataError
from mdf_training.data.diseases import LEFT_OUT, DiseaseMap, read_diseases


def write_map(folder: Path, *rows: str) -> Path:
    (folder / "map.csv").write_text("\n".join(["disease,label,synonyms", *rows]))
    return folder / "map.csv"


@pytest.mark.parametrize(
    ("diseases", "label"),
    [
        (["glaucoma"], "Acquired"),
        (["STARGARDT DISEASE"], "Inherited"),
        (["moderate non proliferative retinopathy"], "Acquired"),
        (["glaucoma", "dry age-related macular degeneration"], "Acquired"),
        (["glaucoma", "lens dust"], "Acquired"),
        (["glaucoma", "retinitis pigmentosa"], LEFT_OUT),
        (["glaucoma", "no fundus image"], LEFT_OUT),
        (["healthy"], LEFT_OUT),
        (["lens dust"], LEFT_OUT),
        ([], LEFT_OUT),
    ],
)
def test_the_packaged_map_gives_a_case_its_label(diseases: list[str], label: str) -> None:
    known = DiseaseMap()
    known.check(diseases)
    assert known.label(diseases) == label


def test_every_packaged_row_is_acquired_inherited_left_out_or_no_disease() -> None:
    assert {disease.label for disease in read_diseases()} == {"Acquired", "Inherited", "-", ""}


def test_a_users_map_knows_the_packaged_synonyms_and_findings(tmp_path: Path) -> None:
    known = DiseaseMap(write_map(tmp_path, "diabetic retinopathy,DR,", "*,-,"))
    assert known.label(["proliferative diabetic retinopathy", "laser spot"]) == "DR"
    assert known.label(["glaucoma"]) == LEFT_OUT


def test_a_users_row_goes_before_the_packaged_synonym(tmp_path: Path) -> None:
    path = write_map(
        tmp_path,
        "age-related macular degeneration,AMD,",
        "wet age-related macular degeneration,wet AMD,",
    )
    known = DiseaseMap(path)
    assert known.label(["wet age-related macular degeneration"]) == "wet AMD"
    assert known.label(["dry age-related macular degeneration"]) == "AMD"


def test_missing_diseases_are_counted_and_the_file_is_named(tmp_path: Path) -> None:
    known = DiseaseMap(write_map(tmp_path, "glaucoma,G,"))
    with pytest.raises(
        DataError, match=r"map\.csv: has no row for 'cataract' \(1\), 'uveitis' \(2"
    ):
        known.check(["uveitis", "glaucoma", "cataract", "uveitis"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["glaucoma,G,", "Glaucoma,H,"], "found 'Glaucoma' with two labels"),
        (["glaucoma,G,", "uveitis,H,glaucoma"], "found 'glaucoma' with two labels"),
        ([",G,"], "row 2, column disease: empty"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(
    tmp_path: Path, rows: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        DiseaseMap(write_map(tmp_path, *rows))


def test_no_name_is_in_the_packaged_map_twice() -> None:
    names = [name.casefold() for disease in read_diseases() for name in disease.names]
    assert len(names) == len(set(names))

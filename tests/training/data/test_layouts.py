"""data.layouts: public sets, in miniature and in their own layouts, become one format."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openpyxl import Workbook
from PIL import Image

from mdf_sdk.errors import DataError, InputError
from mdf_training.data.folder import FolderData, open_data
from mdf_training.data.layouts import import_data
from mdf_training.data.synthetic import NEUTRAL_TEXT

PHOTOGRAPHS = Path(__file__).parents[4] / "shared" / "data" / "fundus"
SIDE = 40
IDENTITY = """disease,label
healthy,healthy
diabetic retinopathy,diabetic retinopathy
glaucoma,glaucoma
age-related macular degeneration,age-related macular degeneration
*,-
"""


def draw(path: Path, mode: str = "RGB") -> Path:
    """A picture of noise that depends on its name; of mode L, a mask of its lower half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "L":
        pixels = np.zeros((SIDE, SIDE), np.uint8)
        pixels[SIDE // 2 :] = 76
    else:
        rng = np.random.default_rng(list(path.name.encode()))
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_csv(path: Path, *rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    """A map whose labels are the diseases themselves."""
    (tmp_path / "identity.csv").write_text(IDENTITY)
    return tmp_path / "identity.csv"


@pytest.fixture
def fives(tmp_path: Path) -> Path:
    for part, names in (("train", ("1_A", "2_D", "10_G")), ("test", ("1_A", "3_N"))):
        for name in names:
            draw(tmp_path / "FIVES" / part / "Original" / f"{name}.png")
            draw(tmp_path / "FIVES" / part / "Ground truth" / f"{name}.png", "L")
    return tmp_path / "FIVES"


@pytest.fixture
def hrf(tmp_path: Path) -> Path:
    for name in ("01_dr.JPG", "01_g.jpg", "01_h.jpg", "02_dr.JPG"):
        draw(tmp_path / "HRF" / "images" / name)
        draw(tmp_path / "HRF" / "manual1" / f"{name[:-4]}.tif", "L")
        draw(tmp_path / "HRF" / "mask" / f"{name[:-4]}_mask.tif", "L")
    return tmp_path / "HRF"


@pytest.fixture
def idrid(tmp_path: Path) -> Path:
    root = tmp_path / "IDRiD"
    segmentation, grading = root / "A. Segmentation", root / "B. Disease Grading"
    truths = segmentation / "2. All Segmentation Groundtruths" / "a. Training Set"
    draw(segmentation / "1. Original Images" / "a. Training Set" / "IDRiD_01.jpg")
    draw(segmentation / "1. Original Images" / "b. Testing Set" / "IDRiD_55.jpg")
    for folder, end in (
        ("1. Microaneurysms", "MA"),
        ("3. Hard Exudates", "EX"),
        ("5. Optic Disc", "OD"),
    ):
        draw(truths / folder / f"IDRiD_01_{end}.tif", "L")
    for part, name, grades in (
        ("a. Training Set", "a. IDRiD_Disease Grading_Training Labels.csv", (3, 0)),
        ("b. Testing Set", "b. IDRiD_Disease Grading_Testing Labels.csv", (1,)),
    ):
        rows = [[f"IDRiD_{i:03d}", grade, 0, "", ""] for i, grade in enumerate(grades, start=1)]
        header = ["Image name", "Retinopathy grade", "Risk of macular edema ", "", ""]
        write_csv(grading / "2. Groundtruths" / name, header, *rows)
        for row in rows:
            draw(grading / "1. Original Images" / part / f"{row[0]}.jpg")
    return root


ODIR_HEADER = [
    *("ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus"),
    *("Left-Diagnostic Keywords", "Right-Diagnostic Keywords", *"NDGCAHMO"),
]
ODIR_ROWS = [
    [0, 69, "Female", "0_left.jpg", "0_right.jpg", "cataract", "normal fundus", 0, 0, 0, 1],
    [
        *(1, 57, "Male", "1_left.jpg", "1_right.jpg"),
        *("moderate non proliferative retinopathy，lens dust", "glaucoma，drusen", 0, 1, 1, 0),
    ],
    [
        *(2, 42, "Male", "2_left.jpg", "2_right.jpg"),
        *("dry age-related macular degeneration，glaucoma", "retinitis pigmentosa", 0, 0, 1, 0),
    ],
]


@pytest.fixture
def odir(tmp_path: Path) -> Path:
    """As Kaggle packs it: full_df.csv with a row for each eye, and pictures of two sizes."""
    root = tmp_path / "ODIR"
    table = []
    for row in ODIR_ROWS:
        cells = [*row, *[0] * (len(ODIR_HEADER) - len(row))]
        for eye in row[3:5]:
            draw(root / "ODIR-5K" / "ODIR-5K" / "Training Images" / eye)
            (root / "preprocessed_images").mkdir(exist_ok=True)
            Image.new("RGB", (32, 32)).save(root / "preprocessed_images" / eye)
            table.append([*cells, f"../input/{eye}", "['N']", "[1]", eye])
    header = [*ODIR_HEADER, "filepath", "labels", "target", "filename"]
    write_csv(root / "full_df.csv", header, *table)
    return root


def rows_of(folder: Path) -> list[tuple[str, str, str]]:
    return [(row.label, row.patient_id, row.source) for row in FolderData(folder).rows]


def test_fives_gives_its_letters_diseases_and_its_vessels(
    fives: Path, identity: Path, tmp_path: Path
) -> None:
    report = import_data([("fives", fives)], tmp_path / "out", diseases=identity)
    data = FolderData(tmp_path / "out")
    assert rows_of(tmp_path / "out") == [
        ("age-related macular degeneration", "FIVES-test-1_A", "FIVES"),
        ("healthy", "FIVES-test-3_N", "FIVES"),
        ("age-related macular degeneration", "FIVES-train-1_A", "FIVES"),
        ("diabetic retinopathy", "FIVES-train-2_D", "FIVES"),
        ("glaucoma", "FIVES-train-10_G", "FIVES"),
    ]
    assert data[0].masks["vessel"][SIDE // 2 :].all()
    assert not data[0].masks["vessel"][: SIDE // 2].any()
    assert (report["cases"], report["left_out"]) == (5, {})


def test_healthy_cases_have_no_place_among_acquired_and_inherited(
    fives: Path, tmp_path: Path
) -> None:
    report = import_data([("fives", fives)], tmp_path / "out")
    assert (report["labels"], report["left_out"]) == ({"Acquired": 4}, {"healthy": 1})


def test_hrf_gives_its_groups_and_converts_its_tiff_masks(
    hrf: Path, identity: Path, tmp_path: Path
) -> None:
    import_data([("hrf", hrf)], tmp_path / "out", diseases=identity)
    data = FolderData(tmp_path / "out")
    assert [row.label for row in data.rows] == [
        "diabetic retinopathy",
        "glaucoma",
        "healthy",
        "diabetic retinopathy",
    ]
    assert len({row.patient_id for row in data.rows}) == 4
    assert data.mask_kinds == ("vessel",)
    assert data[0].masks["vessel"].mean() == 0.5


def test_idrid_gives_lesions_and_disc_of_one_part_and_grades_of_the_other(
    idrid: Path, identity: Path, tmp_path: Path
) -> None:
    report = import_data([("idrid", idrid)], tmp_path / "out", diseases=identity)
    data = FolderData(tmp_path / "out")
    assert [row.patient_id for row in data.rows] == [
        "IDRiD-A-IDRiD_01",
        "IDRiD-B-a-IDRiD_001",
        "IDRiD-A-IDRiD_55",
        "IDRiD-B-b-IDRiD_001",
    ]
    assert sorted(data[0].masks) == ["EX", "MA", "disc"]
    assert data[1].masks == {}
    assert report["left_out"] == {"no diabetic retinopathy": 1}


def test_idrid_may_lack_either_part(idrid: Path, identity: Path, tmp_path: Path) -> None:
    (idrid / "A. Segmentation").rename(tmp_path / "elsewhere")
    assert import_data([("idrid", idrid)], tmp_path / "out", diseases=identity)["cases"] == 2


def test_an_idrid_grade_outside_0_to_4_is_named_by_row(idrid: Path, tmp_path: Path) -> None:
    table = next(idrid.glob("B*/2*/a*.csv"))
    table.write_text(table.read_text().replace("IDRiD_002,0", "IDRiD_002,5"))
    with pytest.raises(DataError, match=r"row 3, column Retinopathy grade: found '5'"):
        import_data([("idrid", idrid)], tmp_path / "out")


def test_odir_takes_each_eyes_own_keywords_and_groups_both_eyes(
    odir: Path, identity: Path, tmp_path: Path
) -> None:
    report = import_data([("odir-5k", odir)], tmp_path / "out", diseases=identity)
    assert rows_of(tmp_path / "out") == [
        ("healthy", "ODIR-0", "ODIR-5K"),
        ("diabetic retinopathy", "ODIR-1", "ODIR-5K"),
        ("glaucoma", "ODIR-1", "ODIR-5K"),
    ]
    assert report["left_out"] == {
        "cataract": 1,
        "dry age-related macular degeneration; glaucoma": 1,
        "retinitis pigmentosa": 1,
    }


def test_odir_texts_are_age_sex_and_eye_and_never_the_keywords(odir: Path, tmp_path: Path) -> None:
    import_data([("odir-5k", odir)], tmp_path / "out")
    texts = [row.text for row in FolderData(tmp_path / "out").rows]
    assert texts[0] == "69-year-old female patient, left eye."
    assert texts[2] == "57-year-old male patient, right eye."
    keywords = {word for row in ODIR_ROWS for cell in row[5:7] for word in str(cell).split()}
    assert not keywords & {word.strip(".,") for text in texts for word in text.split()}


def test_odir_takes_the_cameras_pictures_before_smaller_copies(odir: Path, tmp_path: Path) -> None:
    (odir / "ODIR-5K").rename(odir / "unpacked")
    import_data([("odir-5k", odir)], tmp_path / "out")
    assert FolderData(tmp_path / "out")[0].image.shape == (SIDE, SIDE, 3)


def test_odir_is_read_from_its_excel_table_too(odir: Path, tmp_path: Path) -> None:
    import_data([("odir-5k", odir)], tmp_path / "from-csv")
    (odir / "full_df.csv").unlink()
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    for row in (ODIR_HEADER, *ODIR_ROWS):
        sheet.append(row)
    book.save(odir / "ODIR-5K" / "ODIR-5K" / "data.xlsx")
    import_data([("odir-5k", odir)], tmp_path / "from-excel")
    one, other = (FolderData(tmp_path / name).rows for name in ("from-csv", "from-excel"))
    assert one == other


def test_a_file_that_is_no_excel_table_is_a_data_error(odir: Path, tmp_path: Path) -> None:
    (odir / "full_df.csv").unlink()
    (odir / "data.xlsx").write_bytes(b"no workbook")
    with pytest.raises(DataError, match=r"data\.xlsx: not an Excel table"):
        import_data([("odir-5k", odir)], tmp_path / "out")


COLUMNS = {"image": "photo", "diagnosis": "disease", "text": "history", "patient_id": "case"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Case reports: picture, history and diagnosis, as a teaching collection would give them."""
    for name in ("a.jpg", "b.JPG", "c.png"):
        draw(tmp_path / "cases" / "photos" / name)
    draw(tmp_path / "cases" / "c-disc.png", "L")
    return write_csv(
        tmp_path / "cases" / "cases.csv",
        ["case", "photo", "history", "disease", "marks", "editor"],
        ["7", "photos/a.jpg", "Poor vision at night since school.", "Retinitis pigmentosa", "", ""],
        ["8", "photos/b.JPG", "", "BRVO; drusen", "", ""],
        ["9", "photos/c.png", 'Blurred, "wavy" lines.', "Best disease", "disc:c-disc.png", "x"],
    )


def test_a_case_table_keeps_histories_patients_and_masks(table: Path, tmp_path: Path) -> None:
    report = import_data([("table", table)], tmp_path / "out", columns={**COLUMNS, "mask": "marks"})
    data = FolderData(tmp_path / "out")
    assert [(r.label, r.patient_id, r.text) for r in data.rows] == [
        ("Inherited", "7", "Poor vision at night since school."),
        ("Acquired", "8", NEUTRAL_TEXT),
        ("Inherited", "9", 'Blurred, "wavy" lines.'),
    ]
    assert {row.source for row in data.rows} == {"cases"}
    assert data[2].masks["disc"].mean() == 0.5
    assert report["labels"] == {"Acquired": 1, "Inherited": 2}


def test_pictures_are_copied_byte_by_byte(table: Path, tmp_path: Path) -> None:
    import_data([("table", table)], tmp_path / "out", columns=COLUMNS)
    copies = [tmp_path / "out" / row.file for row in FolderData(tmp_path / "out").rows]
    assert [path.name for path in copies] == ["00000-a.jpg", "00001-b.jpg", "00002-c.png"]
    for copy, name in zip(copies, ("a.jpg", "b.JPG", "c.png"), strict=True):
        assert copy.read_bytes() == (table.parent / "photos" / name).read_bytes()


def test_a_diagnosis_named_for_the_text_is_refused_and_nothing_is_written(
    table: Path, tmp_path: Path
) -> None:
    columns = {**COLUMNS, "text": "disease"}
    with pytest.raises(DataError, match="'retinitis pigmentosa' of label Inherited is in 1 texts"):
        import_data([("table", table)], tmp_path / "out", columns=columns)
    assert not (tmp_path / "out").exists()
    report = import_data(
        [("table", table)], tmp_path / "out", columns=columns, allow_label_words=True
    )
    assert len(report["leaks"]["words"]) == 3


def test_names_of_the_users_own_map_are_looked_for_in_texts(table: Path, tmp_path: Path) -> None:
    own = write_csv(
        tmp_path / "own.csv",
        ["disease", "label", "synonyms"],
        ["retinitis pigmentosa", "rod", "poor vision at night"],
        ["*", "other", ""],
    )
    with pytest.raises(DataError, match="'poor vision at night' of label rod is in 1 texts"):
        import_data([("table", table)], tmp_path / "out", diseases=own, columns=COLUMNS)


def test_unknown_diseases_are_named_with_their_number_and_the_file_to_edit(
    table: Path, tmp_path: Path
) -> None:
    table.write_text(table.read_text().replace("Best disease", "Blue sclera"))
    with pytest.raises(DataError, match=r"diseases\.csv: has no row for 'Blue sclera' \(1\)"):
        import_data([("table", table)], tmp_path / "out", columns=COLUMNS)


def test_a_case_without_a_diagnosis_is_left_out_and_counted(table: Path, tmp_path: Path) -> None:
    table.write_text(table.read_text().replace("Best disease", ""))
    report = import_data([("table", table)], tmp_path / "out", columns=COLUMNS)
    assert (report["cases"], report["left_out"]) == (2, {"no diagnosis": 1})


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (None, InputError, "columns: found none, expected image and diagnosis"),
        ({"image": "photo"}, InputError, "columns: found image, expected image and diagnosis"),
        ({**COLUMNS, "grade": "x"}, InputError, "columns: found image, .*grade, expected"),
        ({**COLUMNS, "text": "story"}, DataError, "row 1: columns missing 'story'"),
        ({**COLUMNS, "image": "case"}, DataError, "7 is missing, expected a file"),
        (
            {**COLUMNS, "mask": "editor"},
            DataError,
            "row 4, column editor: found 'x', expected KIND",
        ),
    ],
)
def test_columns_that_do_not_fit_the_table_are_named(
    table: Path, tmp_path: Path, columns: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        import_data([("table", table)], tmp_path / "out", columns=columns)
    assert not (tmp_path / "out").exists()


def test_a_picture_listed_twice_is_refused(table: Path, tmp_path: Path) -> None:
    table.write_text(table.read_text().replace("b.JPG", "a.jpg"))
    with pytest.raises(DataError, match=r"a\.jpg is listed twice"):
        import_data([("table", table)], tmp_path / "out", columns=COLUMNS)


def test_several_sources_become_one_data_set(fives: Path, hrf: Path, tmp_path: Path) -> None:
    import_data([("fives", fives), ("hrf", hrf)], tmp_path / "out")
    sources = [row.source for row in open_data(tmp_path / "out").rows]
    assert sources == ["FIVES"] * 4 + ["HRF"] * 3


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("fives", "found no picture, expected train/Original/1_A.png"),
        ("hrf", "found no picture, expected images/01_dr.JPG"),
        ("idrid", "found no picture, expected A. Segmentation"),
        ("odir-5k", "found no full_df.csv or data.xlsx"),
        ("table", "is missing, expected a table"),
    ],
)
def test_a_folder_that_is_not_in_the_layout_says_what_was_expected(
    layout: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        import_data([(layout, tmp_path / "empty")], tmp_path / "out", columns=COLUMNS)


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found 'refuge', expected table or one of fives, hrf"):
        import_data([("refuge", tmp_path)], tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        ("fives", "train/Original/4_X.png", "expected a name such as 1_A.png"),
        ("fives", "train/Original/4_A.png", r"Ground truth/4_A\.png is missing"),
        ("hrf", "images/03_x.jpg", "expected a name such as 01_dr.JPG"),
        ("hrf", "images/03_h.jpg", r"manual1/03_h\.tif is missing"),
    ],
)
def test_a_picture_without_its_place_in_the_layout_is_named(
    layout: str, name: str, message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(layout)
    draw(folder / name)
    with pytest.raises(DataError, match=message):
        import_data([(layout, folder)], tmp_path / "out")


def test_an_odir_picture_that_is_nowhere_is_named_by_row(odir: Path, tmp_path: Path) -> None:
    for path in odir.rglob("1_right.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=r"row 4, column Right-Fundus: '1_right\.jpg' is nowhere"):
        import_data([("odir-5k", odir)], tmp_path / "out")


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"no photographs in {PHOTOGRAPHS}")
def test_the_real_photographs_are_imported_through_the_table(
    identity: Path, tmp_path: Path
) -> None:
    columns = {
        "image": "file",
        "diagnosis": "disease",
        "patient_id": "patient_id",
        "source": "source",
        "mask": "mask",
    }
    table = PHOTOGRAPHS / "labels.csv"
    report = import_data(
        [("table", table)], tmp_path / "a", diseases=identity, columns={**columns, "text": "text"}
    )
    assert list(report["labels"]) == [
        "age-related macular degeneration",
        "diabetic retinopathy",
        "glaucoma",
        "healthy",
    ]
    assert report["left_out"]["no diabetic retinopathy"] > 100
    data = open_data(tmp_path / "a")
    assert data[0].image.shape[:2] == data[0].masks["disc"].shape
    with pytest.raises(DataError, match="'glaucoma' of label glaucoma is in"):
        import_data(
            [("table", table)],
            tmp_path / "b",
            diseases=identity,
            columns={**columns, "text": "keywords"},
        )

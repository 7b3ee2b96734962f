import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdf_sdk.errors import DataError, InputError
from mdf_training.data.cases import Case, Row
from mdf_training.data.folder import (
    COLUMNS,
    FolderData,
    check_data,
    drop_broken,
    open_data,
    save_data,
)
from mdf_training.data.splits import save_split
from mdf_training.data.synthetic import SyntheticData


def row(file="a.png", label="Acquired", text="Blurred vision.", mask="", patient="p1", source="s"):
    return [file, label, text, mask, patient, source]


def write_table(folder: Path, *rows, header=COLUMNS, encoding="utf-8"):
    with (folder / "labels.csv").open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


@pytest.fixture
def folder(tmp_path):
    """A data set of one case: a.png, 60 x 40 px, with a vessel mask."""
    Image.new("RGB", (60, 40), (200, 90, 40)).save(tmp_path / "a.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[1, 2] = 1
    Image.fromarray(mask).save(tmp_path / "vessel.png")
    write_table(tmp_path, row(mask="vessel:vessel.png"))
    return tmp_path


def test_a_folder_gives_its_row_picture_and_mask(folder):
    data = FolderData(folder)
    case = data[0]
    assert (len(data), data.labels, data.mask_kinds) == (1, ("Acquired",), ("vessel",))
    assert data.rows == (Row("a.png", "Acquired", "Blurred vision.", "p1", "s"),)
    assert case.image.shape == (40, 60, 3)
    assert case.image.dtype == np.uint8
    assert case.image[0, 0].tolist() == [200, 90, 40]
    assert np.argwhere(case.masks["vessel"]).tolist() == [[1, 2]]


def test_a_kind_without_annotation_is_absent_from_the_masks(folder):
    write_table(folder, row())
    assert FolderData(folder)[0].masks == {}


def test_columns_may_come_in_any_order_behind_a_byte_order_mark(folder):
    write_table(folder, row()[::-1], header=COLUMNS[::-1], encoding="utf-8-sig")
    assert FolderData(folder).rows[0].file == "a.png"


def test_the_opaque_alpha_of_a_mask_is_not_the_mask(folder):
    Image.new("RGBA", (60, 40), (0, 0, 0, 255)).save(folder / "vessel.png")
    assert not FolderData(folder)[0].masks["vessel"].any()


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (COLUMNS[:-1], "missing 'source'"),
        ((*COLUMNS, "age"), "unknown 'age'"),
        ((*COLUMNS, "file"), "repeated 'file'"),
        (("File", *COLUMNS[1:]), "missing 'file'; unknown 'File'"),
    ],
)
def test_wrong_columns_are_named(folder, header, named):
    write_table(folder, header=header)
    with pytest.raises(DataError, match=f"row 1: columns {named}; expected exactly file, label"):
        FolderData(folder)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (row(text=" "), "row 2, column text: empty"),
        (row(patient=""), "row 2, column patient_id: empty"),
        (row(file=""), "row 2, column file: empty"),
        (row(file="b.png"), "row 2, column file: 'b.png' is missing"),
        (row(file="../a.png"), "row 2, column file: '../a.png' leads out of the folder"),
        (row(file="/etc/hostname"), "row 2, column file: '/etc/hostname' leads out"),
        (row(file="C:\\a.png"), "row 2, column file: .* leads out"),
        (row(mask="vessel.png"), "row 2, column mask: found 'vessel.png', expected KIND:PATH"),
        (row(mask="vessel:vessel.jpg"), "row 2, column mask: found 'vessel:vessel.jpg'"),
        (row(mask="disc:no.png"), "row 2, column mask: 'no.png' is missing"),
        (row(mask="a:vessel.png;a:vessel.png"), "row 2, column mask: found kind 'a' twice"),
        (row(mask="a:../vessel.png"), "row 2, column mask: .* leads out"),
        (row(label="Other"), "row 2, column label: found 'Other', expected one of Acquired"),
    ],
)
def test_a_wrong_cell_is_named_by_row_and_column(folder, cells, message):
    write_table(folder, cells)
    with pytest.raises(DataError, match=message):
        check_data(folder, labels=("Acquired", "Inherited"))


def test_a_link_that_leads_out_of_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "b.png"
    Image.new("RGB", (60, 40)).save(outside)
    (folder / "b.png").symlink_to(outside)
    write_table(folder, row(file="b.png"))
    with pytest.raises(DataError, match=r"'b.png' leads out of the folder"):
        check_data(folder)


def test_a_picture_listed_twice_is_refused_however_it_is_spelled(folder):
    write_table(folder, row(), row(file="./a.png"))
    with pytest.raises(DataError, match=r"row 3, column file: './a.png' is already in row 2"):
        check_data(folder)


def test_rows_are_counted_as_a_spreadsheet_counts_them(folder):
    write_table(folder, row(text="two\nlines"), [""] * 6, row(file="b.png"))
    with pytest.raises(DataError, match="row 4, column file"):
        check_data(folder)


def test_all_problems_come_in_one_error_that_shows_twenty(folder):
    write_table(folder, *(row(file=f"missing-{i}.png", text="") for i in range(15)))
    with pytest.raises(DataError) as caught:
        check_data(folder)
    assert len(str(caught.value).splitlines()) == 1 + 20 + 1
    assert "and 10 more" in str(caught.value)


def test_a_table_without_rows_is_refused(folder):
    write_table(folder)
    with pytest.raises(DataError, match="no rows"):
        check_data(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "labels.csv is missing"),
        (b"", "row 1: columns missing 'file'"),
        (b"file,label\xff", "not UTF-8"),
        (",".join(COLUMNS).encode() + b"\na.png,Acquired,one, two,,p,s\n", "row 2: 7 cells"),
        (",".join(COLUMNS).encode() + b'\n"a.png', "not a CSV table"),
    ],
)
def test_an_unreadable_table_is_a_data_error(folder, content, message):
    (folder / "labels.csv").unlink()
    if content is not None:
        (folder / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        FolderData(folder)


def test_a_broken_picture_is_named_when_it_is_read(folder):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:50])
    data = FolderData(folder)
    with pytest.raises(DataError, match=r"row 2, column file: .*a\.png.*a broken one"):
        data[0]


def test_a_picture_is_read_as_the_runtime_reads_it(folder):
    Image.fromarray(np.full((40, 60), 0x8123, np.uint16)).save(folder / "a.png")
    image = FolderData(folder)[0].image
    assert image.shape == (40, 60, 3)
    assert np.unique(image).tolist() == [0x81]


def test_a_mask_of_another_size_is_named_when_it_is_read(folder):
    Image.new("L", (40, 60)).save(folder / "vessel.png")
    with pytest.raises(DataError, match=r"vessel.png is 40 x 60 px.*a.png, 60 x 40 px"):
        FolderData(folder)[0]


def test_a_palette_mask_is_read_by_its_colors(folder):
    mask = Image.new("P", (60, 40), 0)
    mask.putpalette([255, 255, 255, 0, 0, 0])  # index 0 is white
    mask.paste(1, (0, 0, 30, 40))
    mask.save(folder / "vessel.png")
    read = FolderData(folder)[0].masks["vessel"]
    assert not read[:, :30].any()
    assert read[:, 30:].all()


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 300 + ".png"])
def test_a_path_that_no_system_takes_is_named_with_its_row(folder, name):
    write_table(folder, row(file=name))
    with pytest.raises(DataError, match=r"row 2, column file|not a CSV table"):
        FolderData(folder)


def assert_same_case(one: Case, other: Case):
    assert {**vars(one), "image": None, "masks": None} == {
        **vars(other),
        "image": None,
        "masks": None,
    }
    np.testing.assert_array_equal(one.image, other.image)
    assert list(one.masks) == list(other.masks)
    for kind in one.masks:
        np.testing.assert_array_equal(one.masks[kind], other.masks[kind])


def test_a_saved_data_set_opens_as_it_was(tmp_path):
    data = SyntheticData(6, seed=3)
    save_data(data, tmp_path / "saved")
    saved = open_data(str(tmp_path / "saved"))
    assert saved.rows == data.rows
    assert (saved.labels, saved.mask_kinds) == (data.labels, data.mask_kinds)
    for index in range(len(data)):
        assert_same_case(saved[index], data[index])


def test_saving_over_other_files_is_refused(folder):
    before = (folder / "labels.csv").read_bytes()
    with pytest.raises(InputError, match="expected a new or empty"):
        save_data(SyntheticData(1, seed=0), folder)
    assert (folder / "labels.csv").read_bytes() == before


def test_a_synthetic_spec_opens_that_many_cases_of_that_seed():
    assert open_data("synthetic:5:7").rows == SyntheticData(5, seed=7).rows


@pytest.mark.parametrize(
    "spec", ["synthetic:", "synthetic:5", "synthetic:5:-1", "synthetic:0:1", "synthetic:5:1:2"]
)
def test_a_malformed_synthetic_spec_is_a_data_error(spec):
    with pytest.raises(DataError, match="synthetic:"):
        open_data(spec)


def save_folder(folder: Path, cases: int) -> Path:
    save_data(SyntheticData(cases, seed=3), folder)
    return folder


def break_files(folder: Path) -> list[str]:
    """Break picture 1 and a mask of case 3; return the files of the two cases."""
    for name in ("images/00001.png", "masks/00003-vessel.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    return ["images/00001.png", "images/00003.png"]


def test_all_broken_pictures_and_masks_are_named_in_one_error(tmp_path):
    folder = save_folder(tmp_path / "data", 5)
    break_files(folder)
    with pytest.raises(DataError, match=r"2 of 5 cases cannot be read; .*--skip-broken") as caught:
        drop_broken(open_data(folder), skip=False)
    assert "row 3, column file" in str(caught.value)
    assert "row 5, column mask" in str(caught.value)


def test_broken_cases_are_left_out_on_request_and_named(tmp_path):
    folder = save_folder(tmp_path / "data", 5)
    files = break_files(folder)
    data, skipped = drop_broken(open_data(folder), skip=True)
    assert list(skipped) == files
    assert [row.file[-5] for row in data.rows] == ["0", "2", "4"]
    assert open_data(folder, skip_broken=True).rows == data.rows
    assert_same_case(data[1], SyntheticData(5, seed=3)[2])


def test_a_data_set_of_broken_pictures_alone_is_refused(folder):
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 1 cases cannot be read"):
        drop_broken(open_data(folder), skip=True)


def test_a_part_of_a_split_holds_its_cases_alone(tmp_path):
    data = SyntheticData(4, seed=3)
    save_split(tmp_path / "split.csv", data.rows, ["train", "test", "validation", "test"])
    tested = open_data("synthetic:4:3", split=tmp_path / "split.csv", part="test")
    assert tested.rows == (data.rows[1], data.rows[3])
    assert_same_case(tested[1], data[3])
    both = open_data("synthetic:4:3", split=tmp_path / "split.csv", part=("train", "validation"))
    assert both.rows == (data.rows[0], data.rows[2])


def test_a_part_that_the_split_does_not_have_is_refused(tmp_path):
    save_split(tmp_path / "split.csv", SyntheticData(2, seed=3).rows, ["train", "test"])
    with pytest.raises(
        DataError, match="found no case in tset, expected one of its parts test, tr"
    ):
        open_data("synthetic:2:3", split=tmp_path / "split.csv", part="tset")


@pytest.mark.parametrize("half", [{"split": "split.csv"}, {"part": "test"}])
def test_a_split_without_a_part_or_a_part_without_a_split_is_refused(half):
    with pytest.raises(InputError, match="expected both or neither"):
        open_data("synthetic:2:3", **half)

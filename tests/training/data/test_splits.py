"""data.splits: a patient is on one side, labels and sources keep their shares."""

import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdf_sdk.errors import DataError, InputError
from mdf_training.data.cases import Row
from mdf_training.data.splits import (
    describe_split,
    join_rows,
    leave_sources_out,
    load_split,
    make_split,
    save_split,
    split_by_patient,
)

SHARES = {"train": 0.6, "validation": 0.1, "test": 0.3}


def make_rows(*cells: str) -> list[Row]:
    """Rows of "patient label source" each; the source is s when left out."""
    table = [[*cell.split(), "s"] for cell in cells]
    return [Row(f"{i}.png", c[1], "text", c[0], c[2]) for i, c in enumerate(table)]


CASES = st.lists(
    st.builds(
        "{} {} {}".format,
        st.sampled_from("abcdefghij"),
        st.sampled_from("XY"),
        st.sampled_from("st"),
    ),
    min_size=1,
)


@given(CASES, st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=3))
def test_patients_and_duplicates_are_never_torn_apart(
    cells: list[str], numbers: list[tuple[int, int]]
) -> None:
    rows = make_rows(*cells)
    pairs = [(a % len(rows), b % len(rows)) for a, b in numbers]
    parts = make_split(rows, SHARES, 0, pairs)
    assert len(parts) == len(rows)
    assert set(parts) <= set(SHARES)
    for patient in "abcdefghij":
        assert len({p for p, row in zip(parts, rows, strict=True) if row.patient_id == patient}) < 2
    assert all(parts[a] == parts[b] for a, b in pairs)
    assert parts == make_split(rows, SHARES, 0, pairs)


def test_labels_and_their_sources_keep_their_shares() -> None:
    rows = make_rows(
        *(f"a{i} rare s" for i in range(20)),
        *(f"b{i} common s" for i in range(100)),
        *(f"c{i} common t" for i in range(60)),
    )
    parts = make_split(rows, SHARES, 0, [])
    counts = Counter((row.label, row.source, p) for row, p in zip(rows, parts, strict=True))
    for label, source, size in (("rare", "s", 20), ("common", "s", 100), ("common", "t", 60)):
        for part, share in SHARES.items():
            assert abs(counts[label, source, part] - share * size) <= 1


def test_patients_with_many_pictures_do_not_shift_the_shares() -> None:
    rows = make_rows(*(f"p{i} X" for i in range(100) for _ in range(20 if i < 5 else 1)))
    counts = Counter(make_split(rows, SHARES, 1, []))
    assert all(abs(counts[part] / len(rows) - share) < 0.1 for part, share in SHARES.items())


@pytest.mark.parametrize("patients", [3, 4, 5])
def test_a_label_with_enough_patients_is_in_every_part(patients: int) -> None:
    rows = make_rows(*(f"p{i} X" for i in range(patients)))
    assert set(make_split(rows, SHARES, 0, [])) == set(SHARES)


def test_a_patient_with_two_labels_counts_for_the_rarer() -> None:
    eyes = (f"p{i} {label}" for i in range(10) for label in ("common", "rare"))
    rows = make_rows(*eyes, *(f"q{i} common" for i in range(40)))
    parts = make_split(rows, {"train": 0.5, "test": 0.5}, 0, [])
    rare = Counter(p for p, row in zip(parts, rows, strict=True) if row.label == "rare")
    assert rare == {"train": 5, "test": 5}


def test_another_seed_draws_other_parts() -> None:
    rows = make_rows(*(f"p{i} X" for i in range(50)))
    assert make_split(rows, SHARES, 0, []) != make_split(rows, SHARES, 1, [])


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"train": 0.6},
        {"train": 1.2, "test": -0.2},
        {"train": float("nan"), "test": 0.3},
        {"train": 0.7, "test": float("nan")},
        {"train": float("inf"), "test": 0.3},
    ],
)
def test_shares_that_are_no_whole_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(InputError, match="positive shares that add up to 1"):
        make_split(make_rows("p X"), shares, 0, [])


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed: found -3, expected 0 or more"):
        make_split(make_rows("p X"), SHARES, -3, [])


def test_rows_are_joined_through_patients_and_pairs() -> None:
    rows = make_rows("a X", "b X", "a X", "c X", "d X")
    assert join_rows(rows, [(2, 3)]).tolist() == [0, 1, 0, 0, 2]


def test_a_source_left_out_is_the_test_and_its_patients_are_nowhere_else() -> None:
    rows = make_rows("a X s", "b X s", "a X t", *(f"p{i} X t" for i in range(20)), "c X t")
    duplicate_of_b = len(rows) - 1
    shares = {"train": 0.9, "validation": 0.1}
    parts = leave_sources_out(rows, ["s"], shares, 0, [(1, duplicate_of_b)])
    assert parts[:3] == ["test", "test", "unused"]
    assert parts[duplicate_of_b] == "unused"
    assert Counter(parts[3:duplicate_of_b]) == {"train": 18, "validation": 2}


@pytest.mark.parametrize("sources", [["none"], ["s", "t"], []])
def test_a_source_that_cannot_be_left_out_is_refused(sources: list[str]) -> None:
    rows = make_rows("a X s", "b X t")
    with pytest.raises(InputError, match="expected some but not all of s, t"):
        leave_sources_out(rows, sources, {"train": 1.0}, 0, [])


def test_a_test_share_beside_a_source_left_out_is_refused() -> None:
    with pytest.raises(InputError, match="test is the source"):
        leave_sources_out(make_rows("a X s", "b X t"), ["s"], SHARES, 0, [])


def test_a_saved_split_is_read_as_it_was(tmp_path: Path) -> None:
    rows = make_rows("a X", "b Y", "c X")
    save_split(tmp_path / "split.csv", rows, ["train", "test", "train"])
    assert load_split(tmp_path / "split.csv", rows[::-1]) == ["train", "test", "train"]
    assert describe_split(tmp_path / "split.csv")["name"] == "split.csv"


def test_a_saved_split_is_never_overwritten(tmp_path: Path) -> None:
    rows = make_rows("a X")
    save_split(tmp_path / "split.csv", rows, ["train"])
    with pytest.raises(InputError, match="expected the name of a new file"):
        save_split(tmp_path / "split.csv", rows, ["test"])
    assert load_split(tmp_path / "split.csv", rows) == ["train"]


def write_split(path: Path, *table: str) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["file", "part"], *(cells.split() for cells in table)])
    return path


def test_a_patient_in_two_parts_is_refused_by_name(tmp_path: Path) -> None:
    path = write_split(tmp_path / "split.csv", "0.png train", "1.png test", "2.png test")
    with pytest.raises(DataError, match=r"1 patients are in two parts: a \(test, train\)"):
        load_split(path, make_rows("a X", "a X", "b X"))


def test_an_unused_picture_may_be_of_a_tested_patient(tmp_path: Path) -> None:
    path = write_split(tmp_path / "split.csv", "0.png unused", "1.png test")
    assert load_split(path, make_rows("a X", "a X")) == ["unused", "test"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (["0.png train"], "1 files are in no part: 1.png"),
        (["0.png train", "1.png test", "2.png test"], "1 files are not in the data: 2.png"),
        (["0.png train", "0.png test"], "row 3: '0.png' is already in part train"),
        (["0.png train", "1.png  "], "row 3: (found an empty cell|1 cells)"),
    ],
)
def test_a_split_of_other_data_is_refused(tmp_path: Path, table: list[str], message: str) -> None:
    path = write_split(tmp_path / "split.csv", *table)
    with pytest.raises(DataError, match=message):
        load_split(path, make_rows("a X", "b X"))


def test_a_missing_split_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing, expected a table with columns file, part"):
        load_split(tmp_path / "none.csv", make_rows("a X"))


class Rows:
    """A data set that has rows only."""

    def __init__(self, patients_and_labels):
        self.rows = [
            Row(f"{i}.png", label, "text", patient, "s")
            for i, (patient, label) in enumerate(patients_and_labels)
        ]


@given(
    st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from("XY")), min_size=1),
    st.floats(0.01, 0.99),
    st.integers(0, 99),
)
def test_a_split_puts_every_case_on_one_side_and_no_patient_on_both(cases, fraction, seed):
    data = Rows(cases)
    train, held = split_by_patient(data, fraction, seed)
    assert sorted(train + held) == list(range(len(cases)))
    assert not {cases[i][0] for i in train} & {cases[i][0] for i in held}
    assert (train, held) == split_by_patient(data, fraction, seed)


def test_a_split_keeps_the_share_of_a_rare_label():
    data = Rows([(f"p{i}", "rare" if i < 20 else "common") for i in range(200)])
    _, held = split_by_patient(data, 0.25, seed=0)
    assert sum(i < 20 for i in held) == 5
    assert sum(i >= 20 for i in held) == 45


def test_another_seed_splits_otherwise():
    data = Rows([(f"p{i}", "X") for i in range(50)])
    assert split_by_patient(data, 0.5, seed=0) != split_by_patient(data, 0.5, seed=1)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_split_needs_a_fraction_between_0_and_1(fraction):
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        split_by_patient(Rows([("p", "X")]), fraction, seed=0)

"""Public data sets and case tables as they are published in, one data set folder out.

A reader knows one layout and yields records; `import_data` gives each its label by the disease map,
copies the pictures untouched and writes masks in the format. No reader hands on the diagnosis as
text.
"""

import csv
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mdf_sdk.errors import DataError, InputError
from mdf_sdk.staging import staged_directory
from mdf_training.data.cases import Row
from mdf_training.data.diseases import LEFT_OUT, DiseaseMap, read_diseases
from mdf_training.data.folder import COLUMNS, check_data, parse_masks, read_mask
from mdf_training.data.leaks import check_leaks
from mdf_training.data.synthetic import NEUTRAL_TEXT
from mdf_training.data.tables import read_table

FIVES_DISEASES = {
    "A": "age-related macular degeneration",
    "D": "diabetic retinopathy",
    "G": "glaucoma",
    "N": "healthy",
}
HRF_DISEASES = {"dr": "diabetic retinopathy", "g": "glaucoma", "h": "healthy"}
IDRID_PARTS = ("a. Training Set", "b. Testing Set")
# Folder of the masks -> ending of their names, which is also the kind of mask; OD is the disc.
IDRID_MASKS = {
    "1. Microaneurysms": "MA",
    "2. Haemorrhages": "HE",
    "3. Hard Exudates": "EX",
    "4. Soft Exudates": "SE",
    "5. Optic Disc": "OD",
}
ODIR_TABLES = ("full_df.csv", "data.xlsx", "ODIR-5K_Training_Annotations(Updated)_V2.xlsx")
ODIR_COLUMNS = (
    *("ID", "Patient Age", "Patient Sex"),
    *("Left-Fundus", "Right-Fundus", "Left-Diagnostic Keywords", "Right-Diagnostic Keywords"),
)
# What a case table's columns may be named for; without `patient_id` every picture is a patient.
TABLE_COLUMNS = ("image", "diagnosis", "text", "patient_id", "source", "mask")


@dataclass(frozen=True)
class Record:
    """One photograph as its source has it.

    Attributes:
        diseases: every diagnosis and finding of the photograph.
        text: empty where the source has none.
        masks: kind -> a picture of any format, not zero inside.
    """

    picture: Path
    diseases: tuple[str, ...]
    patient_id: str
    source: str
    text: str = ""
    masks: Mapping[str, Path] = field(default_factory=dict)


def import_data(
    sources: Iterable[tuple[str, Path]],
    out: Path,
    *,
    diseases: Path | None = None,
    columns: Mapping[str, str] | None = None,
    allow_label_words: bool = False,
) -> dict[str, Any]:
    """Write one data set folder from one source or several; it appears whole or not at all.

    Args:
        sources: a layout, "table" or a key of LAYOUTS, and where it lies.
        out: new or empty.
        diseases: disease map; the packaged one when left out.
        columns: of a table: a name of TABLE_COLUMNS -> the table's own.
        allow_label_words: import texts that name the diagnosis.

    Returns:
        JSON types: `cases`, `labels` label -> count, `left_out` reason -> count, `leaks`.

    Raises:
        DataError: a source is not in its layout, a disease is not in the map, or texts give the
            label away.
        InputError: an unknown layout, or `out` is taken.
    """
    found = [record for layout, path in sources for record in _read(layout, path, columns or {})]
    known = DiseaseMap(diseases)
    known.check(name for record in found for name in record.diseases)
    labels = [known.label(record.diseases) for record in found]
    kept = [(r, label) for r, label in zip(found, labels, strict=True) if label != LEFT_OUT]
    if not kept:
        raise DataError(
            f"{known.path}: found no case among {len(found)} with a label, expected some"
        )
    rows = _make_rows(kept)
    leaks = check_leaks(
        rows,
        sorted({row.label for row in rows}),
        allow=allow_label_words,
        diseases=read_diseases(known.path),
    )
    with staged_directory(out) as staging:
        _write(staging, rows, [record for record, _ in kept])
        check_data(staging)
    left_out = Counter(
        "; ".join(sorted(set(record.diseases))) or "no diagnosis"
        for record, label in zip(found, labels, strict=True)
        if label == LEFT_OUT
    )
    return {
        "cases": len(kept),
        "labels": dict(sorted(Counter(label for _, label in kept).items())),
        "left_out": dict(left_out.most_common()),
        "leaks": leaks.to_dict(),
        "warnings": leaks.warnings,
    }


def read_fives(folder: Path) -> Iterator[Record]:
    """FIVES: `train|test/Original/1_A.png` and the vessels in `Ground truth/1_A.png`."""
    pictures = sorted(folder.glob("*/Original/*.png"), key=_natural)
    for picture in pictures:
        name = re.fullmatch(r"\d+_([ADGN])", picture.stem)
        if name is None:
            raise DataError(f"{picture}: expected a name such as 1_A.png, with A, D, G or N")
        part = picture.parent.parent
        yield Record(
            picture,
            (FIVES_DISEASES[name[1]],),
            patient_id=f"FIVES-{part.name}-{picture.stem}",
            source="FIVES",
            masks={"vessel": _existing(part / "Ground truth" / picture.name)},
        )
    _check_found(pictures, folder, "train/Original/1_A.png and train/Ground truth/1_A.png")


def read_hrf(folder: Path) -> Iterator[Record]:
    """HRF: `images/01_dr.JPG`, and the vessels in `manual1/01_dr.tif`; each is another patient."""
    pictures = sorted(p for p in folder.glob("images/*") if p.suffix.lower() == ".jpg")
    for picture in pictures:
        name = re.fullmatch(r"\d+_(dr|g|h)", picture.stem)
        if name is None:
            raise DataError(f"{picture}: expected a name such as 01_dr.JPG, with dr, g or h")
        yield Record(
            picture,
            (HRF_DISEASES[name[1]],),
            patient_id=f"HRF-{picture.stem}",
            source="HRF",
            masks={"vessel": _existing(folder / "manual1" / f"{picture.stem}.tif")},
        )
    _check_found(pictures, folder, "images/01_dr.JPG and manual1/01_dr.tif")


def read_idrid(folder: Path) -> Iterator[Record]:
    """IDRiD: `A. Segmentation` with masks of lesions and disc, `B. Disease Grading`, or one.

    All photographs of A show diabetic retinopathy; those of B from grade 1.
    """
    count = 0
    for part in IDRID_PARTS:
        pictures = folder / "A. Segmentation" / "1. Original Images" / part
        masks = folder / "A. Segmentation" / "2. All Segmentation Groundtruths" / part
        for picture in sorted(pictures.glob("*.jpg")):
            files = {
                "disc" if end == "OD" else end: masks / kind / f"{picture.stem}_{end}.tif"
                for kind, end in IDRID_MASKS.items()
            }
            count += 1
            yield Record(
                picture,
                ("diabetic retinopathy",),
                patient_id=f"IDRiD-A-{picture.stem}",
                source="IDRiD",
                masks={kind: file for kind, file in files.items() if file.is_file()},
            )
        grading = folder / "B. Disease Grading"
        for table in sorted(grading.glob(f"2. Groundtruths/{part[0]}. *.csv")):
            for number, cells in read_table(table, ("Image name", "Retinopathy grade")):
                grade = cells["Retinopathy grade"]
                if grade not in ("0", "1", "2", "3", "4"):
                    raise DataError(
                        f"{table}, row {number}, column Retinopathy grade: found {grade!r},"
                        " expected 0 to 4"
                    )
                name = cells["Image name"]
                count += 1
                yield Record(
                    _existing(grading / "1. Original Images" / part / f"{name}.jpg"),
                    ("no diabetic retinopathy" if grade == "0" else "diabetic retinopathy",),
                    patient_id=f"IDRiD-B-{part[0]}-{name}",
                    source="IDRiD",
                )
    _check_found(range(count), folder, "A. Segmentation/1. Original Images/a. Training Set/*.jpg")


def read_odir(folder: Path) -> Iterator[Record]:
    """ODIR-5K: one of ODIR_TABLES, and the pictures it names anywhere below.

    A diagnosis is an eye's own keywords; the columns N to O are the patient's, both eyes together.
    The keywords never become text: that is age, sex and eye.
    """
    table = next((p for name in ODIR_TABLES for p in sorted(folder.rglob(name))), None)
    if table is None:
        raise DataError(f"{folder}: found no {' or '.join(ODIR_TABLES)}, expected ODIR-5K")
    pictures: dict[str, Path] = {}
    # The camera's own come before the smaller copies that are packed beside them.
    for path in sorted(folder.rglob("*.jpg"), key=lambda p: ("preprocessed_images" in p.parts, p)):
        pictures.setdefault(path.name, path)
    seen: set[str] = set()
    for number, cells in read_table(table, ODIR_COLUMNS):
        for side in ("Left", "Right"):
            name = cells[f"{side}-Fundus"]
            if name in seen:  # full_df.csv has a row for each eye, with both eyes in it
                continue
            seen.add(name)
            if name not in pictures:
                raise DataError(
                    f"{table}, row {number}, column {side}-Fundus: {name!r} is nowhere in {folder}"
                )
            keywords = re.split("[,，]", cells[f"{side}-Diagnostic Keywords"])
            yield Record(
                pictures[name],
                _names(keywords),
                patient_id=f"ODIR-{cells['ID']}",
                source="ODIR-5K",
                text=f"{cells['Patient Age']}-year-old {cells['Patient Sex'].lower()} patient,"
                f" {side.lower()} eye.",
            )


def read_case_table(table: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """A CSV or Excel table of case reports; its pictures and masks lie relative to it.

    A diagnosis may be several, A;B. A mask is KIND:PATH;KIND:PATH.

    Args:
        columns: a name of TABLE_COLUMNS -> the table's own; `image` and `diagnosis` are needed.
    """
    wrong = [name for name in columns if name not in TABLE_COLUMNS]
    missing = [name for name in ("image", "diagnosis") if name not in columns]
    if wrong or missing:
        raise InputError(
            f"columns: found {', '.join(columns) or 'none'}, expected image and diagnosis, and as"
            " the table has them text, patient_id, source and mask:"
            " --columns image=FILE,diagnosis=DISEASE,..."
        )
    for number, row in read_table(table, tuple(columns.values())):
        cells = dict.fromkeys(TABLE_COLUMNS, "") | {k: row[name] for k, name in columns.items()}
        try:
            masks = parse_masks(cells["mask"])
        except ValueError as error:
            raise DataError(f"{table}, row {number}, column {columns['mask']}: {error}") from error
        yield Record(
            _existing(table.parent / cells["image"]),
            _names(cells["diagnosis"].split(";")),
            patient_id=cells["patient_id"] or f"{table.stem}-row-{number}",
            source=cells["source"] or table.stem,
            text=cells["text"],
            masks={kind: _existing(table.parent / name) for kind, name in masks.items()},
        )


LAYOUTS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    "fives": read_fives,
    "hrf": read_hrf,
    "idrid": read_idrid,
    "odir-5k": read_odir,
}


def _read(layout: str, path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    if layout == "table":
        return read_case_table(path, columns)
    if layout not in LAYOUTS:
        raise InputError(f"layout: found {layout!r}, expected table or one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout](path)


def _make_rows(kept: Sequence[tuple[Record, str]]) -> list[Row]:
    """Give every record its row; pictures are numbered, and keep their names behind the number."""
    first: dict[Path, int] = {}
    rows = []
    for index, (record, label) in enumerate(kept):
        if first.setdefault(record.picture.resolve(), index) != index:
            raise DataError(f"{record.picture} is listed twice, expected every picture once")
        stem = re.sub(r"[^\w.-]+", "_", record.picture.stem)
        file = f"images/{index:05d}-{stem}{record.picture.suffix.lower()}"
        rows.append(Row(file, label, record.text or NEUTRAL_TEXT, record.patient_id, record.source))
    return rows


def _write(folder: Path, rows: Sequence[Row], records: Sequence[Record]) -> None:
    """Write pictures, masks and labels.csv."""
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    table = []
    for index, (row, record) in enumerate(zip(rows, records, strict=True)):
        shutil.copyfile(record.picture, folder / row.file)
        masks = []
        for kind, path in record.masks.items():
            name = f"masks/{index:05d}-{kind}.png"
            _write_mask(path, folder / name)
            masks.append(f"{kind}:{name}")
        table.append([row.file, row.label, row.text, ";".join(masks), row.patient_id, row.source])
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([COLUMNS, *table])


def _write_mask(path: Path, out: Path) -> None:
    if path.suffix.lower() == ".png":
        shutil.copyfile(path, out)
    else:
        Image.fromarray(read_mask(path, "mask")).save(out)


def _names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(filter(None, (" ".join(name.split()) for name in names)))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} is missing, expected a file")
    return path


def _check_found(pictures: Sequence[object], folder: Path, expected: str) -> None:
    if not pictures:
        raise DataError(f"{folder}: found no picture, expected {expected}")


def _natural(path: Path) -> tuple[Path, int]:
    """Sort 2_A before 10_A; other names are refused later."""
    digits = re.match(r"\d+", path.stem)
    return path.parent, int(digits[0]) if digits else 0

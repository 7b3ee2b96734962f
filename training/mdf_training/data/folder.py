"""The data set format: a folder with labels.csv or a `synthetic:COUNT:SEED` spec in, cases out."""

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path, PureWindowsPath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from mdf_sdk.errors import DataError, ImageError, InputError
from mdf_sdk.photograph import Photograph, load_photograph
from mdf_sdk.staging import staged_directory
from mdf_training.data.cases import Case, DataSet, Row, Subset
from mdf_training.data.splits import load_split
from mdf_training.data.synthetic import SyntheticData
from mdf_training.data.tables import read_table

COLUMNS = ("file", "label", "text", "mask", "patient_id", "source")
MAX_PROBLEMS_SHOWN = 20
T = TypeVar("T")


class FolderData:
    """A folder with labels.csv, pictures and masks; checked as a whole when it is opened."""

    def __init__(self, folder: str | Path, labels: Iterable[str] | None = None) -> None:
        """Open `folder`.

        Args:
            labels: the labels that may occur; any label may when left out.

        Raises:
            DataError: the folder breaks the format (see `check_data`).
        """
        self.folder = Path(folder)
        check_data(self.folder, labels)
        table = list(_read_rows(self.folder))
        self._row_numbers = [number for number, _ in table]
        self._mask_files = [parse_masks(cells["mask"]) for _, cells in table]
        self.rows = tuple(
            Row(**{name: value for name, value in cells.items() if name != "mask"})
            for _, cells in table
        )
        self.labels = tuple(sorted({row.label for row in self.rows}))
        self.mask_kinds = tuple(dict.fromkeys(kind for files in self._mask_files for kind in files))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Case:
        return self.read(index, None)

    def read(self, index: int, least_px: int | None) -> Case:
        row = self.rows[index]
        where = f"{self.folder / 'labels.csv'}, row {self._row_numbers[index]}"
        photograph = _read_picture(self.folder / row.file, f"{where}, column file", least_px)
        masks = {}
        for kind, name in self._mask_files[index].items():
            mask = read_mask(self.folder / name, f"{where}, column mask")
            if mask.shape[::-1] != photograph.size:
                raise DataError(
                    f"{where}, column mask: {name} is {_size(*mask.shape[::-1])} px,"
                    f" expected the size of its picture {row.file}, {_size(*photograph.size)} px"
                )
            masks[kind] = mask
        return Case(**asdict(row), image=photograph.picture, masks=masks, scale=photograph.scale)


def open_data(
    spec: str | os.PathLike[str],
    labels: Iterable[str] | None = None,
    *,
    split: str | os.PathLike[str] | None = None,
    part: str | Sequence[str] | None = None,
    skip_broken: bool = False,
) -> DataSet:
    """Open the folder `spec`, or render `synthetic:COUNT:SEED`.

    Args:
        labels: the labels that may occur; any label may when left out.
        split: a file that `mdf split` wrote; all cases when left out.
        part: the part of `split`, or several.
        skip_broken: read every picture and mask first, and leave out those that cannot be read.

    Raises:
        DataError: the folder, the spec or the split breaks the format.
        InputError: one of `split` and `part` without the other.
    """
    spec = os.fspath(spec)
    if (split is None) != (part is None):
        raise InputError(f"found split {split!r} and part {part!r}, expected both or neither")
    data = _open_whole(spec, labels)
    if split is not None and part is not None:
        wanted = {part} if isinstance(part, str) else set(part)
        parts = load_split(split, data.rows)
        chosen = [i for i, name in enumerate(parts) if name in wanted]
        if not chosen:
            raise DataError(
                f"{os.fspath(split)}: found no case in {', '.join(sorted(wanted))}, expected one of"
                f" its parts {', '.join(sorted(set(parts)))}"
            )
        data = Subset(data, chosen)
    return drop_broken(data, skip=True)[0] if skip_broken else data


def drop_broken(data: DataSet, *, skip: bool) -> tuple[DataSet, tuple[str, ...]]:
    """Read every picture and mask once, so that no run meets a broken one half-way.

    Args:
        skip: leave out the cases that cannot be read; otherwise they are an error.

    Returns:
        The cases that can be read, and the files of the others.

    Raises:
        DataError: names the broken ones, all in one message; or nothing can be read.
    """
    if isinstance(data.data if isinstance(data, Subset) else data, SyntheticData):
        return data, ()  # rendered when asked for: there is nothing to break
    broken = {
        index: result
        for index, result in enumerate(read_cases(data, lambda case: None))
        if isinstance(result, DataError)
    }
    if not broken:
        return data, ()
    if not skip or len(broken) == len(data):
        raise DataError(
            list_problems(
                f"{len(broken)} of {len(data)} cases cannot be read; mend them, take them out of"
                " the table, or leave them out by --skip-broken:",
                [str(error) for error in broken.values()],
            )
        )
    whole = [i for i in range(len(data)) if i not in broken]
    return Subset(data, whole), tuple(data.rows[i].file for i in broken)


def read_cases(data: DataSet, examine: Callable[[Case], T]) -> Iterator[T | DataError]:
    """Read every case in threads and yield what `examine` says of it, in order.

    A case whose picture or masks cannot be read yields the error that says so.
    """

    def read(index: int) -> T | DataError:
        try:
            return examine(data[index])
        except DataError as error:
            return error

    with ThreadPoolExecutor() as threads:
        results = threads.map(read, range(len(data)))
        yield from tqdm(results, "reading", len(data), leave=False, disable=None)


def check_data(folder: str | Path, labels: Iterable[str] | None = None) -> None:
    """Check labels.csv and that every file it names is there; pictures are not decoded.

    Args:
        labels: the labels that may occur; any label may when left out.

    Raises:
        DataError: all problems in one message, each with its row as a spreadsheet counts it
            (the header is row 1), its column, what was found and what was expected.
    """
    folder = Path(folder)
    allowed = None if labels is None else set(labels)
    problems: list[str] = []
    first_row: dict[str, int] = {}
    number = 1
    for number, cells in _read_rows(folder):
        problems += [
            f"row {number}, column {column}: {problem}"
            for column, problem in _problems(folder, cells, allowed)
        ]
        path = os.path.normpath(cells["file"])
        if cells["file"] and first_row.setdefault(path, number) != number:
            problems.append(
                f"row {number}, column file: {cells['file']!r} is already in row"
                f" {first_row[path]}, expected every picture once"
            )
    if number == 1:
        problems.append("no rows below the header, expected one row for every picture")
    if problems:
        raise DataError(list_problems(f"{folder / 'labels.csv'} breaks the format:", problems))


def save_data(data: DataSet, folder: str | Path) -> None:
    """Write `data` as a folder that `FolderData` opens; it appears whole or not at all.

    Pictures and masks become numbered PNG files, so only `Row.file` may change.

    Raises:
        InputError: the folder exists and is not empty.
    """
    with staged_directory(Path(folder)) as staging:
        (staging / "images").mkdir()
        (staging / "masks").mkdir()
        table = []
        for index in range(len(data)):
            case = data[index]
            file = f"images/{index:05d}.png"
            Image.fromarray(case.image).save(staging / file)
            masks = []
            for kind, mask in case.masks.items():
                name = f"masks/{index:05d}-{kind}.png"
                Image.fromarray(mask).save(staging / name)
                masks.append(f"{kind}:{name}")
            cell = ";".join(masks)
            table.append([file, case.label, case.text, cell, case.patient_id, case.source])
        with (staging / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([COLUMNS, *table])


def _open_whole(spec: str, labels: Iterable[str] | None) -> DataSet:
    if not spec.startswith("synthetic:"):
        return FolderData(spec, labels)
    match = re.fullmatch(r"synthetic:(\d+):(\d+)", spec, re.ASCII)
    if match is None:
        raise DataError(f"found {spec!r}, expected synthetic:COUNT:SEED such as synthetic:1000:0")
    return SyntheticData(count=int(match[1]), seed=int(match[2]))


def list_problems(headline: str, problems: Sequence[str]) -> str:
    """One message of all problems, of which it shows the first MAX_PROBLEMS_SHOWN."""
    shown = list(problems[:MAX_PROBLEMS_SHOWN])
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "\n  ".join([headline, *shown])


def _read_rows(folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    return read_table(folder / "labels.csv", COLUMNS, exact=True)


def _problems(
    folder: Path, cells: Mapping[str, str], labels: set[str] | None
) -> Iterator[tuple[str, str]]:
    """Yield (column, problem) for every breach of the format in one row."""
    for column in COLUMNS:
        if column != "mask" and not cells[column]:
            yield column, "empty, expected a value"
    if labels is not None and cells["label"] and cells["label"] not in labels:
        yield "label", f"found {cells['label']!r}, expected one of {', '.join(sorted(labels))}"
    if cells["file"] and (problem := _file_problem(folder, cells["file"])):
        yield "file", problem
    try:
        mask_files = parse_masks(cells["mask"])
    except ValueError as error:
        yield "mask", str(error)
        return
    for name in mask_files.values():
        if problem := _file_problem(folder, name):
            yield "mask", problem


def _file_problem(folder: Path, name: str) -> str | None:
    pure = PureWindowsPath(name)  # knows both separators and drive letters
    path = folder / name
    try:
        outside = pure.anchor or ".." in pure.parts
        if outside or not path.resolve().is_relative_to(folder.resolve()):
            return f"{name!r} leads out of the folder, expected a path relative to it"
        return None if path.is_file() else f"{name!r} is missing, expected a file in {folder}"
    except (OSError, ValueError, RuntimeError):  # too long, a null character, a loop of links
        return f"{name[:80]!r} is no usable path, expected one relative to {folder}"


def parse_masks(cell: str) -> dict[str, str]:
    """Turn `KIND:PATH;KIND:PATH` into kind -> path."""
    masks: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in cell.split(";"))):
        match = re.fullmatch(r"([a-z][a-z0-9_]*):\s*(\S.*\.png)", part, re.IGNORECASE)
        if match is None:
            raise ValueError(f"found {part!r}, expected KIND:PATH such as vessel:masks/1.png")
        if match[1] in masks:
            raise ValueError(f"found kind {match[1]!r} twice, expected one mask of a kind")
        masks[match[1]] = match[2]
    return masks


def _read_picture(path: Path, where: str, least_px: int | None) -> Photograph:
    """Read a picture as the SDK does."""
    try:
        return load_photograph(path, least_px)
    except ImageError as error:
        raise DataError(f"{where}: {error}") from error


def read_mask(path: Path, where: str) -> NDArray[np.bool_]:
    """Read a mask: bool (H, W), True where any channel but alpha is not zero."""
    picture = _open_image(path, where)
    if picture.mode in ("P", "PA"):  # a palette's indices say nothing of its colors
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    values = np.atleast_3d(np.array(picture))
    colors = values[..., :-1] if picture.mode in ("LA", "RGBA") else values
    mask: NDArray[np.bool_] = np.any(colors != 0, axis=-1)
    return mask


def _open_image(path: Path, where: str) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: {path} cannot be read ({error}), expected a picture") from error


def _size(width: int, height: int) -> str:
    return f"{width} x {height}"

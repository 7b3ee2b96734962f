"""A CSV or Excel file in, its rows as column -> text out; errors name file, row and column."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

from mdf_sdk.errors import DataError
from mdf_sdk.extras import import_extra


def read_table(
    path: Path, columns: Sequence[str], *, exact: bool = False
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the spreadsheet's row number and column -> cell of every row that is not blank.

    Args:
        path: UTF-8 CSV, or the first sheet of an .xlsx file. Its header is row 1; columns without
            a name are left out, and the space around a cell.
        columns: must be there.
        exact: no other column may be.

    Raises:
        DataError: no such table, or not one.
        MissingExtraError: an .xlsx file, and openpyxl is not installed.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing, expected a table with columns {', '.join(columns)}")
    lines = _excel_lines(path) if path.suffix.lower() == ".xlsx" else _csv_lines(path)
    _, header = next(lines, (1, []))
    _check_header(path, header, columns, exact=exact)
    width = max(i for i, name in enumerate(header, start=1) if name)
    for number, cells in lines:
        if not any(cells):
            continue
        if len(cells) < width or any(cells[len(header) :]):
            raise DataError(
                f"{path}, row {number}: {len(cells)} cells, expected {len(header)};"
                " put a text that holds a comma in double quotes"
            )
        yield number, {name: cell for name, cell in zip(header, cells, strict=False) if name}


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            for number, cells in enumerate(reader, start=1):
                yield number, [cell.strip() for cell in cells]
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 ({error}): save it as CSV UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not a CSV table ({error})") from error


def _excel_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    openpyxl = import_extra("openpyxl", "training")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (BadZipFile, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path}: not an Excel table ({error}), expected .xlsx or CSV") from error
    try:
        for number, cells in enumerate(book.worksheets[0].iter_rows(values_only=True), start=1):
            yield number, ["" if cell is None else str(cell).strip() for cell in cells]
    finally:
        book.close()


def _check_header(path: Path, header: list[str], columns: Sequence[str], *, exact: bool) -> None:
    names = header if exact else [name for name in header if name]
    wrong = [
        f"{problem} {', '.join(repr(name) for name in found)}"
        for problem, found in (
            ("missing", [name for name in columns if name not in names]),
            ("unknown", [name for name in names if exact and name not in columns]),
            ("repeated", sorted({name for name in names if names.count(name) > 1})),
        )
        if found
    ]
    if wrong:
        raise DataError(
            f"{path}, row 1: columns {'; '.join(wrong)}; expected"
            f" {'exactly ' if exact else ''}{', '.join(columns)}"
        )

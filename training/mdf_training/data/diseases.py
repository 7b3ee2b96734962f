"""A disease's name in, the label that a study gives it out; the map is a CSV file to edit."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdf_sdk.errors import DataError
from mdf_training.data.tables import read_table

PACKAGED = Path(__file__).with_name("diseases.csv")
LEFT_OUT, NO_DISEASE, ANY_OTHER = "-", "", "*"


@dataclass(frozen=True)
class Disease:
    """One row of the map.

    Attributes:
        label: LEFT_OUT where the study has no place for it, NO_DISEASE where it is a finding or a
            remark that says nothing beside a disease.
        names: its name, then the synonyms.
    """

    label: str
    names: tuple[str, ...]


class DiseaseMap:
    """What label each disease has; a name that the file lacks is looked up by its synonyms."""

    def __init__(self, path: Path | None = None) -> None:
        """Read a map; the packaged Acquired and Inherited one when left out.

        Raises:
            DataError: the file breaks the format, or gives one name two labels.
        """
        self.path = path or PACKAGED
        packaged = {
            name.casefold(): disease for disease in read_diseases() for name in disease.names
        }
        self._packaged = packaged
        self._labels: dict[str, str] = {}
        for disease in read_diseases(self.path):
            for name in disease.names:
                if self._labels.setdefault(name.casefold(), disease.label) != disease.label:
                    raise DataError(
                        f"{self.path}: found {name!r} with two labels, expected one row for it"
                    )

    def find(self, name: str) -> str | None:
        """Return the label of a disease, LEFT_OUT or NO_DISEASE; None where the map lacks it."""
        packaged = self._packaged.get(name.casefold())
        same = packaged.names if packaged else ()
        for known in (name, *same):
            if (label := self._labels.get(known.casefold())) is not None:
                return label
        if packaged and packaged.label == NO_DISEASE:
            return NO_DISEASE
        return self._labels.get(ANY_OTHER)

    def label(self, diseases: Sequence[str]) -> str:
        """Return the label of a case with these diseases; they must all be in the map.

        Returns:
            LEFT_OUT where one of them has no place in the study, where they have several labels,
            and where there is none.
        """
        labels = {self.find(name) for name in diseases} - {NO_DISEASE}
        return str(labels.pop()) if len(labels) == 1 else LEFT_OUT

    def check(self, diseases: Iterable[str]) -> None:
        """Check that the map has a row for every disease.

        Raises:
            DataError: names those it lacks, how often each occurs, and the file to edit.
        """
        missing: dict[str, int] = {}
        for name in diseases:
            if self.find(name) is None:
                missing[name] = missing.get(name, 0) + 1
        if missing:
            found = ", ".join(f"{name!r} ({count})" for name, count in sorted(missing.items()))
            raise DataError(
                f"{self.path}: has no row for {found}, expected one for every disease. Add the rows"
                f" to a copy and name it by --diseases: disease,label; the label {LEFT_OUT} leaves"
                f" the cases out, the disease {ANY_OTHER} stands for all others"
            )


def read_diseases(path: Path = PACKAGED) -> Iterator[Disease]:
    """Yield the rows of a map: columns disease, label and, where it has them, synonyms (A;B).

    Raises:
        DataError: the file breaks the format.
    """
    for number, cells in read_table(path, ("disease", "label")):
        if not cells["disease"]:
            raise DataError(f"{path}, row {number}, column disease: empty, expected a name")
        synonyms = (name.strip() for name in cells.get("synonyms", "").split(";"))
        yield Disease(cells["label"], (cells["disease"], *filter(None, synonyms)))

"""What the fuzzers found and grew from, replayed: docs/results/fuzz.md says how it was made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdf_sdk import MDFError
from mdf_sdk.manifest import parse_manifest
from mdf_sdk.photograph import decode, read_source

CORPUS = Path(__file__).parent / "corpus"


def enter_image(data: bytes) -> None:
    assert decode(read_source(data), least_px=64).square.side


ENTRIES: dict[str, Callable[[bytes], Any]] = {
    "manifest": parse_manifest,
    "image": enter_image,
    "dicom": enter_image,
}
INPUTS = sorted(path for entry in ENTRIES for path in (CORPUS / entry).iterdir())


def fate(path: Path) -> str:
    try:
        ENTRIES[path.parent.name](path.read_bytes())
    except MDFError as error:
        return str(error)
    return "read"


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_input_of_the_corpus_is_read_or_refused_in_few_words(path: Path) -> None:
    assert len(fate(path)) < 1000


@pytest.mark.parametrize("entry", ENTRIES)
def test_some_inputs_are_read_and_some_refused(entry: str) -> None:
    """A corpus that is refused as a whole would test little."""
    if entry == "dicom":
        pytest.importorskip("pydicom")
    assert {fate(path) == "read" for path in INPUTS if path.parent.name == entry} == {True, False}

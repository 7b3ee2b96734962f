"""Coverage-guided fuzzing of what reads a stranger's bytes: anything but an MDFError is a finding.

    pip install atheris
    python tests/fuzz/fuzz.py ENTRY NEW_CORPUS tests/sdk/corpus/ENTRY [libFuzzer's options]

ENTRY is manifest, image or dicom. An input that raises anything else, takes more than 5 s or more
than 1 GB ends the run and is written beside it. NEW_CORPUS takes the inputs that reach new code.
"""

import copy
import json
import random
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import atheris

with atheris.instrument_imports(include=["mdf_sdk", "PIL", "pydicom"]):
    import PIL.Image

    import mdf_sdk
    import mdf_sdk.commands
    import mdf_sdk.dicom
    from mdf_sdk.integrity import check_files
    from mdf_sdk.manifest import parse_manifest
    from mdf_sdk.photograph import decode, read_source

    PIL.Image.init()  # imports its readers, which it would do later and uninstrumented

LIMITS = ("-timeout=5", "-rss_limit_mb=1024", "-close_fd_mask=1")
_ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**63,
    10**400,
    1.5,
    1e308,
    "",
    "\x00",
    "é",
    [],
    {},
    "x",
)


def enter_manifest(data: bytes) -> None:
    """Parse; what is accepted must also be printable and must not fit an empty folder."""
    try:
        manifest = parse_manifest(data)
    except mdf_sdk.MDFError:
        return
    mdf_sdk.commands._describe("engine", manifest)
    with tempfile.TemporaryDirectory() as folder:
        try:
            check_files(folder, manifest)
        except mdf_sdk.IntegrityError:
            return
    raise AssertionError("an empty folder passed for an engine")


def enter_image(data: bytes) -> None:
    try:
        source = read_source(data, frame=None if len(data) % 2 else 0)
        assert decode(source, least_px=64).square.side
    except mdf_sdk.MDFError:
        return


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Replace, double, move or drop a value of a document; bytes that are none change as bytes."""
    draw = random.Random(seed)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict | list) or draw.random() < 0.3:
        return atheris.Mutate(data, max_size)
    node, key = document, None
    while isinstance(node, dict | list) and node:
        parent, key = node, draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
        if draw.random() < 0.3:
            break
    if key is not None:
        match draw.randrange(4):
            case 0:
                parent[key] = draw.choice(_ODD)
            case 1:
                parent[key] = copy.deepcopy(draw.choice(branches(document)))
            case 2:
                del parent[key]
            case 3 if isinstance(parent, dict):
                parent[str(key) + draw.choice(("x", ".", "/..", "\\"))] = node
    return json.dumps(document).encode()[:max_size]


def branches(document: dict[str, Any] | list[Any]) -> list[Any]:
    return list(document.values()) if isinstance(document, dict) else document


ENTRIES: dict[str, tuple[Callable[[bytes], None], dict[str, Any]]] = {
    "manifest": (enter_manifest, {"custom_mutator": mutate_json}),
    "image": (enter_image, {}),
    "dicom": (enter_image, {}),  # the same door, other seeds
}


def main() -> None:
    entry, *options = sys.argv[1:]
    enter, setup = ENTRIES[entry]
    atheris.Setup([sys.argv[0], *LIMITS, *options], enter, **setup)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Truncated files and flipped bits of the shipped engine: none of it reaches a backend."""

import dataclasses
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdf_sdk import IntegrityError, ManifestError, SignatureError, check_files, load_manifest
from mdf_sdk.engine import Engine
from mdf_sdk.integrity import FileCheck
from mdf_sdk.manifest import BLOCKS, Manifest, parse_manifest

FLIPS = 1000
ENGINE = Path(__file__).parents[2] / "examples" / "demo_engine"
NAMES = sorted(path.name for path in ENGINE.iterdir() if path.name != "manifest.json")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The engine, to be damaged."""
    return Path(shutil.copytree(ENGINE, tmp_path / "engine"))


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over, where it lies."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    flip(path, bit)
    try:
        yield
    finally:
        flip(path, bit)


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_of_a_file_is_found(tmp_path: Path, name: str) -> None:
    manifest = load_manifest(ENGINE)
    shutil.copy(ENGINE / name, tmp_path)
    manifest = dataclasses.replace(manifest, files={name: manifest.files[name]})
    check_files(tmp_path, manifest)
    draw = random.Random(name)
    bits = 8 * manifest.files[name].bytes
    for _ in range(FLIPS):
        with (
            flipped(tmp_path / name, draw.randrange(bits)),
            FileCheck(tmp_path, manifest) as check,
            pytest.raises(IntegrityError, match="found SHA-256"),
        ):
            check.wait(name)
    check_files(tmp_path, manifest)


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_of_a_file_is_found(copy: Path, name: str) -> None:
    manifest = load_manifest(copy)
    size = manifest.files[name].bytes
    for kept in sorted({0, 1, size - 1, *range(0, size, 4096)}, reverse=True):
        os.truncate(copy / name, kept)
        with pytest.raises(IntegrityError, match=rf"found {kept} bytes, expected {size} bytes"):
            FileCheck(copy, manifest)


class Spy:
    """A backend that must never see the damaged file."""

    name, device, card = "spy", "cpu", "none"
    slots, overlaps = 1, False

    def __init__(self, manifest: Manifest, damaged: str) -> None:
        self._manifest, self._damaged = manifest, damaged

    def files(self, block: str) -> tuple[str, ...]:
        return (self._manifest.blocks[block].file,)

    def open(self, block: str, rows: Iterable[int] = ()) -> Any:
        assert not self._damaged.startswith(self.files(block)), f"{self._damaged} was opened"
        return SimpleNamespace(close=lambda: None)

    def text_rows(self, rows: int) -> int:
        return rows

    def free_and_total_bytes(self) -> None:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_no_backend_opens_a_damaged_file(
    copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(copy)
    spy = Spy(manifest, damaged=name)
    monkeypatch.setattr("mdf_sdk.engine.open_backend", lambda *_, **__: spy)
    draw = random.Random(name)
    bits = 8 * manifest.files[name].bytes
    for _ in range(10):
        with flipped(copy / name, draw.randrange(bits)), pytest.raises(IntegrityError, match=name):
            Engine(copy, blocks=BLOCKS)
    for kept in (manifest.files[name].bytes - 1, 1, 0):
        os.truncate(copy / name, kept)
        with pytest.raises(IntegrityError, match=name):
            Engine(copy, blocks=BLOCKS)


def test_a_truncated_manifest_is_refused_at_every_byte() -> None:
    whole = (ENGINE / "manifest.json").read_bytes()
    assert whole.endswith(b"}\n")
    for kept in range(len(whole) - 1):
        with pytest.raises(ManifestError):
            parse_manifest(whole[:kept])
    assert parse_manifest(whole[:-1]) == parse_manifest(whole)  # the last line's end says nothing


def test_what_a_flipped_manifest_may_still_say() -> None:
    """Without a signature the manifest vouches for the files, and nothing for the manifest.

    A flip in a text or number of its own makes another manifest, which is as good as the first.
    """
    whole, draw, fates = (ENGINE / "manifest.json").read_bytes(), random.Random(0), []
    original = parse_manifest(whole)
    for _ in range(FLIPS):
        changed = bytearray(whole)
        bit = draw.randrange(8 * len(whole))
        changed[bit // 8] ^= 1 << bit % 8
        try:
            manifest = parse_manifest(changed)
            check_files(ENGINE, manifest)
        except ManifestError:
            fates.append("malformed")
        except IntegrityError:
            fates.append("does not fit the files")
        else:
            assert manifest.files == original.files
            fates.append("another manifest" if manifest != original else "the same manifest")
    counts = {fate: fates.count(fate) for fate in sorted(set(fates))}
    print(counts)
    assert counts["malformed"] + counts["does not fit the files"] > 0.5 * FLIPS


def test_a_signed_manifest_is_refused_after_any_flip(copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    from mdf_sdk.signature import sign_engine

    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "private.pem").write_bytes(private)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    sign_engine(copy, tmp_path / "private.pem")
    load_manifest(copy, public)
    draw = random.Random(0)
    for name in ("manifest.json", "manifest.sig"):
        bits = 8 * (copy / name).stat().st_size
        for _ in range(FLIPS):
            with flipped(copy / name, draw.randrange(bits)), pytest.raises(SignatureError):
                load_manifest(copy, public)
    load_manifest(copy, public)
    os.truncate(copy / "manifest.json", (copy / "manifest.json").stat().st_size - 1)
    with pytest.raises(SignatureError):
        load_manifest(copy, public)

import dataclasses
import os
import shutil
import stat
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdf_sdk import IntegrityError, check_files, load_manifest
from mdf_sdk.errors import ClosedError
from mdf_sdk.integrity import THREADS, FileCheck, _in_load_order, _irregularity, digest
from mdf_sdk.manifest import FUSED_SUFFIX, FileEntry, Manifest

from .toy_engine import add_plan, make_plan, seal


def test_a_whole_engine_passes(toy_engine: Path) -> None:
    check_files(toy_engine, load_manifest(toy_engine))


def test_what_an_interrupted_compilation_left_is_overlooked(toy_copy: Path) -> None:
    make_plan(toy_copy)
    check_files(toy_copy, load_manifest(toy_copy))


def test_a_listed_plan_is_checked_like_every_file(toy_copy: Path) -> None:
    add_plan(toy_copy)
    (toy_copy / "plans" / "vision.plan").write_bytes(b"plam")
    with pytest.raises(IntegrityError, match=r"plans/vision\.plan: found SHA-256"):
        check_files(toy_copy, load_manifest(toy_copy))


def test_a_link_among_the_plans_is_refused(toy_copy: Path) -> None:
    make_plan(toy_copy)
    (toy_copy / "plans" / "link").symlink_to("vision.plan")
    with pytest.raises(IntegrityError, match="plans/link: found a symbolic link"):
        check_files(toy_copy, load_manifest(toy_copy))


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "vision.onnx").unlink(), "vision.onnx: found no such file"),
        (lambda d: flip_a_byte(d / "vision.onnx"), "vision.onnx: found SHA-256"),
        (lambda d: (d / "golden.npz").write_bytes(b"PK"), "golden.npz: found 2 bytes"),
        (lambda d: (d / "readme").write_text("hello"), "readme: found a file that the manifest"),
        (lambda d: (d / "sub").mkdir() or (d / "sub" / "x").touch(), "sub/x: found a file that"),
        (lambda d: os.mkfifo(d / "pipe"), "pipe: found a special file"),
        (lambda d: (d / "sub").symlink_to(d.parent), "sub: found a symbolic link"),
    ],
)
def test_a_damaged_directory_is_refused(
    toy_copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(toy_copy)
    with pytest.raises(IntegrityError, match=message):
        check_files(toy_copy, load_manifest(toy_copy))


def test_a_tree_deeper_than_the_stack_is_walked(
    toy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = 1500
    monkeypatch.chdir(toy_copy)
    for _ in range(depth):
        Path("d").mkdir()
        os.chdir("d")
    Path("x").touch()
    with pytest.raises(IntegrityError, match="d/x: found a file that the manifest does not list"):
        check_files(toy_copy, load_manifest(toy_copy))
    Path("x").unlink()
    for _ in range(depth):  # pytest's own removal would exhaust the stack
        os.chdir("..")
        Path("d").rmdir()


def test_a_file_behind_a_link_is_refused_though_its_bytes_are_right(
    toy_copy: Path, toy_engine: Path
) -> None:
    (toy_copy / "vision.onnx").unlink()
    (toy_copy / "vision.onnx").symlink_to(toy_engine / "vision.onnx")
    with pytest.raises(IntegrityError, match="symbolic link"):
        check_files(toy_copy, load_manifest(toy_copy))


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/etc/passwd",
        "a/../../b",
        "a\\b",
        "C:x",
        "",
        "a//b",
        "a\x00b",
        "./a",
        "a.",
        "sub./x",
        "a:stream",
        "a ",
        "ａ",
    ],
)
def test_a_path_out_of_the_directory_is_refused(toy_copy: Path, path: str) -> None:
    (toy_copy.parent / "outside").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="plain relative path"):
        check_files(toy_copy, listing(toy_copy, path))


@pytest.mark.parametrize("path", ["CON", "nul.onnx", "sub/Com1.data", "LPT9.x/y", "aux"])
def test_a_device_of_windows_is_refused(toy_copy: Path, path: str) -> None:
    with pytest.raises(IntegrityError, match="device of Windows"):
        check_files(toy_copy, listing(toy_copy, path))


@pytest.mark.parametrize("path", ["VISION.onnx", "Manifest.json", "manifest.sig", "MANIFEST.SIG"])
def test_two_names_of_one_file_on_windows_are_refused(toy_copy: Path, path: str) -> None:
    with pytest.raises(IntegrityError, match="upper and lower case"):
        check_files(toy_copy, listing(toy_copy, path))


def listing(engine_dir: Path, path: str) -> Manifest:
    """The engine's manifest with one more file in it."""
    manifest = load_manifest(engine_dir)
    return dataclasses.replace(manifest, files=manifest.files | {path: FileEntry("0" * 64, 1)})


@pytest.mark.parametrize(
    ("mode", "tag", "expected"),
    [
        (stat.S_IFREG, 0, ""),
        (stat.S_IFDIR, 0, ""),
        (stat.S_IFREG, 0x80000013, ""),  # deduplicated: its bytes are its own
        (stat.S_IFREG, 0x9000001A, ""),  # backed by a cloud
        (stat.S_IFDIR, 0xA0000003, "a symbolic link or junction"),
        (stat.S_IFREG, 0xA000000C, "a symbolic link or junction"),
        (stat.S_IFLNK, 0, "a symbolic link or junction"),
        (stat.S_IFBLK, 0, "a special file"),
    ],
)
def test_a_junction_of_windows_counts_as_a_link(mode: int, tag: int, expected: str) -> None:
    status: Any = SimpleNamespace(st_mode=mode, st_reparse_tag=tag)
    assert _irregularity(status) == expected


def test_a_hard_link_is_a_file_like_every_other(toy_copy: Path, toy_engine: Path) -> None:
    (toy_copy / "vision.onnx").unlink()
    (toy_copy / "vision.onnx").hardlink_to(toy_engine / "vision.onnx")
    check_files(toy_copy, load_manifest(toy_copy))


def test_a_signature_needs_no_listing(toy_copy: Path) -> None:
    (toy_copy / "manifest.sig").write_bytes(b"x" * 64)
    check_files(toy_copy, load_manifest(toy_copy))


def test_an_oversized_file_is_refused_unread(toy_copy: Path) -> None:
    os.truncate(toy_copy / "vision.onnx", 10**12)  # sparse: a terabyte of nothing
    with pytest.raises(IntegrityError, match=r"vision\.onnx: found 1000000000000 bytes"):
        check_files(toy_copy, load_manifest(toy_copy))


def test_an_unreadable_file_is_named(toy_copy: Path) -> None:
    manifest = load_manifest(toy_copy)
    with FileCheck(toy_copy, manifest) as check:
        (toy_copy / "golden.npz").unlink()  # between the look at its size and the reading
        with pytest.raises(IntegrityError, match=r"golden\.npz: could not be read \(No such file"):
            check._prove("golden.npz", manifest.files["golden.npz"])


def test_files_are_hashed_in_the_order_in_which_blocks_load(toy_copy: Path) -> None:
    (toy_copy / "decoder.onnx.data").write_bytes(b"weights")
    seal(toy_copy, load_manifest(toy_copy))
    add_plan(toy_copy)
    assert _in_load_order(load_manifest(toy_copy)) == [
        "tokenizer.json",
        "embeddings.npy",
        "vision.onnx",
        "plans/vision.plan",
        "unet_encoder.onnx",
        "fusion.onnx",
        "decoder.onnx",
        "decoder.onnx.data",
        "unet_decoder.onnx",
        "golden.npz",
    ]


def test_a_graph_waits_for_its_external_data(toy_copy: Path) -> None:
    (toy_copy / "decoder.onnx.data").write_bytes(b"weights")
    (toy_copy / f"decoder.onnx{FUSED_SUFFIX}").write_bytes(b"a graph over the same weights")
    manifest = seal(toy_copy, load_manifest(toy_copy))
    (toy_copy / "decoder.onnx.data").write_bytes(b"Weights")
    with FileCheck(toy_copy, manifest) as check:
        check.wait("vision.onnx")
        check.wait("unet_decoder.onnx")
        for graph in ("decoder.onnx", f"decoder.onnx{FUSED_SUFFIX}"):
            with pytest.raises(IntegrityError, match=r"decoder\.onnx\.data: found SHA-256"):
                check.wait(graph)
        with pytest.raises(IntegrityError, match=r"decoder\.onnx\.data: found SHA-256"):
            check.wait_all()


def test_a_name_that_is_not_listed_is_never_proved(toy_engine: Path) -> None:
    with FileCheck(toy_engine, load_manifest(toy_engine)) as check:
        for name in ("elsewhere.onnx", "", "vision", "manifest.json"):
            with pytest.raises(IntegrityError, match="no such name in the manifest"):
                check.wait(name)


def hashing_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("mdf-integrity")]


def test_no_thread_outlives_a_check(toy_copy: Path) -> None:
    manifest = load_manifest(toy_copy)
    check_files(toy_copy, manifest)
    assert hashing_threads() == []
    flip_a_byte(toy_copy / "vision.onnx")
    with pytest.raises(IntegrityError):
        check_files(toy_copy, manifest)
    assert hashing_threads() == []
    (toy_copy / "vision.onnx").unlink()
    with pytest.raises(IntegrityError):
        FileCheck(toy_copy, manifest)
    assert hashing_threads() == []


def test_closing_stops_in_the_middle_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 33)  # sparse; hashing it would take seconds
    asked = 0

    def third_time() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    with pytest.raises(CancelledError):
        digest(path, cancelled=third_time)


def test_a_closed_check_tells_so_but_forgets_no_proof(toy_copy: Path) -> None:
    for i in range(THREADS + 1):  # more than can be under way at once, none of which ends
        os.truncate(create(toy_copy / f"vision.onnx.{i}"), 1 << 33)
    manifest = load_manifest(toy_copy)
    large = {f"vision.onnx.{i}": FileEntry("0" * 64, 1 << 33) for i in range(THREADS + 1)}
    check = FileCheck(toy_copy, dataclasses.replace(manifest, files=manifest.files | large))
    check.wait("tokenizer.json")
    check.close()
    check.wait("tokenizer.json")
    with pytest.raises(ClosedError, match="Load the engine again"):
        check.wait("vision.onnx")
    with pytest.raises(ClosedError):
        check.wait("golden.npz")
    assert hashing_threads() == []


def create(path: Path) -> Path:
    path.touch()
    return path


def test_a_digest_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest(tmp_path / "abc") == FileEntry(known, 3)


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[str, str, bytes]]:
    """Changes to a directory: (what is done, to which name, with which bytes)."""
    names = ["vision.onnx", "golden.npz", "manifest.sig", "plans/a", "plans", "x", "sub/y", "CON"]
    kinds = ["write", "remove", "link", "pipe", "folder"]
    change = st.tuples(st.sampled_from(kinds), st.sampled_from(names), st.binary(max_size=9))
    return draw(st.lists(change, max_size=4))


@given(changes=trees())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_changed_directory_passes_only_if_every_listed_file_is_right(
    toy_engine: Path,
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[str, str, bytes]],
) -> None:
    engine = Path(shutil.copytree(toy_engine, tmp_path_factory.mktemp("tree") / "engine"))
    manifest = load_manifest(engine)
    for kind, name, data in changes:
        with suppress(OSError):  # such as a file in the place of a folder
            apply(kind, engine / name, data)
    try:
        check_files(engine, manifest)
    except IntegrityError:
        return
    for name in manifest.files:
        assert not (engine / name).is_symlink()
        assert (engine / name).read_bytes() == (toy_engine / name).read_bytes()
    assert not {"x", "sub/y", "CON"} & {
        path.relative_to(engine).as_posix() for path in engine.rglob("*") if not path.is_dir()
    }


def apply(kind: str, path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    if kind == "folder":
        path.mkdir()
        return
    path.unlink(missing_ok=True)
    if kind == "write":
        path.write_bytes(data)
    elif kind == "link":
        path.symlink_to("embeddings.npy")
    elif kind == "pipe":
        os.mkfifo(path)

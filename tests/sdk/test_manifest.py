import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdf_sdk import EngineError, IntegrityError, ManifestError, MDFError, check_files, load_manifest
from mdf_sdk.manifest import FileEntry, PlanSpec, digest, save_manifest

Document = dict[str, Any]


def change(engine_dir: Path, edit: Callable[[Document], object]) -> None:
    path = engine_dir / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_what_is_saved_is_loaded(toy_engine: Path, tmp_path: Path) -> None:
    manifest = load_manifest(toy_engine)
    save_manifest(manifest, tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_missing_directory_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="mdf export CHECKPOINT ENGINE"):
        load_manifest(tmp_path / "nowhere")


def test_a_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="interrupted"):
        load_manifest(tmp_path)


def test_another_version_says_both_versions_and_the_cure(toy_copy: Path) -> None:
    change(toy_copy, lambda document: document.update(version=1))
    with pytest.raises(ManifestError, match=r"version 1, expected 2.*mdf export.*mdf-mllm"):
        load_manifest(toy_copy)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda d: d.update(format="zip"), "format"),
        (lambda d: d.pop("temperature"), "temperature: found no such field"),
        (lambda d: d.update(extra=1), "extra: found an unknown field"),
        (lambda d: d["blocks"]["vision"].update(file=3), r"blocks\.vision\.file"),
        (lambda d: d["blocks"]["vision"].pop("file"), r"blocks\.vision\.file"),
        (lambda d: d["blocks"]["vision"].update(precision="int3"), r"blocks\.vision\.precision"),
        (
            lambda d: d["blocks"]["vision"]["inputs"][0].update(shape=[1.5]),
            r"inputs\[0\]\.shape\[0",
        ),
        (lambda d: d["blocks"]["vision"]["inputs"][0].update(dtype="object"), "dtype"),
        (lambda d: d["blocks"].pop("fusion"), "blocks: "),
        (lambda d: d["blocks"]["vision"].update(file="absent.onnx"), r"blocks\.vision\.file"),
        (lambda d: d["image"].update(tower_px=True), r"image\.tower_px"),
        (lambda d: d["image"].update(tower_px=10**9), r"image\.tower_px"),
        (lambda d: d["image"].update(tower_mean=[0.5]), r"image\.tower_mean"),
        (lambda d: d["image"].update(unet_std=[0, 1, 1]), r"image\.unet_std"),
        (lambda d: d.update(temperature=0), "temperature"),
        (lambda d: d.update(labels=["a"]), "labels"),
        (lambda d: d.update(labels=["a", "a"]), "labels"),
        (lambda d: d.update(labels=["a", "\ud800"]), r"labels\[1\]"),
        (lambda d: d["files"].pop("tokenizer.json"), "files"),
        (lambda d: d["files"]["vision.onnx"].update(sha256="AB"), r"files\.vision\.onnx\.sha256"),
    ],
)
def test_a_wrong_field_is_named(
    toy_copy: Path, edit: Callable[[Document], object], field: str
) -> None:
    change(toy_copy, edit)
    with pytest.raises(ManifestError, match=field):
        load_manifest(toy_copy)


def plan_of_vision(engine_dir: Path) -> PlanSpec:
    """A plan of the toy's vision block; its file is written, the manifest is not."""
    spec = load_manifest(engine_dir).blocks["vision"]
    (engine_dir / "plans").mkdir()
    (engine_dir / "plans" / "vision.plan").write_bytes(b"plan")
    return PlanSpec(
        block="vision",
        file="plans/vision.plan",
        builder="tensorrt_rtx 1.7",
        compute_capabilities=("8.9", "12.0"),
        inputs=spec.inputs,
        outputs=spec.outputs,
        profile={"batch": (1, 1, 8)},
        build_s=1.5,
    )


def add_plan(engine_dir: Path) -> None:
    """List a plan in the manifest."""
    manifest, plan = load_manifest(engine_dir), plan_of_vision(engine_dir)
    files = manifest.files | {plan.file: digest(engine_dir / plan.file)}
    save_manifest(dataclasses.replace(manifest, plans=(plan,), files=files), engine_dir)


def test_an_engine_with_a_plan_is_loaded_and_whole(toy_copy: Path) -> None:
    add_plan(toy_copy)
    manifest = load_manifest(toy_copy)
    assert manifest.plans[0].profile == {"batch": (1, 1, 8)}
    check_files(toy_copy, manifest)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda p: p.update(block="tower"), "block: found 'tower', expected one of vision"),
        (lambda p: p.update(file="plans/absent.plan"), "file: found 'plans/absent.plan'"),
        (lambda p: p.update(file="vision.onnx"), r"file: found 'vision\.onnx', expected .*plans/"),
        (lambda p: p.update(compute_capabilities=[]), "compute_capabilities"),
        (lambda p: p.update(compute_capabilities=["sm89"]), "compute_capabilities"),
        (lambda p: p.update(inputs=[]), "inputs: found"),
        (lambda p: p["outputs"][0].update(dtype="int4"), "outputs: found 'int4'"),
        (lambda p: p.update(profile={}), r"profile: found \[\], expected .*batch"),
        (lambda p: p["profile"].update(T=[1, 1, 1]), "profile: found"),
        (lambda p: p.update(profile={"batch": [1, 9, 8]}), r"profile\.batch"),
        (lambda p: p.update(profile={"batch": [0, 1, 8]}), r"profile\.batch"),
        (lambda p: p.update(profile={"batch": [1, 8]}), r"profile\.batch"),
        (lambda p: p.update(build_s=-1), "build_s"),
    ],
)
def test_a_wrong_field_of_a_plan_is_named(
    toy_copy: Path, edit: Callable[[Document], object], field: str
) -> None:
    add_plan(toy_copy)
    change(toy_copy, lambda document: edit(document["plans"][0]))
    with pytest.raises(ManifestError, match=rf"plans\[0\]\.{field}"):
        load_manifest(toy_copy)


def test_one_file_is_one_plan(toy_copy: Path) -> None:
    add_plan(toy_copy)
    change(toy_copy, lambda document: document["plans"].append(document["plans"][0]))
    with pytest.raises(ManifestError, match=r"plans: found .*distinct files"):
        load_manifest(toy_copy)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"a": NaN}', '{"format": 1, "format": 2}', "[" * 100_000, "9" * 5000],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ManifestError, match="mdf export"):
        load_manifest(tmp_path)


def test_an_oversized_manifest_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b" " * 5_000_000)
    with pytest.raises(ManifestError, match="more than 4000000 bytes"):
        load_manifest(tmp_path)


def test_a_linked_manifest_is_refused(toy_copy: Path, tmp_path: Path) -> None:
    (toy_copy / "manifest.json").rename(tmp_path / "elsewhere")
    (toy_copy / "manifest.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match="link"):
        load_manifest(toy_copy)


@given(data=st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_arbitrary_bytes_raise_only_our_errors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(MDFError):
        load_manifest(tmp_path)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_manifest_with_one_field_replaced_loads_or_raises_our_error(
    toy_engine: Path, tmp_path: Path, data: st.DataObject
) -> None:
    document = node = json.loads((toy_engine / "manifest.json").read_text())
    while True:
        key = data.draw(
            st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
        )
        if not (isinstance(node[key], dict | list) and node[key]) or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(st.none() | st.booleans() | st.integers() | st.text() | st.just([]))
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    try:
        manifest = load_manifest(tmp_path)
    except ManifestError:
        return
    save_manifest(manifest, tmp_path)
    assert load_manifest(tmp_path) == manifest


def test_a_manifest_that_would_not_load_is_not_saved(toy_engine: Path, tmp_path: Path) -> None:
    manifest = dataclasses.replace(load_manifest(toy_engine), temperature=float("nan"))
    with pytest.raises(ManifestError, match="temperature"):
        save_manifest(manifest, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_engine_passes(toy_engine: Path) -> None:
    check_files(toy_engine, load_manifest(toy_engine))


def test_what_an_interrupted_compilation_left_is_overlooked(toy_copy: Path) -> None:
    plan_of_vision(toy_copy)
    check_files(toy_copy, load_manifest(toy_copy))


def test_a_listed_plan_is_checked_like_every_file(toy_copy: Path) -> None:
    add_plan(toy_copy)
    (toy_copy / "plans" / "vision.plan").write_bytes(b"plam")
    with pytest.raises(IntegrityError, match=r"plans/vision\.plan: found SHA-256"):
        check_files(toy_copy, load_manifest(toy_copy))


def test_a_link_among_the_plans_is_refused(toy_copy: Path) -> None:
    plan_of_vision(toy_copy)
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
        (lambda d: (d / "sub").symlink_to("/tmp"), "sub: found a symbolic link"),
    ],
)
def test_a_damaged_directory_is_refused(
    toy_copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(toy_copy)
    with pytest.raises(IntegrityError, match=message):
        check_files(toy_copy, load_manifest(toy_copy))


def test_a_file_behind_a_link_is_refused_though_its_bytes_are_right(
    toy_copy: Path, toy_engine: Path
) -> None:
    (toy_copy / "vision.onnx").unlink()
    (toy_copy / "vision.onnx").symlink_to(toy_engine / "vision.onnx")
    with pytest.raises(IntegrityError, match="symbolic link"):
        check_files(toy_copy, load_manifest(toy_copy))


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "C:x", "", "a//b", "a\x00b", "./a"]
)
def test_a_path_out_of_the_directory_is_refused(toy_copy: Path, path: str) -> None:
    (toy_copy.parent / "outside").write_bytes(b"x")
    manifest = load_manifest(toy_copy)
    files = manifest.files | {path: FileEntry("0" * 64, 1)}
    with pytest.raises(IntegrityError, match="plain relative path"):
        check_files(toy_copy, dataclasses.replace(manifest, files=files))


def test_a_digest_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest(tmp_path / "abc") == FileEntry(known, 3)

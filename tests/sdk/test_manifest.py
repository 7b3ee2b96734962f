import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdf_sdk import EngineError, ManifestError, MDFError, load_manifest
from mdf_sdk.manifest import FORMAT_VERSION, save_manifest

from .toy_engine import add_plan

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
    with pytest.raises(
        ManifestError, match=rf"version 1, expected {FORMAT_VERSION}.*mdf export.*mdf-mllm"
    ):
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
        (lambda d: d["blocks"]["vision"]["inputs"][0].update(shape=[-1]), "no negative side"),
        (lambda d: d["quantization"].update(block_size=2**63), "block_size: found a larger number"),
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


def test_an_engine_with_a_plan_is_loaded(toy_copy: Path) -> None:
    add_plan(toy_copy)
    assert load_manifest(toy_copy).plans[0].profile == {"batch": (1, 1, 8)}


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


def test_a_file_that_is_listed_twice_is_refused(toy_copy: Path) -> None:
    path = toy_copy / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"files": {', '"files": {"vision.onnx": null,'))
    with pytest.raises(ManifestError, match="a key stands twice"):
        load_manifest(toy_copy)


def test_a_message_is_short_and_no_terminal_obeys_it(toy_copy: Path) -> None:
    change(toy_copy, lambda document: document.update({"\x1b[2J" + "x" * 100_000: 1}))
    with pytest.raises(ManifestError, match="an unknown field") as caught:
        load_manifest(toy_copy)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


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


def test_saving_removes_the_signature_of_the_manifest_before(toy_copy: Path) -> None:
    (toy_copy / "manifest.sig").write_bytes(b"x" * 64)
    save_manifest(load_manifest(toy_copy), toy_copy)
    assert not (toy_copy / "manifest.sig").exists()


def test_a_manifest_that_cannot_be_written_leaves_the_one_before(
    toy_copy: Path, tmp_path: Path
) -> None:
    before = (toy_copy / "manifest.json").read_bytes()
    (toy_copy / "manifest.sig").write_bytes(b"x" * 64)
    with pytest.raises(OSError, match="nowhere"):
        save_manifest(load_manifest(toy_copy), toy_copy, workspace=tmp_path / "nowhere")
    assert (toy_copy / "manifest.json").read_bytes() == before
    assert (toy_copy / "manifest.sig").exists()


def test_a_manifest_that_would_not_load_is_not_saved(toy_engine: Path, tmp_path: Path) -> None:
    manifest = dataclasses.replace(load_manifest(toy_engine), temperature=float("nan"))
    with pytest.raises(ManifestError, match="temperature"):
        save_manifest(manifest, tmp_path)
    assert list(tmp_path.iterdir()) == []

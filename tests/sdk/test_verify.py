import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdf_sdk import EngineError, IntegrityError, load_manifest, verify_engine
from mdf_sdk.manifest import BLOCKS
from mdf_sdk.sessions import Array
from mdf_sdk.verify import load_golden

from .toy_engine import seal


def change_golden(engine_dir: Path, **changes: Array | None) -> None:
    """Replace arrays of golden.npz by name, with "__" for "/"; None removes."""
    with np.load(engine_dir / "golden.npz") as arrays:
        golden = dict(arrays)
    for key, value in changes.items():
        name = key.replace("__", "/")
        if value is None:
            del golden[name]
        else:
            golden[name] = value
    np.savez(engine_dir / "golden.npz", **golden)
    seal(engine_dir, load_manifest(engine_dir))


def test_a_whole_engine_verifies(toy_engine: Path) -> None:
    report = verify_engine(toy_engine)
    assert report.ok
    assert [block.block for block in report.blocks] == list(BLOCKS)
    assert all(block.max_error <= 1e-6 for block in report.blocks)
    assert (report.cases, report.same_label) == (2, 2)
    assert "verified on cpu" in str(report)


def test_a_block_that_differs_fails_alone(toy_copy: Path) -> None:
    with np.load(toy_copy / "golden.npz") as arrays:
        states = arrays["case1/vision_states"]
    change_golden(toy_copy, case1__vision_states=states * 1.01)
    report = verify_engine(toy_copy)
    assert not report.ok
    assert "TOO FAR" in str(report)
    # fusion reads the changed states as its golden input
    assert {block.block for block in report.blocks if not block.ok} == {"vision", "fusion"}
    assert report.blocks[0].max_error == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_nan_fails_and_stays_json(toy_copy: Path) -> None:
    change_golden(toy_copy, case1__mask=np.full((1, 3, 32, 32), np.nan, np.float32))
    report = verify_engine(toy_copy)
    assert not report.ok
    assert not report.blocks[-1].ok
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["blocks"][-1]["ok"] is False


def test_another_shape_fails(toy_copy: Path) -> None:
    change_golden(toy_copy, case0__mask=np.zeros((1, 3, 8, 8), np.float32))
    assert not verify_engine(toy_copy).ok


def test_another_label_fails_even_within_tolerance(toy_copy: Path) -> None:
    with np.load(toy_copy / "golden.npz") as arrays:
        scores = arrays["case0/scores"]
    change_golden(toy_copy, case0__scores=scores[:, ::-1].copy())
    report = verify_engine(toy_copy)
    assert report.same_label == 1
    assert not report.ok


def test_a_missing_tensor_is_named(toy_copy: Path) -> None:
    change_golden(toy_copy, case1__skip_2=None)
    with pytest.raises(EngineError, match="case1/skip_2"):
        verify_engine(toy_copy)


def test_comparing_nothing_is_an_error(toy_copy: Path) -> None:
    np.savez(toy_copy / "golden.npz")
    seal(toy_copy, load_manifest(toy_copy))
    with pytest.raises(EngineError, match="no case"):
        verify_engine(toy_copy)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello"])
def test_a_golden_file_that_is_none_is_refused(toy_copy: Path, content: bytes) -> None:
    (toy_copy / "golden.npz").write_bytes(content)
    seal(toy_copy, load_manifest(toy_copy))
    with pytest.raises(EngineError, match=r"golden\.npz"):
        verify_engine(toy_copy)


def test_pickled_golden_arrays_are_never_loaded(toy_copy: Path) -> None:
    change_golden(toy_copy, case0__extra=np.array([{}], dtype=object))
    with pytest.raises(EngineError, match=r"golden\.npz"):
        verify_engine(toy_copy)


def test_an_altered_file_is_found_before_a_block_runs(toy_copy: Path) -> None:
    (toy_copy / "fusion.onnx").write_bytes(b"altered")
    with pytest.raises(IntegrityError, match=r"fusion\.onnx"):
        verify_engine(toy_copy)


@pytest.mark.parametrize(
    "array",
    [
        np.array(["text"]),
        np.zeros((1, 3, 32, 32), np.complex64),
        np.zeros((1, 3, 32, 32)),
        np.zeros((0, 3, 32, 32), np.float32),
    ],
    ids=["text", "complex", "float64", "empty"],
)
def test_golden_values_of_another_kind_are_refused(toy_copy: Path, array: Array) -> None:
    change_golden(toy_copy, case0__mask=array)
    with pytest.raises(EngineError, match=r"golden\.npz: found case0/mask as"):
        verify_engine(toy_copy)


@pytest.mark.parametrize("shape", [(2,), (1, 3), (2, 2)])
def test_golden_scores_of_another_shape_are_another_label(
    toy_copy: Path, shape: tuple[int, ...]
) -> None:
    change_golden(toy_copy, case0__scores=np.zeros(shape, np.float32))
    report = verify_engine(toy_copy)
    assert report.same_label == 1
    assert not report.ok


def test_infinite_golden_values_fail(toy_copy: Path) -> None:
    change_golden(toy_copy, case1__mask=np.full((1, 3, 32, 32), np.inf, np.float32))
    assert not verify_engine(toy_copy).ok


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_golden_file_is_read_or_refused(
    toy_engine: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray((toy_engine / "golden.npz").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # half of the draws near the end, where the archive's directory is
        place = data.draw(
            st.integers(0, len(content) - 1) | st.integers(len(content) - 3000, len(content) - 1)
        )
        content[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    path = tmp_path / "golden.npz"
    path.write_bytes(content[:end])
    try:
        cases = load_golden(path)
    except EngineError as error:
        assert len(str(error)) < 1000  # noqa: PT017
        return
    assert all(array.size for tensors in cases.values() for array in tensors.values())

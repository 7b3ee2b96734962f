"""mdf_sdk.memory: what an engine needs, and what is refused before anything is allocated."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mdf_sdk import Manifest, load_manifest
from mdf_sdk.clock import Mark
from mdf_sdk.engine import Engine
from mdf_sdk.errors import DeviceMemoryError
from mdf_sdk.manifest import BLOCKS, FileEntry, PlanSpec, Precision
from mdf_sdk.memory import KEPT_PHOTOGRAPHS, MemoryPlan, check_memory, required_bytes
from mdf_sdk.sessions import Array, Session, Tensor
from mdf_sdk.sessions.host_memory import free_and_total_bytes
from mdf_sdk.sessions.onnxruntime_cpu import OnnxRuntimeCpu

from .toy_engine import ACTIVATION_BYTES

GB = 10**9
TOTAL = 8 * GB
DEVICES = ("cpu", "cuda", "tensorrt")
# Growth of resident memory was 0.82 to 0.95 of what is told, nano and smol-135m on two cores.
LEAST_USED = 0.6

# Resident memory, in bytes, that opening an engine and predicting adds at its peak.
GROWTH = """
import sys
import numpy as np
import onnxruntime, tokenizers
from PIL import Image
from mdf_sdk import MDFClassifier

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

before = resident("VmRSS")
with MDFClassifier(sys.argv[1], device="cpu", threads=1) as classifier:
    photograph = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for text in ("one word", "many words " * 500) * 2:
        classifier.predict(photograph, text, mask=True)
print(resident("VmHWM") - before)
"""


class Card:
    """A backend of which only the memory matters; it opens nothing."""

    name, device, card, slots, overlaps = "toy 1.0", "cuda", "Toy Card (8.9)", 1, False

    def __init__(self, free: int, total: int = TOTAL, device: str = "cuda") -> None:
        self._memory, self.device = (free, total), device

    def free_and_total_bytes(self) -> tuple[int, int] | None:
        return self._memory

    def files(self, block: str) -> tuple[str, ...]:
        raise AssertionError("not to be asked")

    def open(self, block: str) -> Session:
        raise AssertionError("not to be opened")

    def text_rows(self, rows: int) -> int:
        raise AssertionError("not to be asked")

    def empty_pixels(self, size: int) -> Array:
        raise AssertionError("not to be asked")

    def to_host(self, tensor: Tensor) -> Array:
        raise AssertionError("not to be asked")

    def mark(self) -> Mark:
        raise AssertionError("not to be asked")

    def device_bytes(self) -> int | None:
        raise AssertionError("not to be asked")


class UnknownCard(Card):
    def free_and_total_bytes(self) -> tuple[int, int] | None:
        return None


@pytest.fixture(scope="module")
def manifest(toy_engine: Path) -> Manifest:
    return load_manifest(toy_engine)


def large(manifest: Manifest, precision: Precision, decoder_bytes: int) -> Manifest:
    """The same engine, its decoder so large and in another precision, and so its tower."""
    blocks = {
        name: dataclasses.replace(block, precision=precision)
        if name in ("vision", "fusion", "decoder")
        else block
        for name, block in manifest.blocks.items()
    }
    weights = FileEntry("0" * 64, decoder_bytes)
    files = {**manifest.files, "decoder.onnx.data": weights}
    return dataclasses.replace(manifest, precision=precision, blocks=blocks, files=files)


@pytest.mark.parametrize("device", DEVICES)
def test_the_total_is_the_sum_of_its_parts(manifest: Manifest, device: str) -> None:
    plan = required_bytes(manifest, device)
    assert plan.total_bytes == (
        sum(plan.weights_bytes[name] + plan.activation_bytes[name] for name in BLOCKS)
        + plan.kept_bytes
        + plan.overhead_bytes
    )
    assert plan.overhead_bytes > 0


def test_on_a_card_graph_and_external_data_count_as_they_are(manifest: Manifest) -> None:
    plan = required_bytes(large(manifest, "int4", 5 * GB), "cuda")
    assert plan.weights_bytes["decoder"] == 5 * GB + manifest.files["decoder.onnx"].bytes
    assert plan.weights_bytes["fusion"] == manifest.files["fusion.onnx"].bytes
    assert set(plan.activation_bytes.values()) == {ACTIVATION_BYTES}


def test_the_images_blocks_are_kept_for_every_photograph(manifest: Manifest) -> None:
    image_blocks = (manifest.blocks[name] for name in ("vision", "unet_encoder", "fusion"))
    values = sum(
        int(np.prod([1, *tensor.shape[1:]])) for block in image_blocks for tensor in block.outputs
    )
    assert required_bytes(manifest, "cuda").kept_bytes == KEPT_PHOTOGRAPHS * 4 * values


def test_the_cpu_widens_what_is_stored_in_less_than_float32(manifest: Manifest) -> None:
    wide, half = (required_bytes(large(manifest, p, GB), "cpu") for p in ("fp32", "fp16"))
    assert half.weights_bytes["decoder"] >= 2 * wide.weights_bytes["decoder"] * 0.95
    assert half.activation_bytes["decoder"] == 2 * wide.activation_bytes["decoder"]
    assert half.activation_bytes["unet_decoder"] == wide.activation_bytes["unet_decoder"]


def test_predictions_at_the_same_time_have_live_tensors_of_their_own(manifest: Manifest) -> None:
    one, four = (required_bytes(manifest, "cpu", slots=slots) for slots in (1, 4))
    assert four.weights_bytes == one.weights_bytes
    assert four.activation_bytes == {n: 4 * live for n, live in one.activation_bytes.items()}


def test_for_tensorrt_the_plans_of_one_compiler_count(manifest: Manifest) -> None:
    def plan(file: str, builder: str) -> PlanSpec:
        block = manifest.blocks["decoder"]
        return PlanSpec(
            "decoder", file, builder, ("8.9",), block.inputs, block.outputs, {}, build_s=1.0
        )

    sizes = {"plans/a": 300, "plans/b": 200, "plans/c": 400}
    compiled = dataclasses.replace(
        manifest,
        plans=(plan("plans/a", "rtx 1"), plan("plans/b", "rtx 1"), plan("plans/c", "trt 2")),
        files=manifest.files | {name: FileEntry("0" * 64, size) for name, size in sizes.items()},
    )
    assert required_bytes(compiled, "tensorrt").weights_bytes["decoder"] == 500
    assert required_bytes(compiled, "cuda") == required_bytes(manifest, "cuda")


def test_a_plan_prints_a_row_for_each_block_and_the_total() -> None:
    plan = MemoryPlan("cuda", {"decoder": 5 * GB}, {"decoder": 10**8}, 2 * 10**7, 6 * 10**8, "CUDA")
    assert [line.split() for line in str(plan).splitlines()] == [
        ["cuda", "weights", "live", "tensors"],
        ["decoder", "5.00", "GB", "100.0", "MB"],
        ["kept", "photographs", "20.0", "MB"],
        ["CUDA", "600.0", "MB"],
        ["needed", "5.72", "GB"],
    ]


def test_what_fits_to_the_byte_is_let_through(manifest: Manifest) -> None:
    needed = required_bytes(manifest, "cuda").total_bytes
    check_memory(manifest, Card(needed))
    with pytest.raises(DeviceMemoryError):
        check_memory(manifest, Card(needed - 1))


def test_where_the_free_memory_is_unknown_nothing_is_refused(manifest: Manifest) -> None:
    check_memory(large(manifest, "fp32", 10**15), UnknownCard(0))


def test_the_refusal_tells_the_figures_and_the_finest_precision_that_fits(
    manifest: Manifest,
) -> None:
    with pytest.raises(DeviceMemoryError) as caught:
        check_memory(large(manifest, "fp16", 12 * GB), Card(7_900_000_000))
    words = str(caught.value)
    assert "found 7.90 GB free of 8.00 GB (Toy Card (8.9))" in words
    assert "cuda 13.20 GB: weights 12.00 GB" in words
    # 12 GB x 1.0625 / 2 = 6.375, and 1.2 of CUDA
    assert "--precision int8: about 7.58 GB" in words


@pytest.mark.parametrize(
    ("precision", "decoder_bytes", "fits"),
    [("fp32", 13 * GB, "fp16"), ("fp16", 16 * GB, "int4"), ("int8", 10 * GB, "int4")],
)
def test_each_precision_is_estimated_from_the_engines_own_bytes(
    manifest: Manifest, precision: Precision, decoder_bytes: int, fits: str
) -> None:
    with pytest.raises(DeviceMemoryError, match=f"Export it with --precision {fits}"):
        check_memory(large(manifest, precision, decoder_bytes), Card(TOTAL))


@pytest.mark.parametrize(("precision", "decoder_bytes"), [("fp32", 20 * GB), ("fp16", 10 * GB)])
def test_on_a_processor_the_refusal_names_the_precision_that_is_for_it(
    manifest: Manifest, precision: Precision, decoder_bytes: int
) -> None:
    processor = Card(TOTAL, device="cpu")
    with pytest.raises(
        DeviceMemoryError, match=r"Export it with --precision w8a8: about 6\.\d\d GB"
    ):
        check_memory(large(manifest, precision, decoder_bytes), processor)


def test_where_no_precision_fits_the_refusal_says_so(manifest: Manifest) -> None:
    with pytest.raises(DeviceMemoryError, match=r"No precision .* int4 needs about 29\.\d\d GB"):
        check_memory(large(manifest, "fp16", 100 * GB), Card(TOTAL))


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_where_another_process_has_the_card_the_refusal_says_where_to_look(
    manifest: Manifest, precision: Precision
) -> None:
    """The second process on one 8 GB card."""
    engine = large(manifest, precision, 6 * GB)
    check_memory(engine, Card(TOTAL))
    with pytest.raises(DeviceMemoryError, match="nvidia-smi"):
        check_memory(engine, Card(TOTAL - required_bytes(engine, "cuda").total_bytes))


def test_an_engine_is_refused_before_a_block_is_opened(
    toy_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdf_sdk.engine.open_backend", lambda *_, **__: Card(10**6))
    with pytest.raises(DeviceMemoryError):
        Engine(toy_engine, device="cuda", blocks=BLOCKS)


def test_an_allocation_that_fails_is_the_same_error(toy_copy: Path, manifest: Manifest) -> None:
    """A graph that asks for 2 ** 60 bytes, which no system has."""
    path = toy_copy / "vision.onnx"
    model = onnx.load(path)
    huge = numpy_helper.from_array(np.array([2**29, 2**29]), "huge")
    one = helper.make_tensor("one", TensorProto.FLOAT, (1, 1), [1.0])
    model.graph.initializer.extend((huge, one))
    model.graph.node.append(helper.make_node("Expand", ["one", "huge"], ["e"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["e"], ["s"], keepdims=0))
    model.graph.node[-3].output[0] = "unfinished"
    model.graph.node.append(helper.make_node("Add", ["unfinished", "s"], ["vision_states"]))
    onnx.save(model, path)
    session = OnnxRuntimeCpu(toy_copy, manifest, 1)
    pixels = np.zeros((1, 3, 16, 16), np.float32)
    with pytest.raises(DeviceMemoryError, match="block vision: found too little memory"):
        session.open("vision").run({"tower_pixels": pixels})


def write_host(
    root: Path, groups: str, files: Mapping[str, str], *, available_kb: int = 4000
) -> Path:
    """A root of proc and sys with 8000 kB, of which so many are free."""
    meminfo = f"MemTotal: 8000 kB\nMemFree: 1 kB\nMemAvailable: {available_kb} kB\n"
    everything = {"proc/meminfo": meminfo, "proc/self/cgroup": groups, **files}
    for name, content in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' proc and sys")


@linux
def test_without_a_limit_the_machines_own_memory_counts(tmp_path: Path) -> None:
    group = {"max": "max\n", "current": "400000\n", "stat": "inactive_file 1\n"}
    files = {f"sys/fs/cgroup/memory.{name}": content for name, content in group.items()}
    assert free_and_total_bytes(write_host(tmp_path, "0::/\n", files)) == (4_096_000, 8_192_000)


@linux
@pytest.mark.parametrize(
    ("groups", "folder", "names"),
    [
        ("0::/a/b\n", "a/b", ("memory.max", "memory.current", "inactive_file")),
        ("0::/a/b\n", "a", ("memory.max", "memory.current", "inactive_file")),
        ("0::/elsewhere\n", ".", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu,memory:/a\n1:name=x:/a\n",
            "memory/a",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_a_containers_limit_counts(
    tmp_path: Path, groups: str, folder: str, names: tuple[str, str, str]
) -> None:
    limit, used, cache = names
    group = f"sys/fs/cgroup/{folder}"
    files = {
        f"{group}/{limit}": "1000000\n",
        f"{group}/{used}": "400000\n",
        f"{group}/memory.stat": f"anon 1\n{cache} 100000\n",
    }
    assert free_and_total_bytes(write_host(tmp_path, groups, files)) == (700_000, 1_000_000)


@linux
def test_a_system_that_tells_nothing_is_unknown(tmp_path: Path) -> None:
    assert free_and_total_bytes(tmp_path) is None


@linux
def test_this_machine_has_memory() -> None:
    memory = free_and_total_bytes()
    assert memory is not None
    free, total = memory
    assert 0 < free <= total


@linux
def test_what_is_told_for_the_cpu_bounds_what_is_used(demo_engine: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", GROWTH, str(demo_engine)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert re.fullmatch(r"\d+\n", process.stdout), process.stderr
    told = required_bytes(load_manifest(demo_engine), "cpu").total_bytes
    assert LEAST_USED * told < int(process.stdout) <= told

"""A stand-in for `tensorrt_rtx`: its plans are ONNX graphs, which ONNX Runtime computes.

Has no name that the real package lacks (tests/export/test_tensorrt_runtime.py compares them), and
reads and writes what it is given by address.
"""

import ctypes
import dataclasses
import enum
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime
import pytest

from mdf_sdk.integrity import digest
from mdf_sdk.manifest import (
    BLOCKS,
    PLANS_NAME,
    Manifest,
    PlanSpec,
    TensorSpec,
    load_manifest,
    save_manifest,
)

from .host_memory import HostMemory

__version__ = "1.7.1.116"

PROFILE = {"batch": (1, 1, 8), "tokens": (1, 40, 96), "columns": (1, 60, 128)}


@dataclass
class Behavior:
    """What goes wrong, and what has happened."""

    diagnostics: int = 0
    fails: str = ""  # a method that returns its failure
    code: str = "UNSPECIFIED_ERROR"
    cards: list["HostCard"] = field(default_factory=list)  # for each queue
    replays: int = 0
    waits: int = 0
    compiled: list[tuple[int, ...]] = field(default_factory=list)
    deserialized: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


_behavior = Behavior()


def install(monkeypatch: pytest.MonkeyPatch) -> Behavior:
    """Put this module in the package's place, and the host's memory in the card's."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", sys.modules[__name__])
    monkeypatch.setattr("mdf_sdk.sessions.cuda_memory.CudaMemory", HostCard)
    monkeypatch.setattr(f"{__name__}._behavior", Behavior())
    return _behavior


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)


class IErrorRecorder:
    pass


class ErrorCodeTRT(enum.Enum):
    UNSPECIFIED_ERROR = 1
    FAILED_ALLOCATION = 5


class EngineValidity(enum.Enum):
    VALID = 0
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    INSUFFICIENT_GPU_MEMORY = 16


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0


class TensorFormat(enum.Enum):
    LINEAR = 0


class DataType(enum.Enum):
    FLOAT = "float32"
    HALF = "float16"
    INT64 = "int64"
    BOOL = "bool"


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.error_recorder: Any = None

    def get_engine_validity(self, buffer: Any) -> tuple[EngineValidity, int]:
        found = _behavior.diagnostics
        return (EngineValidity.INVALID if found else EngineValidity.VALID), found

    def deserialize_cuda_engine(self, buffer: Any) -> "ICudaEngine | None":
        if _fails(self, "deserialize_cuda_engine"):
            return None
        return ICudaEngine(self, bytes(buffer))


class IRuntimeCache:
    def __init__(self) -> None:
        self._kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps(sorted(self._kernels)).encode()

    def deserialize(self, blob: bytes) -> bool:
        _behavior.deserialized.append(blob)
        self._kernels = set(json.loads(blob))
        return True


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = (
            DynamicShapesKernelSpecializationStrategy.LAZY
        )
        self._allocation = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self._allocation = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class ICudaEngine:
    def __init__(self, runtime: Runtime, plan: bytes) -> None:
        head, _, graph = plan.partition(b"\n")
        self._runtime, self._bindings = runtime, json.loads(head)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options)
        self.num_io_tensors = len(self._bindings)

    def get_tensor_name(self, index: int) -> str:
        return list(self._bindings)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self._bindings[name]["mode"]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._bindings[name]["dtype"])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(d, str) else d for d in self._bindings[name]["shape"]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_format(self, name: str) -> TensorFormat:
        return TensorFormat.LINEAR

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        shape = self._bindings[name]["shape"]
        return [[PROFILE[d][i] if isinstance(d, str) else d for d in shape] for i in range(3)]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, runtime_config: IRuntimeConfig
    ) -> "IExecutionContext | None":
        if _fails(self._runtime, "create_execution_context"):
            return None
        return IExecutionContext(self, runtime_config)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        assert config._allocation is ExecutionContextAllocationStrategy.USER_MANAGED
        self._engine, self._config = engine, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._captured: dict[tuple[tuple[int, ...], ...], tuple[dict[str, int], int]] = {}
        self._memory = (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return not _fails(self._engine._runtime, "set_input_shape")

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 * max(shape[0] for shape in self._shapes.values())

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (memory, size)
        _behavior.sizes.append(size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if _fails(self._engine._runtime, "execute_async_v3"):
            return False
        (card,) = (card for card in _behavior.cards if card.stream == stream_handle)
        for pointer in (self._memory[0], *self._addresses.values()):
            card.check(pointer)
        assert self._memory[1] >= self.update_device_memory_size_for_shapes()
        shapes, config = tuple(self._shapes.values()), self._config
        if config._cache is not None:
            assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
            if str(shapes) not in config._cache._kernels:
                _behavior.compiled.append(shapes[0])
                config._cache._kernels.add(str(shapes))
        state = (dict(self._addresses), self._memory[0])
        if config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE:
            _behavior.replays += self._captured.get(shapes) == state
            self._captured[shapes] = state
        ctypes.memset(self._memory[0], 0xEE, self._memory[1])
        feeds = {}
        for name, shape in self._shapes.items():
            dtype = np.dtype(self._engine.get_tensor_dtype(name).value)
            size = int(np.prod(shape)) * dtype.itemsize
            content = ctypes.string_at(self._addresses[name], size)
            feeds[name] = np.frombuffer(content, dtype).reshape(shape)
        names = [output.name for output in self._engine._session.get_outputs()]
        for name, value in zip(names, self._engine._session.run(names, feeds), strict=True):
            ctypes.memmove(
                self._addresses[name], np.ascontiguousarray(value).tobytes(), value.nbytes
            )
        return True


def _fails(runtime: Runtime, method: str) -> bool:
    if _behavior.fails != method:
        return False
    runtime.error_recorder.report_error(ErrorCodeTRT[_behavior.code], f"{method} went wrong")
    return True


class HostCard(HostMemory):
    """The host's memory with what TensorRT needs besides."""

    def beside(self) -> Self:
        other = super().beside()
        _behavior.cards.append(other)
        return other

    def wait(self) -> None:
        super().wait()
        _behavior.waits += 1


def compile_toy(
    engine_dir: Path, package: str = "tensorrt_rtx", capabilities: tuple[str, ...] = ("8.6", "8.9")
) -> Manifest:
    """Put plans beside a toy engine's graphs; the decoder is two."""
    manifest = load_manifest(engine_dir)
    plans, files = [], dict(manifest.files)
    folder = f"{PLANS_NAME}/{package}"
    (engine_dir / folder).mkdir(parents=True, exist_ok=True)
    for block in BLOCKS:
        spec = manifest.blocks[block]
        model = onnx.load(engine_dir / spec.file)
        parts = [(model, spec.inputs, spec.outputs)]
        if block == "decoder":
            parts = _cut(model, spec.inputs, spec.outputs)
        for i, (part, inputs, outputs) in enumerate(parts):
            file = f"{folder}/{block}.{i}.plan"
            bindings = {
                tensor.name: {"mode": mode, "dtype": tensor.dtype, "shape": tensor.shape}
                for mode, tensors in (("INPUT", inputs), ("OUTPUT", outputs))
                for tensor in tensors
            }
            head = json.dumps(bindings).encode()
            (engine_dir / file).write_bytes(head + b"\n" + part.SerializeToString())
            files[file] = digest(engine_dir / file)
            free = {d for tensor in inputs for d in tensor.shape if isinstance(d, str)}
            plans.append(
                PlanSpec(
                    block=block,
                    file=file,
                    builder=f"{package} {__version__}",
                    compute_capabilities=capabilities,
                    inputs=inputs,
                    outputs=outputs,
                    profile={name: PROFILE[name] for name in sorted(free)},
                    build_s=0.1,
                )
            )
    manifest = dataclasses.replace(manifest, plans=(*manifest.plans, *plans), files=files)
    save_manifest(manifest, engine_dir)
    return manifest


def _cut(
    model: onnx.ModelProto, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> list[tuple[onnx.ModelProto, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]:
    """Cut the toy decoder before its head."""
    width = next(tensor.shape[2] for tensor in inputs if tensor.name == "inputs_embeds")
    assert isinstance(width, int)
    stream = TensorSpec("both", "float32", ("batch", 2 * width))
    value = onnx.helper.make_tensor_value_info("both", onnx.TensorProto.FLOAT, stream.shape)
    first, last = onnx.ModelProto(), onnx.ModelProto()
    for part in (first, last):
        part.CopyFrom(model)
        del part.graph.node[:]
    for node in model.graph.node:
        part = last if node.output[0] in ("logits", "scores") else first
        part.graph.node.append(node)
    scores, pooled = (
        next(v for v in model.graph.output if v.name == name) for name in ("scores", "pooled")
    )
    for part, given, taken in ((first, [pooled, value], None), (last, [scores], [value])):
        del part.graph.output[:]
        part.graph.output.extend(given)
        if taken is not None:
            del part.graph.input[:]
            part.graph.input.extend(taken)
    by_name = {tensor.name: tensor for tensor in outputs}
    return [
        (first, inputs, (by_name["pooled"], stream)),
        (last, (stream,), (by_name["scores"],)),
    ]

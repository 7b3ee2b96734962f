"""TensorRT on an NVIDIA card: the plans that `mdf compile` put beside the graphs.

One file for `tensorrt_rtx` and `tensorrt`, which have the same Python API; a plan's `builder` says
whose it is. A large block is several plans, which run one after another.

No plan was executed on a card by us: everything up to the card is tested, against a stand-in and
the real package. `mdf verify --device tensorrt ENGINE` proves the rest where there is a card.
"""

import functools
import importlib
import logging
import mmap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdf_sdk.errors import (
    BackendRunError,
    BackendUnavailableError,
    DeviceMemoryError,
    ManifestError,
    MDFError,
)
from mdf_sdk.manifest import BLOCKS, BlockSpec, Manifest, PlanSpec, TensorSpec
from mdf_sdk.sessions import Tensor
from mdf_sdk.sessions.device_memory import CardBackend, DeviceArray, DeviceMemory, copy_all
from mdf_sdk.sessions.kernel_cache import KernelCache

if TYPE_CHECKING:  # no stubs come with it; a test makes some and checks this file with them
    import tensorrt_rtx as trt_types  # type: ignore[import-not-found, import-untyped, unused-ignore]

# What was compiled on the very card goes before what runs on several families.
PACKAGES = ("tensorrt", "tensorrt_rtx")
_INSTALL = {
    "tensorrt": "NVIDIA's TensorRT with its Python bindings",
    "tensorrt_rtx": "pip install 'mdf-mllm[tensorrt-rtx]'",
}
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "bool": "BOOL"}
_BYTE: "np.dtype[Any]" = np.dtype(np.uint8)


def import_package(package: str) -> Any:
    """Import `tensorrt_rtx` or `tensorrt`.

    Raises:
        BackendUnavailableError: not installed, or broken.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:  # a library of the package may be what is missing
        raise BackendUnavailableError(
            f"device 'tensorrt': found no working {package} ({error}), expected the package that "
            f"the plans are for. Install it: {_INSTALL[package]}"
        ) from error


class TensorRTBackend(CardBackend):
    """The plans of an engine for this card, of the first of PACKAGES that has them and runs them.

    `memory` may be of another kind in tests.
    """

    device = "tensorrt"

    def __init__(self, engine_dir: Path, manifest: Manifest, memory: DeviceMemory) -> None:
        """Raises:
        BackendUnavailableError: no plans for this card, or no package that reads them.
        ManifestError: the plans do not make up the blocks.
        """
        super().__init__(memory)
        self._directory, self._blocks = engine_dir, manifest.blocks
        self._trt, self._package, plans = _choose(manifest, memory)
        self._plans = {
            block: tuple(plan for plan in plans if plan.block == block) for block in BLOCKS
        }
        for block, its_plans in self._plans.items():
            _check_chain(block, manifest.blocks[block], its_plans)
        self.name = f"{self._package} {self._trt.__version__}"
        self._cache = KernelCache(engine_dir)
        self._first_runs = threading.Lock()

    def files(self, block: str) -> tuple[str, ...]:
        return tuple(plan.file for plan in self._plans[block])

    def open(self, block: str, rows: Iterable[int] = ()) -> "TensorRTSession":
        kernels = f"{self._package}-{self._memory.compute_capability}-{block}.bin"
        return TensorRTSession(
            self._trt,
            block,
            self._blocks[block],
            [(plan, self._directory / plan.file) for plan in self._plans[block]],
            self._memory,
            (self._cache, kernels) if self._package == "tensorrt_rtx" else None,
            self._first_runs,
        )


@dataclass(frozen=True)
class _Part:
    """A plan on the card; `engine` holds its weights, `context` the state of a run."""

    plan: PlanSpec
    engine: "trt_types.ICudaEngine"
    context: "trt_types.IExecutionContext"


class TensorRTSession:
    """One block; one call at a time.

    For a single case every tensor has an address of its own, one for each shape: TensorRT-RTX
    replays a captured CUDA graph as long as the addresses stay. Its kernels for a shape are
    compiled before they first run: compiled meanwhile they would change a later answer's bytes.
    """

    def __init__(
        self,
        trt: Any,
        block: str,
        spec: BlockSpec,
        plans: Sequence[tuple[PlanSpec, Path]],
        memory: DeviceMemory,
        kernels: tuple[KernelCache, str] | None,
        first_runs: threading.Lock,
    ) -> None:
        """Args:
        plans: in the order in which they run, with their files, which were proved before.
        kernels: where compiled kernels are kept, and under which name; None if there are none.
        first_runs: one session after another compiles and captures.
        """
        self._trt, self._block, self._spec = trt, block, spec
        self._kernels, self._first_runs = kernels, first_runs
        self._errors = _error_recorder_class(trt)()
        self._parts: list[_Part] = []
        self._runtime_cache: Any = None
        self._scratch: DeviceArray | None = None
        self._kept: dict[tuple[str, tuple[int, ...]], DeviceArray] = {}
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        with self._mapped_errors("load"):
            self._memory = memory.beside()
            self._runtime: trt_types.Runtime = trt.Runtime(_logger(trt))
            self._runtime.error_recorder = self._errors
            for plan, path in plans:
                self._parts.append(self._load(plan, path))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self._mapped_errors("run"):
            if not self._parts:
                raise RuntimeError("it is closed")
            shapes = tuple(inputs[spec.name].shape for spec in self._spec.inputs)
            dimensions = self._dimensions(shapes)
            single = shapes[0][0] == 1
            tensors: dict[str, DeviceArray] = {}
            for spec in (*self._spec.inputs, *(t for p in self._parts for t in p.plan.outputs)):
                tensors[spec.name] = self._array(spec, dimensions, keep=single)
            first = shapes not in self._seen
            with self._first_runs if first else nullcontext():
                scratch = self._set_shapes(tensors)
                self._memory.write(
                    *((tensors[spec.name], inputs[spec.name]) for spec in self._spec.inputs)
                )
                self._execute(tensors, scratch)
            if first:
                self._seen.add(shapes)
                self._save_kernels()
            outputs = {spec.name: tensors[spec.name] for spec in self._spec.outputs}
            if single:
                outputs = copy_all(self._memory, outputs)  # the next run writes over them
                self._memory.wait()
            return dict(outputs)

    def close(self) -> None:
        self._kept, self._scratch, self._runtime_cache = {}, None, None
        self._parts = []
        self._memory.trim()

    def _load(self, plan: PlanSpec, path: Path) -> _Part:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if self._kernels is not None:
                self._check_validity(data)
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise RuntimeError("it is refused")
        _check_bindings(engine, plan)
        config = engine.create_runtime_config()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(strategy)
        if self._kernels is not None:
            self._configure_rtx(config)
        context = engine.create_execution_context(config)
        if context is None:
            raise RuntimeError("there is no context for it")
        return _Part(plan, engine, context)

    def _check_validity(self, data: mmap.mmap) -> None:
        """Let TensorRT-RTX say, from a plan's header, why it would not run here."""
        _, found = self._runtime.get_engine_validity(data)
        reasons = self._trt.EngineInvalidityDiagnostics.__members__.items()
        names = [name for name, reason in reasons if int(found) & int(reason)]
        if "INSUFFICIENT_GPU_MEMORY" in names:
            raise self._too_little_memory("INSUFFICIENT_GPU_MEMORY")
        if names:
            raise BackendUnavailableError(
                f"block {self._block}: found a plan that does not run here ({', '.join(names)}), "
                "expected one for this card, driver and release. Update the NVIDIA driver, or "
                "compile again: mdf compile ENGINE"
            )
        self._errors.clear()

    def _configure_rtx(self, config: "trt_types.IRuntimeConfig") -> None:
        trt = self._trt
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._runtime_cache is None and self._kernels is not None:
            cache, name = self._kernels
            self._runtime_cache = config.create_runtime_cache()
            kept = cache.load(name)
            if kept:  # what another card or driver made, it ignores
                self._runtime_cache.deserialize(kept)
                self._errors.clear()
        config.set_runtime_cache(self._runtime_cache)

    def _save_kernels(self) -> None:
        if self._kernels is not None:
            cache, name = self._kernels
            content = self._runtime_cache.serialize()
            if content is not None:
                cache.save(name, bytes(content))

    def _dimensions(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """Return the free dimensions of inputs, or say what does not fit the plans."""
        dimensions: dict[str, int] = {}
        for spec, shape in zip(self._spec.inputs, shapes, strict=True):
            if len(shape) == len(spec.shape):
                for declared, side in zip(spec.shape, shape, strict=True):
                    if isinstance(declared, str):
                        dimensions.setdefault(declared, side)
            if shape != _sides(spec, dimensions):
                raise ValueError(f"{spec.name}: found {shape}, expected {spec.shape}")
        for part in self._parts:
            for name, (low, _, high) in part.plan.profile.items():
                if not low <= dimensions[name] <= high:
                    raise ValueError(f"found {name} = {dimensions[name]}, expected {low} to {high}")
        return dimensions

    def _array(self, spec: TensorSpec, dimensions: Mapping[str, int], keep: bool) -> DeviceArray:
        shape = _sides(spec, dimensions)
        array = self._kept.get((spec.name, shape)) if keep else None
        if array is None:
            array = self._memory.empty(shape, np.dtype(spec.dtype))
        if keep:
            self._kept[spec.name, shape] = array
        return array

    def _set_shapes(self, tensors: Mapping[str, DeviceArray]) -> DeviceArray:
        """Return the memory that the parts, one after another, compute in."""
        need = 0
        for part in self._parts:
            for spec in part.plan.inputs:
                _succeed(part.context.set_input_shape(spec.name, tensors[spec.name].shape))
            need = max(need, part.context.update_device_memory_size_for_shapes())
        if self._scratch is None or self._scratch.nbytes < need:
            self._scratch = None  # first freed, then taken larger
            self._scratch = self._memory.empty((need,), _BYTE)
        return self._scratch

    def _execute(self, tensors: Mapping[str, DeviceArray], scratch: DeviceArray) -> None:
        try:
            for part in self._parts:
                part.context.set_device_memory(scratch.pointer, scratch.nbytes)
                for spec in (*part.plan.inputs, *part.plan.outputs):
                    _succeed(part.context.set_tensor_address(spec.name, tensors[spec.name].pointer))
                _succeed(part.context.execute_async_v3(self._memory.stream))
        finally:  # memory in use must not be freed, by an error neither
            self._memory.wait()

    @contextmanager
    def _mapped_errors(self, action: str) -> Iterator[None]:
        self._errors.clear()
        try:
            yield
        except MDFError:
            raise
        except Exception as error:
            reason = " ".join([str(error), *self._errors.messages()])[:300]
            if self._errors.is_allocation():
                raise self._too_little_memory(reason) from error
            raise BackendRunError(
                f"block {self._block}: TensorRT could not {action} it ({reason}), expected it to "
                f"{action}. Check the engine and this machine: mdf verify --device tensorrt ENGINE"
            ) from error

    def _too_little_memory(self, reason: str) -> DeviceMemoryError:
        free, total = self._memory.free_and_total_bytes()
        return DeviceMemoryError(
            f"block {self._block}: found {free / 1e9:.1f} GB free of the card's {total / 1e9:.1f} "
            f"({reason}), expected enough for the block. Close what else uses the card, or export "
            "a smaller engine: mdf export CHECKPOINT ENGINE --precision int4"
        )


def _choose(manifest: Manifest, memory: DeviceMemory) -> tuple[Any, str, tuple[PlanSpec, ...]]:
    """Return a package that runs its plans here, its name, and the plans."""
    reasons = []
    for package in PACKAGES:
        plans = tuple(plan for plan in manifest.plans if _builder(plan)[0] == package)
        if plans:
            try:
                return _check_package(package, plans, memory), package, plans
            except BackendUnavailableError as error:
                reasons.append(str(error))
    raise BackendUnavailableError(
        " ".join(reasons)
        or f"device 'tensorrt': found no plans in the engine, expected some for {memory.card}. "
        "Compile it: mdf compile ENGINE"
    )


def _check_package(package: str, plans: Sequence[PlanSpec], memory: DeviceMemory) -> Any:
    trt = import_package(package)
    for plan in plans:
        _, version = _builder(plan)
        if version != trt.__version__:  # a release reads no other's plans
            raise BackendUnavailableError(
                f"device 'tensorrt': found a plan by {plan.builder} and {package} "
                f"{trt.__version__}, expected the same release. Compile it again: "
                f"mdf compile ENGINE --package {package}"
            )
        if memory.compute_capability not in plan.compute_capabilities:
            again = f"mdf compile ENGINE --package {package}"
            if package == "tensorrt_rtx":
                again += f" --compute-capability {memory.compute_capability}"
            raise BackendUnavailableError(
                f"device 'tensorrt': found a plan for {', '.join(plan.compute_capabilities)} and "
                f"{memory.card}, expected one for this card. Compile it again: {again}"
            )
    return trt


def _builder(plan: PlanSpec) -> tuple[str, str]:
    package, _, version = plan.builder.partition(" ")
    return package, version


def _check_chain(block: str, spec: BlockSpec, plans: Sequence[PlanSpec]) -> None:
    """Check that plans, one after another, take and give what their block does."""
    known = {tensor.name: tensor for tensor in spec.inputs}
    free = {d for tensor in spec.inputs for d in tensor.shape if isinstance(d, str)}
    for plan in plans:
        for tensor in plan.inputs:
            if known.get(tensor.name) != tensor:
                raise _unfit(block, f"a plan that reads {tensor}", "what the block or a part gives")
        for tensor in plan.outputs:
            if tensor.name in known or {d for d in tensor.shape if isinstance(d, str)} - free:
                raise _unfit(block, f"a plan that gives {tensor}", "each tensor once")
            known[tensor.name] = tensor
    for tensor in spec.outputs:
        if known.get(tensor.name) != tensor:
            raise _unfit(block, f"no plan that gives {tensor}", "every output of the block")


def _check_bindings(engine: "trt_types.ICudaEngine", plan: PlanSpec) -> None:
    """Compare what a loaded plan reads and writes with what the manifest says of it."""
    expected, found = _declared_bindings(plan), _loaded_bindings(engine)
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise _unfit(
                plan.block,
                f"{name} of {plan.file} as {found.get(name)}",
                f"{expected.get(name)}",
            )


def _declared_bindings(plan: PlanSpec) -> dict[str, tuple[object, ...]]:
    bindings: dict[str, tuple[object, ...]] = {}
    for mode, tensors in (("INPUT", plan.inputs), ("OUTPUT", plan.outputs)):
        for tensor in tensors:
            limits = []
            if mode == "INPUT":
                limits = [
                    _sides(tensor, {d: b[i] for d, b in plan.profile.items()}) for i in range(3)
                ]
            memory = ("DEVICE", "LINEAR")
            bindings[tensor.name] = (
                mode,
                _DTYPES[tensor.dtype],
                _sides(tensor, {}),
                *memory,
                tuple(limits),
            )
    return bindings


def _loaded_bindings(engine: "trt_types.ICudaEngine") -> dict[str, tuple[object, ...]]:
    bindings: dict[str, tuple[object, ...]] = {}
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        mode = engine.get_tensor_mode(name).name
        limits: Sequence[Any] = ()  # (min, opt, max); Dims iterate, but are not typed so
        if mode == "INPUT":
            limits = engine.get_tensor_profile_shape(name, 0)
        shape: Any = engine.get_tensor_shape(name)
        bindings[name] = (
            mode,
            engine.get_tensor_dtype(name).name,
            tuple(shape),
            engine.get_tensor_location(name).name,
            engine.get_tensor_format(name).name,
            tuple(tuple(sides) for sides in limits),
        )
    return bindings


def _unfit(block: str, found: str, expected: str) -> ManifestError:
    return ManifestError(
        f"block {block}: found {found}, expected {expected}. Compile it again: mdf compile ENGINE"
    )


def _sides(spec: TensorSpec, dimensions: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dimensions.get(d, -1) if isinstance(d, str) else d for d in spec.shape)


def _succeed(status: bool) -> None:
    if not status:
        raise RuntimeError("it refused a call")


@functools.cache
def _logger(trt: Any) -> Any:
    """Return the process's logger: TensorRT takes only the first, and prints without one."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                logging.getLogger("mdf_sdk").debug("%s: %s", trt.__name__, message)

    return Logger()


@functools.cache
def _error_recorder_class(trt: Any) -> Any:
    class ErrorRecorder(trt.IErrorRecorder):  # type: ignore[misc]
        """The errors of one session; TensorRT calls it from threads of its own."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._errors: list[tuple[Any, str]] = []

        def report_error(self, code: Any, description: str) -> bool:
            self._errors.append((code, description))
            return False

        def clear(self) -> None:
            self._errors = []

        def num_errors(self) -> int:
            return len(self._errors)

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def messages(self) -> list[str]:
            return [description for _, description in self._errors]

        def is_allocation(self) -> bool:
            return any(code == trt.ErrorCodeTRT.FAILED_ALLOCATION for code, _ in self._errors)

    return ErrorRecorder

"""ONNX Runtime on an NVIDIA card: tensors stay in its memory from block to block.

A case is replayed as a CUDA graph: one launch for a block's hundreds of kernels. Its tensors have
addresses of their own, one for each shape, and prompts are padded to few lengths. A batch is
replayed case by case: at the 11B shape the card has enough to do with one.

Blocks and copies share a queue: each is queued while the one before it runs, and the card waits for
no thread of the host. The U-Net's encoder has a queue of its own, so that it runs beside the tower.
"""

import io
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdf_sdk.errors import BackendUnavailableError
from mdf_sdk.manifest import FUSED_SUFFIX, BlockSpec, Manifest, TensorSpec
from mdf_sdk.sessions import Tensor
from mdf_sdk.sessions.device_memory import (
    CardBackend,
    DeviceArray,
    DeviceMemory,
    concatenate,
    copy_all,
    empty_all,
)
from mdf_sdk.sessions.onnxruntime_load import (
    import_onnxruntime,
    load_graph,
    mapped_errors,
    session_options,
)
from mdf_sdk.sessions.onnxruntime_probe import check_provider

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_PROVIDER_OPTIONS = {
    "cuda": {
        "enable_cuda_graph": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",  # a search by timing differs from run to run
        "cudnn_conv_use_max_workspace": "0",  # more of it gained nothing
    },
    "cpu": {},
}
_ARENAS = {"cuda": "gpu:0", "cpu": "cpu:0"}
# Weights outside the arena are freed when a kernel has repacked them: no second copy.
_CONFIG = {"session.use_device_allocator_for_initializers": "1"}
# The kernel that reads integers wins while rows are few; the tower's 1601 rows are better served by
# a product of dequantized weights. Its variants are timed when it is loaded, so that two processes
# may take different ones, which round differently.
_FEW_ROWS_CONFIG = {"ep.cuda.fpa_intb_gemm": "1"}
# Numbers of rows, powers of two, for which that kernel's variants are timed when it is loaded; any
# other is timed when it first occurs, in a call.
_TUNED_ROWS = "ep.cuda.fpa_intb_profile_m"
# Blocks of one shape and no kernel that repacks weights: weights lie in one piece, and so do
# temporaries. CUDA gives memory in steps of 2 MiB, which each weight alone would round up to.
_ONE_PIECE = ("vision", "fusion")
_ONE_PIECE_CONFIG = {"session.disable_prepacking": "1"}  # or each weight could be freed alone
_BESIDE = "unet_encoder"


class OnnxRuntimeCuda(CardBackend):
    """ONNX Runtime's CUDA execution provider.

    `memory` may be of another kind in tests; the bindings are the same.
    """

    device = "cuda"

    def __init__(
        self,
        engine_dir: Path,
        manifest: Manifest,
        memory: DeviceMemory,
        reproducible: bool = False,
    ) -> None:
        """Raises:
        BackendUnavailableError: no onnxruntime, or one that was built without CUDA.
        """
        self._runtime = import_with_cuda() if memory.kind == "cuda" else import_onnxruntime("cpu")
        super().__init__(memory)
        self._directory, self._manifest = engine_dir, manifest
        self._reproducible = reproducible
        self._places = _Places()
        self.name = f"onnxruntime {self._runtime.__version__}"

    def files(self, block: str) -> tuple[str, ...]:
        file = self._manifest.blocks[block].file
        fused = file + FUSED_SUFFIX  # engines of earlier releases have none
        return (fused if fused in self._manifest.files else file,)

    def open(self, block: str, rows: Iterable[int] = ()) -> "OnnxRuntimeCudaSession":
        spec, (file,) = self._manifest.blocks[block], self.files(block)
        config = dict(_CONFIG)
        if block == "decoder" and not self._reproducible:
            config |= _FEW_ROWS_CONFIG | {_TUNED_ROWS: ",".join(map(str, row_buckets(rows)))}
        if block in _ONE_PIECE:
            config |= _ONE_PIECE_CONFIG
        memory = self._memory.beside() if block == _BESIDE else self._memory
        options = session_options(self._runtime, config)
        # With patterns every shape has a piece of memory of its own, taken at its second run.
        options.enable_mem_pattern = block in _ONE_PIECE
        if block != "vision":  # there ONNX Runtime then takes slower kernels
            options.add_free_dimension_override_by_name("B", 1)
        session = load_graph(
            self._runtime,
            block,
            self._directory / file,
            spec,
            options,
            _PROVIDERS[memory.kind],
            _provider_options(memory, block, spec),
        )
        opened = OnnxRuntimeCudaSession(self._runtime, block, session, spec, memory, self._places)
        try:
            opened.capture()
        except BaseException:
            opened.close()
            raise
        return opened


class _Place:
    """A tensor's own memory on the card, and of which array it holds a copy, if any."""

    def __init__(self, array: DeviceArray) -> None:
        self.array = array
        self._copied: tuple[weakref.ref[Any], int] | None = None

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's values are here already."""
        if self._copied is None or not isinstance(tensor, DeviceArray):
            return False
        owner, pointer = self._copied
        return owner() is tensor.owner and pointer == tensor.pointer

    def note(self, tensor: Tensor | None) -> None:
        """Remember what was copied here, or from here; None once its values change."""
        self._copied = None
        if isinstance(tensor, DeviceArray):
            self._copied = (weakref.ref(tensor.owner), tensor.pointer)


# Tensors' places by name and shape. Bindings own them: a place goes with the last that has it.
_Places = weakref.WeakValueDictionary[tuple[str, tuple[int, ...]], _Place]


@dataclass(frozen=True)
class _Binding:
    """A shape's own inputs and outputs on the card, and the run that reads and writes them."""

    inputs: dict[str, _Place]
    outputs: dict[str, _Place]
    bound: Any
    options: Any


class OnnxRuntimeCudaSession:
    """One block on the card; one call at a time.

    All of them run in the session's own thread: ONNX Runtime captures a graph for the thread that
    runs it, and would capture it anew, in new memory, for every thread of the caller's.
    """

    def __init__(
        self,
        runtime: Any,
        block: str,
        session: Any,
        spec: BlockSpec,
        memory: DeviceMemory,
        places: _Places,
    ) -> None:
        """Args:
        memory: in whose queue the block runs.
        places: shared by all blocks: what one writes another reads, and only blocks without a
            tensor in common run at the same time.
        """
        self._runtime, self._block, self._session = runtime, block, session
        self._spec, self._memory, self._places = spec, memory, places
        self._bindings: dict[tuple[tuple[int, ...], ...], _Binding] = {}
        self._thread = ThreadPoolExecutor(1, f"mdf-{block}")

    def capture(self) -> None:
        """Run a block that has one shape only, while no other thread is at work on the card.

        Blocks that overlap would disturb each other's capture; CUDA lets no one allocate meanwhile.
        """
        inputs = self._spec.inputs
        if len({d for spec in inputs for d in spec.shape if isinstance(d, str)}) == 1:
            single = {s.name: [1 if isinstance(d, str) else d for d in s.shape] for s in inputs}
            self.run({s.name: np.zeros(single[s.name], s.dtype) for s in inputs})
            self._memory.wait()  # its places are for blocks of another queue too

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with mapped_errors(self._block, "run"):
            if self._session is None:
                raise RuntimeError("it is closed")
            return self._thread.submit(self._run, inputs).result()

    def close(self) -> None:
        self._thread.shutdown()
        self._bindings = {}
        self._session = None
        self._memory.trim()

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return self._run_cases(inputs)
        finally:
            if self._block == _BESIDE:
                self._memory.wait()  # what it made is read, or freed, in another queue

    def _run_cases(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        cases = inputs[self._spec.inputs[0].name].shape[0]
        replayed = [
            self._replay({name: tensor[i : i + 1] for name, tensor in inputs.items()})
            for i in range(cases)
        ]
        if cases == 1:
            return dict(replayed[0])
        return {
            name: concatenate(self._memory, [outputs[name] for outputs in replayed])
            for name in replayed[0]
        }

    def _replay(self, inputs: Mapping[str, Tensor]) -> dict[str, DeviceArray]:
        shapes = tuple(inputs[spec.name].shape for spec in self._spec.inputs)
        binding = self._bindings.get(shapes) or self._bind(shapes, graph=len(self._bindings) + 1)
        news = {name: at for name, at in binding.inputs.items() if not at.holds(inputs[name])}
        for place in (*news.values(), *binding.outputs.values()):
            place.note(None)
        self._memory.write(*((place.array, inputs[name]) for name, place in news.items()))
        for name, place in news.items():
            place.note(inputs[name])
        if not self._bindings:
            self._shrink(binding)
        with nullcontext() if shapes in self._bindings else self._memory.capturing():
            self._session.run_with_iobinding(binding.bound, binding.options)
        self._bindings[shapes] = binding
        # The next replay writes over the outputs.
        own = copy_all(self._memory, {name: at.array for name, at in binding.outputs.items()})
        for name, place in binding.outputs.items():
            place.note(own[name])
        return own

    def _shrink(self, binding: _Binding) -> None:
        """Run without capture, and give back what loading took and no run needs.

        After a capture it would be too late: the graph writes to what looks free.
        """
        options = self._runtime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1")
        options.add_run_config_entry(
            "memory.enable_memory_arena_shrinkage", _ARENAS[self._memory.kind]
        )
        self._session.run_with_iobinding(binding.bound, options)

    def _bind(self, shapes: Sequence[tuple[int, ...]], graph: int) -> _Binding:
        dimensions: dict[str, int] = {}
        for spec, shape in zip(self._spec.inputs, shapes, strict=True):
            dimensions |= _free_dimensions(spec.shape, shape)
        inputs = self._take_places(self._spec.inputs, dimensions)
        outputs = self._take_places(self._spec.outputs, dimensions)
        bound, options = self._session.io_binding(), self._runtime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        for bind, places in ((bound.bind_input, inputs), (bound.bind_output, outputs)):
            for name, place in places.items():
                a = place.array
                bind(name, self._memory.kind, 0, a.dtype.type, a.shape, a.pointer)
        return _Binding(inputs, outputs, bound, options)

    def _take_places(
        self, specs: Sequence[TensorSpec], dimensions: Mapping[str, int]
    ) -> dict[str, _Place]:
        """The tensors' places on the card, the same wherever they have these shapes.

        New ones lie in one piece, so that a block's outputs are copied at once.
        """
        shapes = {
            spec.name: tuple(dimensions[d] if isinstance(d, str) else d for d in spec.shape)
            for spec in specs
        }
        found = {name: self._places.get((name, shape)) for name, shape in shapes.items()}
        new = {s.name: (shapes[s.name], np.dtype(s.dtype)) for s in specs if found[s.name] is None}
        made = {name: _Place(array) for name, array in empty_all(self._memory, new).items()}
        places = {name: place or made[name] for name, place in found.items()}
        for name, place in made.items():
            self._places[name, shapes[name]] = place
        return places


def import_with_cuda() -> Any:
    """Import ONNX Runtime, and prove that it computes on the card.

    Raises:
        BackendUnavailableError: not installed, built without CUDA, or a library does not load.
    """
    # For each of cuBLAS' handles 8 MiB on every card; Hopper's default is 32.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    runtime = import_onnxruntime("cuda")
    if _PROVIDERS["cuda"] not in runtime.get_available_providers():
        raise BackendUnavailableError(
            f"device 'cuda': found onnxruntime {runtime.__version__} without CUDA, expected "
            "onnxruntime-gpu. Both are one folder, so one must go: pip uninstall -y onnxruntime "
            "onnxruntime-gpu, then pip install 'mdf-mllm[cuda]'"
        )
    runtime.set_default_logger_severity(4)  # errors reach us as exceptions
    with redirect_stdout(io.StringIO()):  # it prints what it misses; the next line says so better
        runtime.preload_dlls()  # CUDA's and cuDNN's libraries from their own packages
    check_provider(runtime, _PROVIDERS["cuda"])
    return runtime


def row_buckets(rows: Iterable[int]) -> list[int]:
    """Powers of two, one for each number of rows: the next that is not less."""
    return sorted({1 << (n - 1).bit_length() for n in rows})


def _provider_options(memory: DeviceMemory, block: str, spec: BlockSpec) -> dict[str, str]:
    options = dict(_PROVIDER_OPTIONS[memory.kind])
    if memory.kind == "cuda":
        options["user_compute_stream"] = str(memory.stream)
        options["use_tf32"] = "1" if spec.precision == "tf32" else "0"
        # Tensor cores want channels last; cuDNN would transpose before and behind each convolution.
        options["prefer_nhwc"] = "1" if block in ("unet_encoder", "unet_decoder") else "0"
    return options


def _free_dimensions(declared: tuple[int | str, ...], actual: tuple[int, ...]) -> dict[str, int]:
    if len(declared) != len(actual) or any(
        isinstance(d, int) and d != n for d, n in zip(declared, actual, strict=True)
    ):
        raise ValueError(f"found an input of shape {actual}, expected {declared}")
    return {d: n for d, n in zip(declared, actual, strict=True) if isinstance(d, str)}

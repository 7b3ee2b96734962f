"""An engine directory in, TensorRT plans beside its graphs out, compiled ahead of time.

`tensorrt_rtx` needs no card: it compiles for named compute capabilities, several in one plan, which
share its weights. `tensorrt` compiles for the card of the machine that it runs on. Both have the
same Python API. The portable graphs stay, so that an engine can be compiled again anywhere.

A plan carries its weights: without a card, TensorRT-RTX 1.7 builds no plan that could be refitted
from the graph ("CHECK(status == CUDA_SUCCESS) failed"), so they cannot be left to the graph.
"""

import ctypes
import functools
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx

from mdf_export.parts import cut_layers, layer_outputs, tensor_specs, weight_bytes
from mdf_sdk.errors import (
    BackendError,
    BackendUnavailableError,
    EngineError,
    InputError,
    MissingExtraError,
    StorageError,
)
from mdf_sdk.integrity import check_files, digest
from mdf_sdk.manifest import (
    BLOCKS,
    PLANS_NAME,
    PROCESSORS_ALONE,
    TOKENIZER_NAME,
    BlockSpec,
    FileEntry,
    Manifest,
    PlanSpec,
    Precision,
    TensorSpec,
    load_manifest,
    save_manifest,
)
from mdf_sdk.prompt import PromptEncoder

Package = Literal["tensorrt_rtx", "tensorrt"]

# Workstation cards of the last three generations: Ampere, Ada, Blackwell.
RTX_CAPABILITIES = ("8.6", "8.9", "12.0")
# Older cards lack the type, and the compiler refuses the graph for them.
OLDEST_CAPABILITY: dict[Precision, float] = {"int4": 8.0, "fp8": 8.9}
BATCHES = (1, 1, 8)
TYPICAL_TEXT_TOKENS = 64
# A plan of 1.06 GB took 4.3 GB of memory to compile, one of 0.53 GB took 2.3.
PART_BYTES = 1_000_000_000

# What CUDA's driver interface calls a device's attributes.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class _Target:
    """What every graph of an engine is compiled with and for."""

    package: Package
    trt: Any
    capabilities: tuple[str, ...]
    profile: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class _Part:
    """A block's graph or one of its parts, without weights; `graph` is the file that has them."""

    name: str
    block: str
    graph: Path
    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def compile_engine(
    engine_dir: str | os.PathLike[str],
    *,
    package: Package = "tensorrt_rtx",
    compute_capabilities: Sequence[str] | None = None,
    layers_per_plan: int | None = None,
    progress: Callable[[PlanSpec, int], None] | None = None,
) -> Manifest:
    """Compile the five graphs of an engine; plans that the package made earlier are replaced.

    Killed or failed at any moment, the engine is as it was. A signature goes with its manifest.

    Args:
        engine_dir: as `mdf export` writes it.
        package: the compiler.
        compute_capabilities: of the cards to compile for, such as "8.9". By default `tensorrt_rtx`
            takes those of RTX_CAPABILITIES that have the types of the engine; `tensorrt` takes the
            machine's own, and no other.
        layers_per_plan: cut the decoder into plans of so many layers; by default into plans of
            PART_BYTES.
        progress: told of every plan, and of its bytes, as it is made.

    Raises:
        InputError: the package or the engine does not know the target.
        EngineError: the engine is damaged, or cannot be cut.
        MissingExtraError: the package is not installed.
        BackendUnavailableError: `tensorrt` finds no card.
        BackendError: the compiler refuses a graph; names the node and its operator.
        StorageError: the disk is full, or not writable.
    """
    if layers_per_plan is not None and layers_per_plan < 1:
        raise InputError(f"layers per plan: found {layers_per_plan}, expected at least 1")
    directory = Path(engine_dir)
    manifest = load_manifest(directory)
    if manifest.precision in PROCESSORS_ALONE:
        raise InputError(
            f"{directory}: found an engine in {manifest.precision}, which processors alone compute "
            "in, expected fp16, int8 or int4. Export the checkpoint for a card: mdf export "
            "CHECKPOINT ENGINE --precision int4"
        )
    trt = import_compiler(package)
    capabilities = _choose_capabilities(package, trt, compute_capabilities, manifest)
    check_files(directory, manifest)
    target = _Target(package, trt, capabilities, shape_profile(directory, manifest))
    plans: list[tuple[PlanSpec, FileEntry]] = []
    try:
        with plans_workspace(directory) as workspace:
            for block in BLOCKS:
                for part in _read_parts(directory, block, manifest.blocks[block], layers_per_plan):
                    plan, entry = _compile_part(part, target, workspace)
                    plans.append((plan, entry))
                    if progress is not None:
                        progress(plan, entry.bytes)
            return install_plans(directory, manifest, package, plans, workspace)
    except BrokenPipeError:  # of who reads the progress
        raise
    except OSError as error:
        raise StorageError(
            f"{directory}: could not be written to ({error.strerror}), expected room for plans as "
            "large as the graphs. The engine is as it was. Free some disk space or give write "
            f"permission, then: mdf compile {directory}"
        ) from error


def shape_profile(directory: Path, manifest: Manifest) -> dict[str, tuple[int, int, int]]:
    """Return (min, opt, max) of the free dimensions, as the prompt and the labels bound them."""
    tokenizer_json = (directory / TOKENIZER_NAME).read_text(encoding="utf-8")
    encoder = PromptEncoder(tokenizer_json, manifest.prompt, manifest.labels)
    longest = manifest.prompt.max_text_tokens
    around = encoder.count_rows(0)
    text = (1, min(TYPICAL_TEXT_TOKENS, longest), longest)
    prefix = len(encoder.prefix_ids)
    shortest, typical, longest = (around + tokens for tokens in text)
    return {
        "B": BATCHES,
        "T": (shortest, typical, longest),
        "S": (prefix + shortest, prefix + typical, prefix + longest),
    }


def install_plans(
    directory: Path,
    manifest: Manifest,
    package: Package,
    plans: Sequence[tuple[PlanSpec, FileEntry]],
    workspace: Path,
) -> Manifest:
    """Put plans in the place of those that the package made earlier; return the new manifest.

    Each plan's name has its digest, so that it displaces none that the manifest lists. The plans
    are moved first and the manifest is replaced last: the one act that makes them count. Until
    then, and after it, what the manifest does not list is no more than litter in `plans`, which
    `check_files` overlooks and the next call removes.

    Args:
        workspace: a folder of the engine's file system that holds the plans, by their last names.
    """
    kept = [plan for plan in manifest.plans if _package(plan) != package]
    gone = {plan.file for plan in manifest.plans} - {plan.file for plan in kept}
    files = {name: entry for name, entry in manifest.files.items() if name not in gone}
    (directory / PLANS_NAME / package).mkdir(exist_ok=True)
    for plan, entry in plans:
        (workspace / Path(plan.file).name).replace(directory / plan.file)
        kept.append(plan)
        files[plan.file] = entry
    manifest = replace(manifest, plans=tuple(kept), files=files)
    save_manifest(manifest, directory, workspace=workspace)
    return manifest


@contextmanager
def plans_workspace(directory: Path) -> Iterator[Path]:
    """Yield an empty folder in `plans`; before and after, remove what no manifest lists there."""
    plans = directory / PLANS_NAME
    _sweep(directory)
    plans.mkdir(exist_ok=True)
    try:
        yield Path(tempfile.mkdtemp(prefix=".", dir=plans))
    finally:
        _sweep(directory)


def _sweep(directory: Path) -> None:
    """Remove from `plans` what the manifest does not list: leftovers and replaced plans."""
    listed = {directory / name for name in load_manifest(directory).files}
    for path in sorted((directory / PLANS_NAME).rglob("*"), reverse=True):
        if path not in listed:
            # A plan that another process has open cannot be removed everywhere; the next call can.
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
    with suppress(OSError):
        (directory / PLANS_NAME).rmdir()


def _package(plan: PlanSpec) -> str:
    return plan.builder.split()[0]


def import_compiler(package: Package) -> Any:
    if package not in get_args(Package):
        raise InputError(
            f"package: found {package!r}, expected one of {', '.join(get_args(Package))}"
        )
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:  # a library of the package may be what is missing
        cure = (
            "pip install 'mdf-mllm[tensorrt-rtx]'"
            if package == "tensorrt_rtx"
            else "NVIDIA's TensorRT with its Python bindings, or take tensorrt_rtx"
        )
        raise MissingExtraError(
            f"{package}: could not be imported ({error}), expected it installed. Install it: {cure}"
        ) from error


def _choose_capabilities(
    package: Package, trt: Any, wanted: Sequence[str] | None, manifest: Manifest
) -> tuple[str, ...]:
    """Return the capabilities to compile for, or say which of those asked for cannot be had."""
    if package == "tensorrt_rtx":
        members = (name.removeprefix("SM") for name in trt.ComputeCapability.__members__)
        possible = [f"{digits[:-1]}.{digits[-1]}" for digits in members if digits.isdigit()]
        usual: Sequence[str] = RTX_CAPABILITIES
    else:
        possible = [_own_capability()]
        usual = possible
    needs = {block: OLDEST_CAPABILITY.get(b.precision, 0.0) for block, b in manifest.blocks.items()}
    block = max(needs, key=lambda name: needs[name])
    usable = [c for c in possible if float(c) >= needs[block]]
    chosen = tuple(dict.fromkeys([c for c in usual if c in usable] if wanted is None else wanted))
    unknown = [c for c in chosen if c not in usable]
    if unknown or not chosen:
        precision = manifest.blocks[block].precision
        reason = f" and {precision} weights, as in {block}," if needs[block] else ""
        raise InputError(
            f"compute capability: found {', '.join(unknown) or 'none'}, expected of {package} "
            f"{trt.__version__}{reason} one of: {', '.join(usable) or 'none'}. "
            f"For example: mdf compile ENGINE --compute-capability {' '.join(usable[-1:])}"
        )
    return chosen


def _own_capability() -> str:
    """Ask the driver for the compute capability of the machine's first card."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        failed = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), 0)
            or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
            or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        )
    except OSError:
        failed = True
    if failed:
        raise BackendUnavailableError(
            "tensorrt: found no NVIDIA card with a driver, expected the card that the plans are "
            "for. Compile on the machine that has it, or without one: "
            "mdf compile ENGINE --package tensorrt_rtx"
        )
    return f"{major.value}.{minor.value}"


def _read_parts(
    directory: Path, block: str, spec: BlockSpec, layers_per_plan: int | None
) -> Iterator[_Part]:
    """Read a block's graph without its weights; yield it, cut up if it is a decoder and large."""
    path = directory / spec.file
    model = onnx.load(path, load_external_data=False)
    models = [model]
    if block == "decoder":
        layers = len(layer_outputs(model.graph))
        size = weight_bytes(model.graph)
        if layers_per_plan is not None:
            models = cut_layers(model, layers_per_plan)
        elif size > PART_BYTES:
            models = cut_layers(model, max(1, layers * PART_BYTES // size))
    public = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
    for i, part in enumerate(models):
        inputs, outputs = (
            tuple(public.get(tensor.name, tensor) for tensor in tensor_specs(values))
            for values in (part.graph.input, part.graph.output)
        )
        name = block if len(models) == 1 else f"{block}.{i}"
        yield _Part(name, block, path, part, inputs, outputs)


def _compile_part(part: _Part, target: _Target, workspace: Path) -> tuple[PlanSpec, FileEntry]:
    """Compile one graph into a file of the workspace, under the last name of the plan's path."""
    start = time.perf_counter()
    trt, messages = target.trt, _logger(target.trt)
    messages.errors.clear()
    builder = trt.Builder(messages)
    # Always so in TensorRT-RTX and from TensorRT 11 on.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages)
    if not parser.parse(part.model.SerializeToString(), str(part.graph)):
        raise _refusal(part, target, parser)
    _check_bindings(network, part, trt)
    config = builder.create_builder_config()
    if target.package == "tensorrt_rtx":
        config.num_compute_capabilities = len(target.capabilities)
        for i, capability in enumerate(target.capabilities):
            name = f"SM{capability.replace('.', '')}"
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    free = {d for tensor in part.inputs for d in tensor.shape if isinstance(d, str)}
    if unknown := free - target.profile.keys():
        raise EngineError(
            f"{part.name}: found the free dimensions {', '.join(sorted(unknown))}, expected none "
            f"but {', '.join(target.profile)}. Export it again: mdf export CHECKPOINT ENGINE"
        )
    profile = {name: bounds for name, bounds in target.profile.items() if name in free}
    shapes = builder.create_optimization_profile()
    for tensor in part.inputs:
        bounds = zip(
            *(profile[d] if isinstance(d, str) else (d,) * 3 for d in tensor.shape), strict=True
        )
        shapes.set_shape(tensor.name, *bounds)
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        words = " ".join(messages.errors) or "it gave no reason"
        raise BackendError(
            f"{part.name}: {target.package} {trt.__version__} could not compile the graph for "
            f"{', '.join(target.capabilities)}: {words}. Expected a plan. Choose other cards with "
            "--compute-capability, or other precisions with mdf export"
        )
    unnamed = workspace / part.name
    with unnamed.open("wb") as file:
        file.write(plan)
    seconds = round(time.perf_counter() - start, 1)
    entry = digest(unnamed)
    name = f"{part.name}.{entry.sha256[:12]}.plan"
    unnamed.replace(workspace / name)
    spec = PlanSpec(
        block=part.block,
        file=f"{PLANS_NAME}/{target.package}/{name}",
        builder=f"{target.package} {trt.__version__}",
        compute_capabilities=target.capabilities,
        inputs=part.inputs,
        outputs=part.outputs,
        profile=profile,
        build_s=seconds,
    )
    return spec, entry


@functools.cache
def _logger(trt: Any) -> Any:
    """Return the process's logger, which keeps what was an error: TensorRT takes only the first."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _refusal(part: _Part, target: _Target, parser: Any) -> BackendError:
    where, words = "the graph", "it gave no reason"
    if parser.num_errors:
        error = parser.get_error(0)
        where = f"the node {error.node_name()!r}, operator {error.node_operator()}"
        words = error.desc()
    return BackendError(
        f"{part.name}: {target.package} {target.trt.__version__} refused {where}: {words}. "
        "Expected it to take every node. Run this engine without plans, or export it again with "
        "this release: mdf export CHECKPOINT ENGINE"
    )


def _check_bindings(network: Any, part: _Part, trt: Any) -> None:
    """Compare names, dtypes and shapes of what was parsed with what the manifest declares."""
    for kind, expected, found in (
        ("inputs", part.inputs, [network.get_input(i) for i in range(network.num_inputs)]),
        ("outputs", part.outputs, [network.get_output(i) for i in range(network.num_outputs)]),
    ):
        wanted = [
            (t.name, t.dtype, tuple(-1 if isinstance(d, str) else d for d in t.shape))
            for t in expected
        ]
        parsed = [(t.name, np.dtype(trt.nptype(t.dtype)).name, tuple(t.shape)) for t in found]
        if parsed != wanted:
            raise EngineError(
                f"{part.name}: found the {kind} {parsed}, expected {wanted}. "
                "Export it again: mdf export CHECKPOINT ENGINE"
            )

"""The engine directory's manifest: what the engine is, and a SHA-256 for every file in it.

The reader owns the format: export fills these dataclasses, and `save_manifest` is its last act.
`mdf_sdk.integrity` holds the directory against it, `mdf_sdk.signature` says who vouches for it.
"""

import dataclasses
import json
import math
import os
import re
import stat
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mdf_sdk.errors import EngineError, ManifestError
from mdf_sdk.extras import import_extra

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"
EMBEDDINGS_NAME = "embeddings.npy"
FUSED_SUFFIX = ".fused"  # of a graph beside a block's own: with ONNX Runtime's nodes for a card
TOKENIZER_NAME = "tokenizer.json"
GOLDEN_NAME = "golden.npz"
PLANS_NAME = "plans"
FORMAT_NAME = "mdf-engine"
FORMAT_VERSION = 3

# A public key as PEM, or the path of a file with one.
TrustedKey = str | os.PathLike[str] | bytes

# "tf32": float32, but a card may round what convolutions and products multiply to 10 bits.
# "int8", "int4": weights alone; "w8a8": weights and what they are multiplied with, on processors.
Precision = Literal["fp32", "tf32", "fp16", "fp8", "int8", "int4", "w8a8"]
PROCESSORS_ALONE: tuple[Precision, ...] = ("w8a8",)  # compute in it
QuantizationMethod = Literal["none", "rtn", "gptq"]
BLOCKS = ("vision", "unet_encoder", "fusion", "decoder", "unet_decoder")

_MAX_MANIFEST_BYTES = 4_000_000  # one of 40 layers has some 30 kB
_MAX_SIDE_PX = 4096
_MAX_SHOWN = 200  # characters of the file in a message
_DTYPES = ("float16", "float32", "int64", "bool")
REEXPORT = "Export it again: mdf export CHECKPOINT ENGINE"


@dataclass(frozen=True)
class ImageSpec:
    """How a squared photograph becomes the two pixel tensors.

    Attributes:
        tower_px: side of the vision tower's input.
        unet_px: side of the U-Net's input and of the masks.
        tower_mean, tower_std, unet_mean, unet_std: per RGB channel, on values in [0, 1].
    """

    tower_px: int
    unet_px: int
    tower_mean: tuple[float, float, float]
    tower_std: tuple[float, float, float]
    unet_mean: tuple[float, float, float]
    unet_std: tuple[float, float, float]


@dataclass(frozen=True)
class PromptSpec:
    """The fixed parts of the prompt, special tokens written out.

    Attributes:
        prefix: everything before the image token: the instruction.
        suffix: everything after the clinical text: the question and the turn markers.
        image_token: e.g. "<|image|>".
        end_token: closes a label, e.g. "<|eot_id|>".
        max_text_tokens: a longer clinical text is cut at its end, and the Prediction says so.
    """

    prefix: str
    suffix: str
    image_token: str
    end_token: str
    max_text_tokens: int


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype and shape of an input or output; a str in the shape is a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class BlockSpec:
    """One graph: its ONNX file, its weight precision, and its bindings.

    Attributes:
        activation_bytes: peak of its live tensors for one case with the longest text.
    """

    file: str
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    activation_bytes: int


@dataclass(frozen=True)
class QuantizationSpec:
    """How the matrices of the decoder and the fusion became integers.

    Attributes:
        method: "none"; "rtn", round to nearest; "gptq" (Frantar et al., 2022).
        block_size: weights along K that share a scale; 0 where all do, or none has one.
        calibration: the cases that GPTQ saw, such as "synthetic:64:5"; empty without GPTQ.
        kept: linears that were left in another precision than their block's, by name.
    """

    method: QuantizationMethod
    block_size: int
    calibration: str
    kept: dict[str, Precision]


@dataclass(frozen=True)
class PlanSpec:
    """A TensorRT plan: a block, or one of the consecutive parts that a large block is cut into.

    Attributes:
        block: that it belongs to; the parts of a block stand in the order in which they run.
        file: POSIX path relative to the directory.
        builder: package and version that compiled it, e.g. "tensorrt_rtx 1.7.1.116".
        compute_capabilities: cards it runs on, e.g. ("8.6", "8.9", "12.0").
        inputs, outputs: its bindings.
        profile: (min, opt, max) of each free dimension.
        build_s: seconds that it took to compile.
    """

    block: str
    file: str
    builder: str
    compute_capabilities: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: dict[str, tuple[int, int, int]]
    build_s: float


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (64 lower-case hex digits) and size of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows of an engine.

    Attributes:
        model: the preset's name.
        precision: what `mdf export --precision` was given.
        notice: printed with every result; empty for an engine cleared for use.
        labels: the label set, in score order.
        mask_kinds: channels of the mask, e.g. ("vessel", "lesion", "disc").
        temperature: scores are divided by it before softmax (Guo et al., 2017).
        quantization: of the decoder and the fusion.
        blocks: by name, one for each of BLOCKS.
        plans: what `mdf compile` added; empty as exported.
        files: by POSIX path relative to the directory; every file but the manifest itself.
        checkpoint: SHA-256 over the checkpoint's tensors' files and config, the model's identity.
        built_with: versions of the exporting packages.
    """

    model: str
    precision: Precision
    notice: str
    labels: tuple[str, ...]
    mask_kinds: tuple[str, ...]
    temperature: float
    image: ImageSpec
    prompt: PromptSpec
    quantization: QuantizationSpec
    blocks: dict[str, BlockSpec]
    plans: tuple[PlanSpec, ...]
    files: dict[str, FileEntry]
    checkpoint: str
    built_with: dict[str, str]


def load_manifest(
    engine_dir: str | os.PathLike[str], trusted_key: TrustedKey | None = None
) -> Manifest:
    """Read and check manifest.json; opens no other file of the engine but its signature.

    Args:
        trusted_key: whose signature the manifest must have; None asks for none.

    Raises:
        EngineError: there is no such directory.
        ManifestError: the manifest is missing, malformed, or of another version. Names the field.
        SignatureError: the manifest is not signed, or not with the trusted key.
        InputError: the trusted key is none.
        MissingExtraError: signatures need the extra `sign`.
    """
    return parse_manifest(read_manifest(engine_dir, trusted_key))


def read_manifest(
    engine_dir: str | os.PathLike[str], trusted_key: TrustedKey | None = None
) -> bytes:
    """Read manifest.json once, and prove those bytes before anything parses them.

    See `load_manifest`.
    """
    directory = Path(engine_dir)
    if not directory.is_dir():
        raise EngineError(
            f"engine {directory}: found no such directory, expected one that "
            "`mdf export CHECKPOINT ENGINE` made"
        )
    data = _read_bytes(directory / MANIFEST_NAME)
    if trusted_key is not None:
        import_extra("mdf_sdk.signature", "sign").check_signature(data, directory, trusted_key)
    return data


def parse_manifest(data: bytes) -> Manifest:
    """Turn the content of manifest.json into a value.

    Raises:
        ManifestError: it is malformed, or of another version. Names the field.
    """
    document = _parse(data)
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT_NAME:
        raise _wrong("format", "another document", f'an object with "format": "{FORMAT_NAME}"')
    version = document.pop("version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        built_with = document.get("built_with")
        release = built_with.get("mdf-mllm") if isinstance(built_with, dict) else "unknown"
        raise ManifestError(
            f"{MANIFEST_NAME}: found version {_show(version)}, expected {FORMAT_VERSION}. Export "
            "the checkpoint again with this release (mdf export CHECKPOINT ENGINE), or install the "
            f"release that wrote it: mdf-mllm {_show(release)}"
        )
    manifest: Manifest = _to_value(document, Manifest, "")
    _check_values(manifest)
    return manifest


def save_manifest(
    manifest: Manifest, engine_dir: str | os.PathLike[str], *, workspace: Path | None = None
) -> None:
    """Write manifest.json, whole or not at all: the last act of an export or a compilation.

    Removes the signature of the manifest that was there: who signed that one did not see this one.

    Args:
        workspace: takes the unfinished file; a folder of the engine's file system, by default the
            engine's own.

    Raises:
        ManifestError: a value that `load_manifest` would refuse.
    """
    _check_values(manifest)
    document = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    path = Path(engine_dir) / MANIFEST_NAME
    unfinished = (workspace or path.parent) / f"{MANIFEST_NAME}.part"
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)
    path.with_name(SIGNATURE_NAME).unlink(missing_ok=True)


def _read_bytes(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ManifestError(
                f"{path}: found a link or special file, expected a regular file. {REEXPORT}"
            )
        with path.open("rb") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError(
            f"{path}: could not be read ({error.strerror}). An engine directory has one: an "
            f"interrupted export or copy leaves none. {REEXPORT}"
        ) from error
    if len(data) > _MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{path}: found more than {_MAX_MANIFEST_BYTES} bytes, expected fewer. {REEXPORT}"
        )
    return data


def _parse(data: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return document

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{MANIFEST_NAME}: found invalid JSON ({error}), expected one object. {REEXPORT}"
        ) from error


def _to_value(found: Any, expected: Any, where: str) -> Any:
    """Turn parsed JSON into a value of the type `expected`, or name the field that does not fit."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        names = [field.name for field in dataclasses.fields(expected)]
        hints = typing.get_type_hints(expected)
        if not isinstance(found, dict):
            raise _wrong(where, _show(found), "an object")
        for name in found.keys() - set(names):
            raise _wrong(_join(where, name), "an unknown field", "none")
        for name in names:
            if name not in found:
                raise _wrong(_join(where, name), "no such field", "it")
        values = {name: _to_value(found[name], hints[name], _join(where, name)) for name in names}
        return typing.cast(type, expected)(**values)
    if origin is dict:
        if not isinstance(found, dict):
            raise _wrong(where, _show(found), "an object")
        key_type, value_type = arguments
        return {
            _to_value(key, key_type, where): _to_value(value, value_type, _join(where, key))
            for key, value in found.items()
        }
    if origin is tuple:
        if not isinstance(found, list):
            raise _wrong(where, _show(found), "an array")
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(found)
        if len(found) != len(arguments):
            raise _wrong(where, f"{len(found)} values", str(len(arguments)))
        pairs = enumerate(zip(found, arguments, strict=True))
        return tuple(_to_value(value, kind, f"{where}[{i}]") for i, (value, kind) in pairs)
    if origin is Literal:
        if found not in arguments:
            raise _wrong(where, _show(found), " or ".join(arguments))
        return found
    allowed = arguments if origin is types.UnionType else (expected,)
    if float in allowed and type(found) is int and abs(found) < 2**53:
        return float(found)
    if type(found) not in allowed:
        raise _wrong(where, _show(found), " or ".join(kind.__name__ for kind in allowed))
    if type(found) is int and not -(2**63) <= found < 2**63:
        raise _wrong(where, "a larger number", "one of 64 bits")
    if isinstance(found, float) and not math.isfinite(found):
        raise _wrong(where, str(found), "a finite number")
    if isinstance(found, str) and any("\ud800" <= character <= "\udfff" for character in found):
        raise _wrong(where, "half a surrogate pair", "Unicode text")
    return found


def _check_values(manifest: Manifest) -> None:
    """Check what the types cannot say."""

    def need(holds: bool, where: str, found: object, expected: str) -> None:
        if not holds:
            raise _wrong(where, repr(found)[:100], expected)

    for where in ("labels", "mask_kinds"):
        names = getattr(manifest, where)
        need(
            len(set(names)) == len(names) and all(names), where, names, "distinct, non-empty names"
        )
    need(len(manifest.labels) >= 2, "labels", manifest.labels, "at least two")
    temperature, image, prompt = manifest.temperature, manifest.image, manifest.prompt
    need(
        math.isfinite(temperature) and temperature > 0,
        "temperature",
        temperature,
        "a finite number > 0",
    )
    for where in ("tower_px", "unet_px"):
        side = getattr(image, where)
        need(1 <= side <= _MAX_SIDE_PX, f"image.{where}", side, f"1 to {_MAX_SIDE_PX}")
    for where in ("tower_std", "unet_std"):
        need(min(getattr(image, where)) > 0, f"image.{where}", getattr(image, where), "numbers > 0")
    tokens = prompt.max_text_tokens
    need(tokens >= 1, "prompt.max_text_tokens", tokens, "at least 1")

    blocks = tuple(manifest.blocks)
    need(sorted(blocks) == sorted(BLOCKS), "blocks", blocks, f"exactly {', '.join(BLOCKS)}")
    for name, block in manifest.blocks.items():
        need(
            block.file in manifest.files,
            f"blocks.{name}.file",
            block.file,
            "a name listed in files",
        )
        _check_tensors(block, f"blocks.{name}")
        live = block.activation_bytes
        need(live >= 0, f"blocks.{name}.activation_bytes", live, "a size")
    for i, plan in enumerate(manifest.plans):
        where = f"plans[{i}]"
        need(plan.block in BLOCKS, f"{where}.block", plan.block, f"one of {', '.join(BLOCKS)}")
        listed = plan.file in manifest.files and plan.file.startswith(f"{PLANS_NAME}/")
        need(listed, f"{where}.file", plan.file, f"a name in {PLANS_NAME}/, listed in files")
        capabilities = plan.compute_capabilities
        known = capabilities and all(re.fullmatch(r"[0-9]+\.[0-9]", c) for c in capabilities)
        need(bool(known), f"{where}.compute_capabilities", capabilities, 'some, such as "8.9"')
        _check_tensors(plan, where)
        free = {d for tensor in plan.inputs for d in tensor.shape if isinstance(d, str)}
        names = sorted(plan.profile)
        need(set(names) == free, f"{where}.profile", names, f"the free dimensions {sorted(free)}")
        for name, bounds in plan.profile.items():
            rising = 1 <= bounds[0] <= bounds[1] <= bounds[2]
            need(rising, f"{where}.profile.{name}", bounds, "1 <= min <= opt <= max")
        need(plan.build_s >= 0, f"{where}.build_s", plan.build_s, "seconds")
    files = [plan.file for plan in manifest.plans]
    need(len(set(files)) == len(files), "plans", files, "distinct files")
    for name in (EMBEDDINGS_NAME, TOKENIZER_NAME, GOLDEN_NAME):
        need(name in manifest.files, "files", f"no {name}", "it listed")
    need(MANIFEST_NAME not in manifest.files, "files", MANIFEST_NAME, "every file but the manifest")
    for name, entry in manifest.files.items():
        hexadecimal = re.fullmatch("[0-9a-f]{64}", entry.sha256) is not None
        need(hexadecimal, f"files.{name}.sha256", entry.sha256, "64 lower-case hex digits")
        need(entry.bytes >= 0, f"files.{name}.bytes", entry.bytes, "a size")


def _check_tensors(bound: BlockSpec | PlanSpec, where: str) -> None:
    for kind, tensors in (("inputs", bound.inputs), ("outputs", bound.outputs)):
        names = [tensor.name for tensor in tensors]
        if not 0 < len(set(names)) == len(names):
            raise _wrong(f"{where}.{kind}", repr(names)[:100], "distinct names")
        for tensor in tensors:
            if tensor.dtype not in _DTYPES:
                raise _wrong(f"{where}.{kind}", repr(tensor.dtype), f"a dtype among {_DTYPES}")
            if any(isinstance(side, int) and side < 0 for side in tensor.shape):
                raise _wrong(f"{where}.{kind}", repr(tensor.shape), "no negative side")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _show(found: object) -> str:
    """Describe a parsed value in a few words; one that holds others by its type alone."""
    if isinstance(found, dict | list | tuple):
        return f"{type(found).__name__} of {len(found)}"
    return repr(found)[:_MAX_SHOWN]


def _wrong(where: str, found: str, expected: str) -> ManifestError:
    # Names of fields are the file's own words: a terminal must not obey them.
    where = "".join(c if c.isprintable() else "?" for c in where[:_MAX_SHOWN])
    return ManifestError(
        f"{MANIFEST_NAME}, {where}: found {found[:_MAX_SHOWN]}, expected {expected}. {REEXPORT}"
    )

"""A checkpoint that auto-gptq, GPTQModel or Optimum quantized in, our integer weights out."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdf_export.quantize import QuantizedWeight
from mdf_sdk.errors import CheckpointError
from mdf_sdk.integrity import digest

# What a zero point is stored minus, by checkpoint_format; files without one are the first.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
PARTS = ("qweight", "qzeros", "scales", "g_idx")
WORD_BITS = 32
# Mllama's text model, and its output head, as transformers 5 and as 4 name them.
LAYER = re.compile(r"(?:model\.language_model|language_model\.model)\.(layers\.\d+\..+)")
HEADS = ("lm_head", "language_model.lm_head")
COPY_AGAIN = "Copy the checkpoint again, whole"


class GptqCheckpoint(Mapping[str, QuantizedWeight]):
    """The quantized linears of a directory, by our names, each read when it is asked for.

    What the quantizer left dense, such as the cross-attention layers, is not in it. The values are
    exactly its own: (q - zero) * scale, the zero of a symmetric weight being the middle, is
    code * scale.
    """

    def __init__(self, folder: Path) -> None:
        """Read the configuration and the files' headers.

        Raises:
            CheckpointError: no GPTQ checkpoint of Mllama, or one of another layout.
        """
        self._folder = folder
        self._settings = _read_settings(folder)
        self._files = _find_tensors(folder)
        linears = [
            name.removesuffix(".qweight") for name in self._files if name.endswith(".qweight")
        ]
        self._linears = {_to_our_name(folder, linear): linear for linear in sorted(linears)}
        if not linears:
            raise CheckpointError(
                f"{folder}: found no tensor *.qweight, expected a checkpoint that GPTQ quantized. "
                "Leave --gptq-checkpoint out to quantize here"
            )

    def identity(self) -> dict[str, Any]:
        """The settings, and the digest of each file of tensors: reads all of them."""
        digests = {path.name: digest(path).sha256 for path in sorted(set(self._files.values()))}
        return {"settings": self._settings, "files": digests}

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Read a linear.

        Raises:
            KeyError: it is not among the quantized ones.
            CheckpointError: it is damaged, or quantized in another way than the engine computes.
        """
        linear = self._linears[name]
        parts = {part: self._tensor(f"{linear}.{part}") for part in PARTS}
        qweight, qzeros, scales, g_idx = parts.values()
        bits = self._check_layout(linear, parts)
        self._check_zeros(linear, _unpack(qzeros, bits, dim=1), bits)
        self._check_scales(linear, scales.float())
        self._check_bias(linear)
        order = self._find_order(linear, g_idx, groups=scales.shape[0])
        codes = (_unpack(qweight, bits, dim=0) - 2 ** (bits - 1)).to(torch.int8)
        codes = codes if order is None else codes[order]
        return QuantizedWeight(codes, scales.float(), bits, order)

    def __contains__(self, name: object) -> bool:
        return name in self._linears

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise CheckpointError(
                f"{self._folder}: found no tensor {name}, expected {', '.join(PARTS)} of each "
                f"quantized linear. {COPY_AGAIN}"
            )
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[name]}, {name}: {error}. {COPY_AGAIN}") from None

    def _check_layout(self, linear: str, parts: Mapping[str, Tensor]) -> int:
        """Return the bits; they and the group size are those of the configuration.

        Unless it has rules by layer ("dynamic"): then the shapes say it.
        """
        qweight, scales, g_idx = parts["qweight"], parts["scales"], parts["g_idx"]
        for part, tensor in parts.items():
            if tensor.ndim != (1 if part == "g_idx" else 2) or not tensor.numel():
                raise self._refuse(linear, part, _describe(tensor), "a tensor of another shape")
        k, (groups, n) = g_idx.shape[0], scales.shape
        bits, size = qweight.shape[0] * WORD_BITS // k, k // groups
        if not self._settings.get("dynamic"):
            bits = self._settings.get("bits", bits)
            configured = self._settings.get("group_size", size)
            size = k if configured == -1 else configured
        if bits not in (4, 8):
            cure = "Quantize to 4 or 8 bits, or leave --gptq-checkpoint out to quantize here"
            raise self._refuse(linear, "qweight", f"{bits} bits", "4 or 8", cure)
        if size not in range(1, k + 1) or k % size:
            raise self._refuse(linear, "g_idx", f"{k} features", f"a multiple of group_size {size}")
        expected = {
            "qweight": (torch.int32, [k * bits // WORD_BITS, n]),
            "qzeros": (torch.int32, [k // size, n * bits // WORD_BITS]),
            "scales": (torch.float16, [k // size, n]),
            "g_idx": (torch.int32, [k]),
        }
        for part, (dtype, shape) in expected.items():
            if parts[part].dtype != dtype or list(parts[part].shape) != shape:
                raise self._refuse(linear, part, _describe(parts[part]), f"{dtype} {shape}")
        return bits

    def _check_zeros(self, linear: str, stored: Tensor, bits: int) -> None:
        middle, layout = 2 ** (bits - 1), self._settings["checkpoint_format"]
        zero = middle - ZERO_OFFSETS[layout]
        if (stored == zero).all():
            return
        for other, offset in ZERO_OFFSETS.items():
            if (stored == middle - offset).all():
                raise self._refuse(
                    linear,
                    "qzeros",
                    f"zero points {middle - offset}, as {other!r} stores them",
                    f"{zero}, because the configuration says {layout!r}",
                    f'If a tool of the layout {other!r} wrote it, set "checkpoint_format": '
                    f'"{other}"',
                )
        raise self._refuse(
            linear,
            "qzeros",
            f"zero points from {int(stored.min())} to {int(stored.max())}",
            f"{zero} in all: an engine computes symmetric weights alone",
            "Quantize with sym=True, or leave --gptq-checkpoint out to quantize here",
        )

    def _check_scales(self, linear: str, scales: Tensor) -> None:
        wrong = scales[~((scales > 0) & scales.isfinite())]
        if wrong.numel():
            raise self._refuse(linear, "scales", f"{float(wrong[0])}", "positive, finite scales")

    def _check_bias(self, linear: str) -> None:
        # Some tools write zeros as the bias of a linear that has none.
        name = f"{linear}.bias"
        if name in self._files and self._tensor(name).any():
            raise self._refuse(linear, "bias", "one that is not zero", "none, as in Mllama")

    def _find_order(self, linear: str, g_idx: Tensor, groups: int) -> Tensor | None:
        """Return the order that makes the groups consecutive; None where they are."""
        size = g_idx.shape[0] // groups
        order = g_idx.argsort(stable=True)
        consecutive = torch.arange(groups, dtype=g_idx.dtype).repeat_interleave(size)
        if not torch.equal(g_idx[order], consecutive):
            raise self._refuse(
                linear, "g_idx", "other groups", f"{groups} groups of {size} features each"
            )
        return None if torch.equal(g_idx, consecutive) else order

    def _refuse(
        self, linear: str, part: str, found: str, expected: str, cure: str = COPY_AGAIN
    ) -> CheckpointError:
        name = f"{linear}.{part}"
        return CheckpointError(
            f"{self._files[name]}, {name}: found {found}, expected {expected}. {cure}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Take the numbers out of int32 words (rows, columns), the lowest bits first, along dim."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    shifts = shifts[:, None] if dim == 0 else shifts  # before (rows, words, columns), or last
    return ((words.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)).flatten(dim, dim + 1)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read quantize_config.json, or the quantization_config of config.json."""
    for name, key in (("quantize_config.json", None), ("config.json", "quantization_config")):
        path = folder / name
        if not path.is_file():
            continue
        document = _read_json(path)
        settings = document if key is None else document.get(key)
        if settings is not None:
            break
    else:
        raise CheckpointError(
            f"{folder}: found no quantize_config.json and no quantization_config in config.json, "
            "expected one that auto-gptq, GPTQModel or Optimum wrote. " + COPY_AGAIN
        )
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: found {settings!r}, expected an object. {COPY_AGAIN}")
    method = settings.get("quant_method") or "gptq"
    layout = settings.get("checkpoint_format") or "gptq"
    if method != "gptq" or layout not in ZERO_OFFSETS or settings.get("is_marlin_format"):
        raise CheckpointError(
            f"{path}: found quant_method {method!r} and checkpoint_format {layout!r}"
            f"{' (marlin)' if settings.get('is_marlin_format') else ''}, expected 'gptq' and one "
            f"of {', '.join(map(repr, ZERO_OFFSETS))}. Leave --gptq-checkpoint out to quantize here"
        )
    return {**settings, "checkpoint_format": layout}


def _find_tensors(folder: Path) -> dict[str, Path]:
    """Return the file that holds each tensor; an index, where there is one, must be kept."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: found no *.safetensors, expected the quantized weights. A pickled *.bin or "
            "*.pt is not read: save it again with safe_serialization=True"
        )
    found: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: {error}; expected a safetensors file. {COPY_AGAIN}"
            ) from None
        for name in names:
            if name in found:
                raise CheckpointError(
                    f"{path}: found {name}, which {found[name].name} holds too, expected it once. "
                    "Remove what belongs to another checkpoint"
                )
            found[name] = path
    for path in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = _read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path}: found no weight_map, expected one. {COPY_AGAIN}")
        missing = [name for name in weight_map if name not in found]
        if missing:
            raise CheckpointError(
                f"{folder}: found no {missing[0]}, expected it in {weight_map[missing[0]]}, as "
                f"{path.name} says, and {len(missing) - 1} more. {COPY_AGAIN}"
            )
    return found


def _to_our_name(folder: Path, linear: str) -> str:
    if match := LAYER.fullmatch(linear):
        return f"backbone.model.language_model.{match[1]}"
    if linear in HEADS:
        return "backbone.lm_head"
    raise CheckpointError(
        f"{folder}: found the quantized linear {linear}, expected those of Mllama, such as "
        "model.language_model.layers.0.self_attn.q_proj. Give a quantized Llama 3.2 Vision"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; expected JSON. {COPY_AGAIN}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: found {document!r}, expected an object. {COPY_AGAIN}")
    return document

"""A streamed checkpoint and a few cases in, GPTQ's weights on disk out: one fused forward does it.

All cases go through the model as one batch, so that when a linear's turn comes its whole input is
there, computed by layers that are quantized already. The linear is then quantized, and the forward
goes on with what the engine will hold.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from mdf_export.blocks.source import check_given
from mdf_export.gptq import Hessian, gptq
from mdf_export.quantize import BITS, W8A8_BITS, QuantizedWeight, pack_int4, unpack_int4
from mdf_export.recipe import ExportRecipe
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.errors import CheckpointError, DataError
from mdf_sdk.preprocessing import to_pixels
from mdf_training.data.cases import spread
from mdf_training.data.folder import open_data
from mdf_training.model import PromptTensors

Picture = npt.NDArray[np.uint8]
MIN_CASES = 8
IMAGES_AT_ONCE = 8  # through the vision tower, whose activations are the largest


class QuantizedStore(Mapping[str, QuantizedWeight]):
    """Quantized weights by linear, one safetensors file each, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __getitem__(self, name: str) -> QuantizedWeight:
        try:
            with safe_open(self._path(name), framework="pt") as file:
                codes, scales = file.get_tensor("codes"), file.get_tensor("scales")
        except FileNotFoundError:
            raise KeyError(name) from None
        if codes.dtype == torch.int8:
            return QuantizedWeight(codes, scales, BITS["int8"])
        return QuantizedWeight(unpack_int4(codes, scales.shape[1]), scales, BITS["int4"])

    def __setitem__(self, name: str, weight: QuantizedWeight) -> None:
        unfinished = self._path(name).with_suffix(".part")
        codes = pack_int4(weight.codes) if weight.bits == BITS["int4"] else weight.codes
        save_file({"codes": codes.cpu(), "scales": weight.scales.cpu()}, unfinished)
        unfinished.replace(self._path(name))

    def __contains__(self, name: object) -> bool:
        return self._path(str(name)).exists()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def quantizable_linears(checkpoint: StreamedCheckpoint, recipe: ExportRecipe) -> dict[str, int]:
    """Return the linears of decoder and fusion that become integers, with their bits."""
    found = {}
    for name, module in checkpoint.model.named_modules():
        inside = name.startswith(("backbone.model.language_model.layers.", "fusion."))
        if inside and isinstance(module, nn.Linear):
            precision = recipe.kept.get(name, recipe.precision)
            if precision == "w8a8":
                found[name] = W8A8_BITS
            elif precision in BITS and module.in_features % recipe.block_size == 0:
                found[name] = BITS[precision]
    return found


@torch.no_grad()
def calibrate(
    checkpoint: StreamedCheckpoint,
    recipe: ExportRecipe,
    store: QuantizedStore,
    given: Mapping[str, QuantizedWeight],
) -> dict[str, float]:
    """Fill the store with GPTQ's weights; what it holds already is not computed again.

    Args:
        checkpoint: on the device that shall compute.
        recipe: method, precisions, block size, calibration cases.
        store: receives each linear as soon as it is done.
        given: weights that are quantized already, from a GPTQ checkpoint.

    Returns:
        By linear of the vision tower, the largest magnitude of its input: what fp8 needs.

    Raises:
        DataError: too few cases, or a picture that cannot be read.
    """
    cases = calibration_cases(recipe)
    bits = quantizable_linears(checkpoint, recipe)
    with tqdm(total=len(bits), unit="linear", desc="calibrate", disable=None) as progress:
        run = _CalibrationRun(checkpoint, recipe, store, given, bits, progress)
        return run.forward(*cases)


def calibration_cases(recipe: ExportRecipe) -> tuple[list[Picture], list[str]]:
    """Open the calibration set: pictures uint8 (H, W, 3) and their texts.

    Raises:
        DataError: it breaks the format, or holds fewer than MIN_CASES.
    """
    data = open_data(recipe.calibration)
    indices = spread(len(data), recipe.calibration_cases)
    count = len(indices)
    if count < MIN_CASES:
        raise DataError(
            f"calibration {recipe.calibration}: found {count} cases, expected at least "
            f"{MIN_CASES}, better 64: GPTQ fits what it sees. Add cases, or "
            "round to nearest: --method rtn"
        )
    cases = [data[i] for i in indices]
    return [case.image for case in cases], [case.text for case in cases]


def calibration_digest(recipe: ExportRecipe) -> str:
    """SHA-256 of the cases themselves: a folder's content may change under its name.

    Raises:
        DataError: as `calibration_cases`.
    """
    digest = sha256()
    for picture, text in zip(*calibration_cases(recipe), strict=True):
        digest.update(repr((picture.shape, text)).encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


class _CalibrationRun:
    """One forward in which every linear is quantized when its input is there."""

    def __init__(
        self,
        checkpoint: StreamedCheckpoint,
        recipe: ExportRecipe,
        store: QuantizedStore,
        given: Mapping[str, QuantizedWeight],
        bits: Mapping[str, int],
        progress: "tqdm[Any]",
    ) -> None:
        self._checkpoint, self._recipe, self._store = checkpoint, recipe, store
        self._given, self._bits, self._progress = given, bits, progress
        self._input_max: dict[str, float] = {}
        self._moments: tuple[Tensor, Tensor] | None = None  # of the last input
        self._original = torch.empty(0)

    def forward(self, images: Sequence[Picture], texts: Sequence[str]) -> dict[str, float]:
        """Run all cases through the fused model as one batch."""
        checkpoint = self._checkpoint
        model, encoder = checkpoint.model, checkpoint.prompt_encoder()
        packed = encoder.pack([encoder.encode(text) for text in texts])
        prompt = PromptTensors.from_packed(packed, encoder, checkpoint.device)
        self._prefix = packed.prefix_length
        # Rows that the engine feeds: neither the constant instruction nor padding.
        self._fed = prompt.body_mask.clone()
        labels = encoder.label_rows
        self._fed[:, self._fed.shape[1] - labels :] = True
        with checkpoint.flowing(), self._hooks():
            image = self._encode(images)
            model.decode_text(image, prompt)
        return self._input_max

    def _encode(self, images: Sequence[Picture]) -> dict[int, Tensor]:
        """Return the states that the cross-attention layers read; the tower works in portions."""
        model, device = self._checkpoint.model, self._checkpoint.device
        states, skips = [], []
        for start in range(0, len(images), IMAGES_AT_ONCE):
            pixels = [
                to_pixels(image, model.config.image)
                for image in images[start : start + IMAGES_AT_ONCE]
            ]
            tower, unet = (
                torch.from_numpy(np.stack(p)).to(device) for p in zip(*pixels, strict=True)
            )
            states.append(model.encode_vision(tower))
            skips.append(model.encode_unet(unet)[0])
        joined = [torch.cat(scale) for scale in zip(*skips, strict=True)]
        return model.fuse(torch.cat(states), joined)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self._checkpoint.model.named_modules():
                hooks = []
                if name in self._bits:
                    hooks.append(module.register_forward_pre_hook(self._quantize))
                    # Before the weight is put away again.
                    hooks.append(module.register_forward_hook(self._mend_prefix, prepend=True))
                elif self._recipe.vision_precision == "fp8" and _is_vision(name, module):
                    hooks.append(module.register_forward_pre_hook(self._measure))
                for hook in hooks:
                    stack.callback(hook.remove)
            yield

    def _quantize(self, linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        """Put what the engine will hold in the linear's place."""
        name = self._checkpoint.name_of(linear)
        self._original = linear.weight
        if name in self._given:
            quantized = check_given(name, self._given[name], linear.weight)
        elif name in self._store:
            quantized = self._store[name]
        else:
            bits = self._bits[name]
            one_group = bits == W8A8_BITS
            try:
                quantized = gptq(
                    linear.weight,
                    self._second_moments(inputs[0], name),
                    bits,
                    linear.in_features if one_group else self._recipe.block_size,
                    act_order=one_group or self._recipe.act_order,
                    search=self._recipe.search,
                )
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from error
            self._store[name] = quantized
        linear.weight = nn.Parameter(quantized.dequantize().to(self._original), requires_grad=False)
        self._progress.update()

    def _mend_prefix(self, linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The instruction's rows are constants of full precision in the engine."""
        if _reads_tokens(self._checkpoint.name_of(linear)):
            rows = inputs[0][:, : self._prefix]
            output[:, : self._prefix] = F.linear(rows, self._original, linear.bias)
        return output

    def _second_moments(self, inputs: Tensor, name: str) -> Tensor:
        """E[x x^T] of the rows that the engine feeds; q, k and v share one input."""
        if self._moments is None or self._moments[0] is not inputs:
            self._moments = None  # free it before the next is made
            hessian = Hessian(inputs.shape[-1], inputs.device)
            hessian.add(inputs[self._fed] if _reads_tokens(name) else inputs)
            self._moments = inputs, hessian.mean()
        return self._moments[1]

    def _measure(self, linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        name, largest = self._checkpoint.name_of(linear), float(inputs[0].abs().amax())
        self._input_max[name] = max(largest, self._input_max.get(name, 0.0))


def _reads_tokens(name: str) -> bool:
    """Whether a linear's rows are the prompt's tokens, not patches of the photograph."""
    patches = ("cross_attn.k_proj", "cross_attn.v_proj")
    return name.startswith("backbone.model.language_model.") and not name.endswith(patches)


def _is_vision(name: str, module: nn.Module) -> bool:
    """Not the projector: ONNX Runtime moves its QuantizeLinear before a Slice that has no FP8."""
    return name.startswith("backbone.model.vision_model.") and isinstance(module, nn.Linear)

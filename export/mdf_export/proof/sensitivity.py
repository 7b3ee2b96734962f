"""A checkpoint in, the damage that each linear's rounding does to the labels out; by it, the choice
of the linears that stay in a better precision.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mdf_export.calibration import quantizable_linears
from mdf_export.planning import plan_engine
from mdf_export.proof.decoder_run import DecoderRun, hold_checkpoint, replaced, rounded_weight
from mdf_export.recipe import ExportRecipe
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.errors import InputError
from mdf_sdk.manifest import Precision
from mdf_training.checkpoint import checkpoint_digest
from mdf_training.data.cases import spread
from mdf_training.data.folder import open_data
from mdf_training.data.pixels import CasePixels, PixelSet, batches
from mdf_training.evaluation.evaluate import Scores
from mdf_training.evaluation.statistics import Proportion, kl_divergences, log_probabilities

SENSITIVITY = "sensitivity.json"
CASES_AT_ONCE = 32  # the stream behind every layer is kept for as many
# What KL falls to, of what it was, when int4 becomes int8: steps are 127 / 7 times smaller, and KL
# goes with the square of a small change.
_REMAINS_AT_INT8 = (7 / 127) ** 2
_FINER: dict[Precision, tuple[Precision, ...]] = {"int4": ("int8", "fp16"), "int8": ("fp16",)}


@dataclass(frozen=True)
class LinearDamage:
    """One linear, rounded to nearest while all else is float32.

    Attributes:
        bytes_int4, bytes_int8, bytes_fp16: of its weight in an engine, scales included.
        kl: KL(unquantized || quantized) of the calibrated label probabilities, mean, in nats.
        flips: cases whose label changes.
    """

    name: str
    bytes_int4: int
    bytes_int8: int
    bytes_fp16: int
    kl: float
    flips: int

    def bytes_at(self, precision: Precision) -> int:
        """Bytes in one of the three precisions."""
        size: int = getattr(self, f"bytes_{precision}")
        return size


@dataclass(frozen=True)
class Sensitivity:
    """Every linear's own damage.

    Attributes:
        checkpoint: SHA-256 of the checkpoint.
        data, cases: what it was measured on.
        precision: that each linear was rounded to: "int4" or "int8".
        block_size: weights along K that shared a scale.
    """

    checkpoint: str
    data: str
    cases: int
    precision: Precision
    block_size: int
    linears: tuple[LinearDamage, ...]

    def ranked(self) -> list[LinearDamage]:
        """The linears, most damaging first."""
        return sorted(self.linears, key=lambda linear: (-linear.kl, linear.name))

    def to_dict(self) -> dict[str, Any]:
        """JSON types, most damaging first."""
        return {
            **dataclasses.asdict(self),
            "linears": [dataclasses.asdict(linear) for linear in self.ranked()],
        }


def load_sensitivity(path: Path) -> Sensitivity:
    """Read what `mdf sensitivity` wrote: its directory, or the JSON file in it.

    Raises:
        InputError: nothing there that it wrote.
    """
    file = path / SENSITIVITY if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        linears = tuple(LinearDamage(**linear) for linear in document["linears"])
        names = [field.name for field in dataclasses.fields(Sensitivity)]
        return Sensitivity(**{name: document[name] for name in names} | {"linears": linears})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: {error!r}; expected what this makes: mdf sensitivity CHECKPOINT --data DATA "
            "--precision int4 --out DIR"
        ) from error


@torch.no_grad()
def measure_sensitivity(
    checkpoint_dir: Path,
    data_spec: str,
    *,
    cases: int,
    precision: Precision = "int4",
    block_size: int = ExportRecipe.block_size,
    device: str = "cpu",
) -> Sensitivity:
    """Round each linear of decoder and fusion alone, and score the cases again.

    Args:
        checkpoint_dir: as `mdf train` writes it; held in memory, in float32.
        data_spec: folder with labels.csv, or synthetic:COUNT:SEED.
        cases: as many, spread over the data.
        precision: "int4" or "int8".
        block_size: as the engine will have.
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: the checkpoint cannot be used.
        InputError: it does not fit into memory.
        DataError: the data breaks the format.
    """
    with hold_checkpoint(checkpoint_dir, device) as checkpoint:
        recipe = ExportRecipe(precision, method="rtn", block_size=block_size)
        linears = {
            name: checkpoint.model.get_submodule(name)
            for name in quantizable_linears(checkpoint, recipe)
        }
        temperature = checkpoint.config.temperature
        kl, flips = dict.fromkeys(linears, 0.0), dict.fromkeys(linears, 0)
        portions = _portions(checkpoint, data_spec, cases)
        total = sum(len(portion) for portion in portions)
        with tqdm(total=len(portions) * len(linears), unit="linear", disable=None) as progress:
            for portion in portions:
                run = DecoderRun(checkpoint, portion, keep_streams=True)
                before = log_probabilities(run.scores, temperature)
                for name, linear in linears.items():
                    with replaced(linear, rounded_weight(linear, precision, block_size)):
                        scores = run.score_from(name)
                    after = log_probabilities(scores, temperature)
                    kl[name] += float(kl_divergences(before, after).sum()) / total
                    flips[name] += _flips(run.scores, scores)
                    progress.update()
        return Sensitivity(
            checkpoint_digest(checkpoint_dir),
            data_spec,
            total,
            precision,
            block_size,
            tuple(
                LinearDamage(name, *_weight_sizes(linear, block_size), kl[name], flips[name])
                for name, linear in linears.items()
            ),
        )


def promotions(sensitivity: Sensitivity) -> list[tuple[LinearDamage, Precision]]:
    """Order what can be improved by the KL that it removes for a byte: a linear and its precision.

    A linear comes up once for each precision that is finer than the measured one.
    """
    found = []
    for linear in sensitivity.linears:
        before, kl = sensitivity.precision, linear.kl
        for stage, after in enumerate(_FINER[before]):
            remains = _REMAINS_AT_INT8 * kl if after == "int8" else 0.0
            extra = linear.bytes_at(after) - linear.bytes_at(before)
            found.append(((remains - kl) / extra, stage, linear.name, linear, after))
            before, kl = after, remains
    return [(linear, after) for *_, linear, after in sorted(found, key=lambda item: item[:3])]


def choose_kept(sensitivity: Sensitivity, extra_bytes: int) -> dict[str, Precision]:
    """Spend bytes on the linears that repay them best.

    Promotions are taken in order until one does not fit, so that more bytes never mean less of any
    linear.

    Args:
        sensitivity: the damages.
        extra_bytes: more than the engine has with every linear in the measured precision.

    Returns:
        By name, the linears that are kept in another precision.
    """
    kept: dict[str, Precision] = {}
    for linear, precision in promotions(sensitivity):
        before = kept.get(linear.name, sensitivity.precision)
        extra_bytes -= linear.bytes_at(precision) - linear.bytes_at(before)
        if extra_bytes < 0:
            break
        kept[linear.name] = precision
    return kept


@torch.no_grad()
def choose_kept_by_flips(
    sensitivity: Sensitivity, checkpoint_dir: Path, max_flips: float, device: str = "cpu"
) -> tuple[dict[str, Precision], Proportion]:
    """Promote as few linears, in the same order, as keep the flips at or below a share.

    All linears are rounded to nearest at once, on the cases of the sensitivity; bisection over the
    number of promotions.

    Returns:
        By name, the linears that are kept in another precision; and the flips that remain.

    Raises:
        InputError: even with all of them in float16 there are more flips.
    """
    order = promotions(sensitivity)
    with hold_checkpoint(checkpoint_dir, device) as checkpoint:
        portions = _portions(checkpoint, sensitivity.data, sensitivity.cases)
        runs = [DecoderRun(checkpoint, portion) for portion in portions]
        progress = tqdm(desc="bisect", unit="choice", disable=None)

        def flips(count: int) -> int:
            kept = {linear.name: precision for linear, precision in order[:count]}
            with ExitStack() as stack:
                for linear in sensitivity.linears:
                    module = checkpoint.model.get_submodule(linear.name)
                    precision = kept.get(linear.name, sensitivity.precision)
                    weight = rounded_weight(module, precision, sensitivity.block_size)
                    stack.enter_context(replaced(module, weight))
                progress.update()
                return sum(_flips(run.scores, run.score_all()) for run in runs)

        with progress:
            count, found = _fewest(
                flips, len(order), math.floor(max_flips * sensitivity.cases + 1e-9)
            )
    kept = {linear.name: precision for linear, precision in order[:count]}
    return kept, Proportion(found, sensitivity.cases)


def mixed_recipe(
    recipe: ExportRecipe,
    checkpoint_dir: Path,
    path: Path,
    *,
    max_bytes: int | None = None,
    max_flips: float | None = None,
    device: str = "cpu",
) -> tuple[ExportRecipe, Proportion | None]:
    """Fill in a recipe's `kept` from what `mdf sensitivity` wrote; exactly one bound is given.

    Args:
        recipe: of the precision and block size that the sensitivity was measured at.
        checkpoint_dir: the checkpoint that it was measured on.
        path: its directory or file.
        max_bytes: of all weights on the device.
        max_flips: share of the cases whose label may change, 0 to 1.
        device: "cpu" or "cuda": where flips are counted.

    Returns:
        The recipe; and the flips that remain, where they decided.

    Raises:
        InputError: the sensitivity is of something else, or the bound cannot be met.
    """
    if not recipe.quantizes:
        raise InputError(
            f"precision: found {recipe.precision}, expected int4 or int8, in which some linears "
            "can be kept better: --precision int4"
        )
    sensitivity = load_sensitivity(path)
    measured = (sensitivity.checkpoint, sensitivity.precision, sensitivity.block_size)
    expected = (checkpoint_digest(checkpoint_dir), recipe.precision, recipe.block_size)
    if measured != expected:
        raise InputError(
            f"{path}: found a sensitivity of checkpoint {measured[0][:12]}, {measured[1]}, block "
            f"size {measured[2]}, expected one of {expected[0][:12]}, {expected[1]}, {expected[2]}."
            f" Measure it: mdf sensitivity {checkpoint_dir} --data DATA --precision {expected[1]} "
            f"--block-size {expected[2]} --out DIR"
        )
    if max_bytes is not None:
        checkpoint = StreamedCheckpoint.open(checkpoint_dir)
        plan = plan_engine(checkpoint.config, checkpoint.tokenizer_json, recipe)
        if max_bytes < plan.device_bytes:
            raise InputError(
                f"max_bytes: found {max_bytes}, expected at least {plan.device_bytes}, an engine "
                f"with every linear in {recipe.precision}. Allow more, or make the rest smaller: "
                "--block-size 128, --vision-precision int8"
            )
        kept = choose_kept(sensitivity, max_bytes - plan.device_bytes)
        return dataclasses.replace(recipe, kept=kept), None
    if max_flips is None or not 0 <= max_flips < 1:
        raise InputError(f"max_flips: found {max_flips}, expected a share such as 0.01")
    kept, flips = choose_kept_by_flips(sensitivity, checkpoint_dir, max_flips, device)
    return dataclasses.replace(recipe, kept=kept), flips


def _fewest(flips: Callable[[int], int], most: int, allowed: int) -> tuple[int, int]:
    """Bisect for a count of promotions that is allowed while the one below it is not."""
    found = flips(0)
    if found <= allowed:
        return 0, found
    low, high, found = 0, most, flips(most)
    if found > allowed:
        raise InputError(
            f"max_flips: found {found} flips with every linear in float16, expected at most "
            f"{allowed}. Allow more flips, or measure on more cases: mdf sensitivity --cases N"
        )
    while high - low > 1:
        middle = (low + high) // 2
        count = flips(middle)
        if count <= allowed:
            high, found = middle, count
        else:
            low = middle
    return high, found


def _portions(checkpoint: StreamedCheckpoint, data_spec: str, count: int) -> list[list[CasePixels]]:
    data = open_data(data_spec)
    pixels = PixelSet(data, checkpoint.config.image, ())
    return [pixels.read(p) for p in batches(spread(len(data), count), CASES_AT_ONCE)]


def _weight_sizes(linear: nn.Module, block_size: int) -> tuple[int, int, int]:
    """Bytes in int4, int8 and fp16; scales are fp16."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    count = weight.numel()
    scales = 2 * (count // block_size)
    return count // 2 + scales, count + scales, 2 * count


def _flips(before: Scores, after: Scores) -> int:
    return int((before.argmax(axis=1) != after.argmax(axis=1)).sum())

"""The image-only baseline: a MobileNet-class network on the very pixels of the fused model's U-Net.

EfficientNet-Lite0 (timm's tf_efficientnet_lite0, 3.4 million parameters): ImageNet weights for it
come in a package. It reads no text. What the fused model adds shows beside it:
`mdf evaluate CHECKPOINT DATA --reference CNN`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from mdf_sdk.errors import CheckpointError
from mdf_sdk.manifest import ImageSpec
from mdf_sdk.staging import check_free, staged_directory
from mdf_training.checkpoint import CONFIG, PROVENANCE, CheckpointTensors
from mdf_training.config import load_preset, set_task, to_tuples
from mdf_training.data.augmentation import Camera
from mdf_training.data.folder import drop_broken, open_data
from mdf_training.data.loading import prepare_ahead, readers_for
from mdf_training.data.pixels import PixelSet, batches
from mdf_training.data.splits import TRAIN, VALIDATION, describe_split
from mdf_training.evaluation.evaluate import BATCH_SIZE, CNN_KIND
from mdf_training.losses import fit_temperature
from mdf_training.recipes import RECIPES, Recipe
from mdf_training.schedule import step_factor
from mdf_training.trainer import NOTICE, split_cases
from mdf_training.unet_weights import describe_weights, load_unet_weights

Float32 = npt.NDArray[np.float32]
TENSORS = "model.safetensors"
NETWORK = "tf_efficientnet_lite0"
DROPOUT = 0.2  # of the pooled features, as the network was made for
READS = "the photograph alone"
BUILT_WITH = ("mdf-mllm", "torch", "timm")


@dataclass(frozen=True)
class CnnConfig:
    """What config.json holds of a CNN, beside its kind.

    Attributes:
        image: the network takes the U-Net's pixels of it.
        temperature: of the label scores, fitted on held-out cases after training.
    """

    labels: tuple[str, ...]
    image: ImageSpec
    temperature: float = 1.0
    network: str = NETWORK

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"kind": CNN_KIND, **asdict(self)}


class Cnn(nn.Module):
    """The network and a linear layer on its pooled features."""

    def __init__(self, config: CnnConfig) -> None:
        super().__init__()
        self.config = config
        body: Any = timm.create_model(config.network, num_classes=0)  # pooled features
        self.body: nn.Module = body
        self.head = nn.Linear(body.num_features, len(config.labels))

    def forward(self, unet_pixels: Tensor) -> Tensor:
        """Label logits (B, K) of float (B, 3, U, U), normalized as config.image says."""
        features = F.dropout(self.body(unet_pixels), DROPOUT, self.training)
        logits: Tensor = self.head(features)
        return logits


class CnnScorer:
    """A CNN as `evaluate` asks for it; texts are taken and left unread."""

    mask_kinds: tuple[str, ...] = ()

    def __init__(self, model: Cnn) -> None:
        self._model = model.eval()
        self._device = model.head.weight.device
        self.labels = model.config.labels
        self.image = model.config.image
        self.temperature = model.config.temperature

    @classmethod
    def open(cls, folder: Path) -> "CnnScorer":
        """Load a directory that `train_cnn` wrote, onto a card where there is one.

        Raises:
            CheckpointError: config.json or the tensors are not a CNN's.
        """
        return cls(load_cnn(folder).to("cuda" if torch.cuda.is_available() else "cpu"))

    @torch.inference_mode()
    def score(self, tower_pixels: Float32, unet_pixels: Float32, texts: Sequence[str]) -> Float32:
        """Return label log-probabilities (B, K)."""
        logits = self._model(torch.from_numpy(unet_pixels).to(self._device))
        scores: Float32 = logits.log_softmax(dim=1).cpu().numpy()
        return scores

    def text_only_scores(self, texts: Sequence[str]) -> Float32:
        """Return the same for every text: without the photograph nothing is known."""
        return np.full((len(texts), len(self.labels)), -np.log(len(self.labels)), np.float32)

    def segment(self, image: npt.NDArray[np.uint8], text: str) -> Float32:
        """Return no mask: (0, U, U)."""
        return np.zeros((0, self.image.unet_px, self.image.unet_px), np.float32)

    @torch.inference_mode()
    def features(self, tower_pixels: Float32, unet_pixels: Float32) -> Float32:
        """Return the pooled features (B, F)."""
        pooled: Tensor = self._model.body(torch.from_numpy(unet_pixels).to(self._device))
        features: Float32 = pooled.cpu().numpy()
        return features


def train_cnn(
    preset: str,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    labels: Sequence[str] | None = None,
    split: str | os.PathLike[str] | None = None,
    unet_weights: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
) -> dict[str, Any]:
    """Train the baseline on what `train` would train the preset on; the last epoch stays.

    Args:
        preset: whose picture size, label set and recipe it takes. Of the recipe: epochs, batch
            size, augmentation, the U-Net's learning rates (`encoder_lr` for ImageNet weights) and
            what is not of one part.
        data, split, skip_broken: as `train` takes them.
        out: new checkpoint directory.
        unet_weights: file of ImageNet weights of EfficientNet-Lite0; from scratch when left out.

    Returns:
        The provenance written beside the weights.

    Raises:
        DataError, CheckpointError, InputError: what was given cannot be used.
    """
    out = Path(out)
    check_free(out)
    task = load_preset(preset)
    task = set_task(task, labels or task.labels, task.mask_kinds)
    recipe = recipe or RECIPES[task.preset]
    cases = open_data(data, task.labels, split=split, part=(TRAIN, VALIDATION) if split else None)
    cases, skipped = drop_broken(cases, skip=skip_broken)
    task = replace(task, mask_kinds=cases.mask_kinds)  # whatever they are, they are not looked at
    train_on, held_out = split_cases(cases, task, recipe, split)

    torch.manual_seed(recipe.seed)
    model = Cnn(CnnConfig(task.labels, task.image))
    if unet_weights:
        load_unet_weights(model.body, unet_weights)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(model, PixelSet(cases, task.image, ()), recipe, pretrained=bool(unet_weights))
    history = []
    for epoch in range(recipe.epochs):
        loss = run.train_epoch(epoch, train_on)
        scores, truth = run.score(held_out)
        history.append(
            {
                "epoch": epoch + 1,
                "label_loss": loss,
                "validation_loss": float(F.cross_entropy(scores, truth)),
                "validation_accuracy": float((scores.argmax(1) == truth).float().mean()),
            }
        )
        tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in history[-1].items()))
    model.config = replace(model.config, temperature=fit_temperature(scores, truth))
    provenance = {
        "preset": task.preset,
        "reads": READS,
        "labels": task.labels,
        "data": str(data),
        "rows": sha256(repr(list(cases.rows)).encode()).hexdigest(),
        "split": describe_split(split) if split else None,
        "skipped": skipped,
        "unet_weights": describe_weights(unet_weights) if unet_weights else None,
        "recipe": asdict(recipe),
        "notice": NOTICE,
        "training_cases": len(train_on),
        "validation_cases": len(held_out),
        "history": history,
        "built_with": {name: metadata.version(name) for name in BUILT_WITH},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    save_cnn(out, model, provenance)
    return provenance


_Step = tuple[Sequence[int], Sequence[Camera | None] | None, npt.NDArray[np.bool_]]


class _Run:
    """One run's model and optimizer; all chance comes from (seed, epoch)."""

    def __init__(self, model: Cnn, pixels: PixelSet, recipe: Recipe, *, pretrained: bool) -> None:
        self.model, self.pixels, self.recipe = model, pixels, recipe
        self.device = model.head.weight.device
        rates = (
            (model.body, recipe.encoder_lr if pretrained else recipe.unet_lr),
            (model.head, recipe.unet_lr),
        )
        groups = []
        for module, lr in rates:
            for decay, wide in ((recipe.weight_decay, True), (0.0, False)):
                chosen = [p for p in module.parameters() if (p.ndim > 1) == wide]
                groups.append({"params": chosen, "peak_lr": lr, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW(groups)

    def train_epoch(self, epoch: int, indices: Sequence[int]) -> float:
        """Train one epoch; return the mean loss."""
        self.model.train()
        rng = np.random.default_rng([self.recipe.seed, epoch])
        order = rng.permutation(indices).tolist()
        steps = [self._draw(batch, rng) for batch in batches(order, self.recipe.batch_size)]
        readers = readers_for(self.device)
        if readers:
            self.pixels.fill(indices)  # before they are copied; the same ones in every epoch
        prepared = prepare_ahead(self._prepare, steps, readers)
        total = 0.0
        for number, (pixels, truth) in enumerate(
            tqdm(prepared, total=len(steps), leave=False, disable=None)
        ):
            factor = step_factor(
                epoch * len(steps) + number,
                self.recipe.epochs * len(steps),
                self.recipe.schedule("unet"),
            )
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            logits = self.model(pixels.to(self.device))
            loss = F.cross_entropy(logits, truth.to(self.device))
            if not torch.isfinite(loss):
                raise CheckpointError(
                    f"epoch {epoch + 1}, step {number + 1}: found the loss {loss.item()}, expected "
                    "a finite one. Lower the learning rates of the recipe."
                )
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
            self.optimizer.step()
            total += loss.item()
        return total / len(steps)

    @torch.inference_mode()
    def score(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return label logits (N, K) and true labels (N,) of cases, on the CPU."""
        self.model.eval()
        logits = []
        for batch in batches(indices, BATCH_SIZE):
            pixels = np.stack([case.unet_pixels for case in self.pixels.read(batch)])
            logits.append(self.model(torch.from_numpy(pixels).to(self.device)).cpu())
        return torch.cat(logits), self._truth(indices)

    def _draw(self, batch: Sequence[int], rng: np.random.Generator) -> _Step:
        """Draw what chance decides of a step: each case's camera, and whether it is mirrored."""
        strength = self.recipe.augment
        cameras = [Camera.draw(rng, strength) for _ in batch] if strength else None
        return batch, cameras, rng.random(len(batch)) < 0.5

    def _prepare(self, step: _Step) -> tuple[Float32, Tensor]:
        """Read a step's cases and change them as it says: pixels (B, 3, U, U), true labels (B,)."""
        batch, cameras, flip = step
        pixels = np.stack([case.unet_pixels for case in self.pixels.read(batch, cameras)])
        pixels[flip] = pixels[flip][..., ::-1]  # a fundus mirrored is that of the other eye
        return pixels, self._truth(batch)

    def _truth(self, indices: Sequence[int]) -> Tensor:
        rows, labels = self.pixels.data.rows, self.model.config.labels
        return torch.tensor([labels.index(rows[i].label) for i in indices])


def save_cnn(folder: Path, model: Cnn, provenance: Mapping[str, Any]) -> None:
    """Write config.json, model.safetensors and provenance.json; all appear, or none.

    Raises:
        InputError: the folder exists and is not empty.
    """
    with staged_directory(folder) as staging:
        save_file({n: t.cpu() for n, t in model.state_dict().items()}, staging / TENSORS)
        for name, value in ((CONFIG, model.config.to_dict()), (PROVENANCE, provenance)):
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            (staging / name).write_text(text, encoding="utf-8")


def load_cnn(folder: Path) -> Cnn:
    """Read a CNN on the CPU, in eval mode.

    Raises:
        CheckpointError: config.json or the tensors are not a CNN's.
    """
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        image = ImageSpec(**to_tuples(values["image"]))
        config = CnnConfig(tuple(values["labels"]), image, values["temperature"], values["network"])
        model = Cnn(config).eval()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: describes no CNN that can be built ({error!r}), expected what "
            "`mdf train-cnn` wrote. Copy the checkpoint again."
        ) from None
    expected = model.state_dict()
    tensors = CheckpointTensors(folder, expected)
    model.load_state_dict({name: tensors[name] for name in expected})
    return model

"""A checkpoint as `evaluate` asks for it: numpy in and out, PyTorch within."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mdf_sdk.preprocessing import to_pixels
from mdf_sdk.prompt import PromptEncoder
from mdf_training.checkpoint import load_checkpoint
from mdf_training.model import MDFModel, PromptTensors

Float32 = npt.NDArray[np.float32]
Scores = Float32


class CheckpointScorer:
    """Scores with the PyTorch model on its device."""

    def __init__(self, model: MDFModel, encoder: PromptEncoder) -> None:
        self._model, self._encoder = model, encoder
        self._device = next(model.parameters()).device
        self.labels = encoder.labels
        self.image = model.config.image
        self.temperature = model.config.temperature
        self.mask_kinds = model.config.mask_kinds

    @classmethod
    def open(cls, folder: Path) -> "CheckpointScorer":
        """Load a checkpoint directory, onto a card where there is one."""
        checkpoint = load_checkpoint(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(checkpoint.model.to(device), checkpoint.prompt_encoder())

    @torch.inference_mode()
    def score(
        self,
        tower_pixels: npt.NDArray[np.float32],
        unet_pixels: npt.NDArray[np.float32],
        texts: Sequence[str],
    ) -> Scores:
        """Return label scores (B, K)."""
        tower, unet = (torch.from_numpy(p).to(self._device) for p in (tower_pixels, unet_pixels))
        return self._decode(self._model.encode_image(tower, unet).states, texts)

    @torch.inference_mode()
    def text_only_scores(self, texts: Sequence[str]) -> Scores:
        """Return label scores (B, K) with zeros in place of every cross-attention state."""
        config = self._model.config
        states = {
            layer: torch.zeros(len(texts), rows, config.text["hidden_size"], device=self._device)
            for layer, rows in config.state_rows().items()
        }
        return self._decode(states, texts)

    @torch.inference_mode()
    def segment(self, image: npt.NDArray[np.uint8], text: str) -> Float32:
        """Segment a photograph uint8 (H, W, 3): probabilities (M, U, U)."""
        tower, unet = (
            torch.from_numpy(p)[None].to(self._device) for p in to_pixels(image, self.image)
        )
        logits = self._model(tower, unet, self._prompt([text])).mask_logits[0]
        masks: Float32 = logits.sigmoid().cpu().numpy()
        return masks

    @torch.inference_mode()
    def features(self, tower_pixels: Float32, unet_pixels: Float32) -> Float32:
        """Pool vision states, skips and bottleneck over their places: (B, F)."""
        tower, unet = (torch.from_numpy(p).to(self._device) for p in (tower_pixels, unet_pixels))
        skips, bottleneck = self._model.encode_unet(unet)
        maps = [m.mean(dim=(2, 3)) for m in (*skips, bottleneck)]
        states = self._model.encode_vision(tower).mean(dim=1)
        pooled: Float32 = torch.cat([states, *maps], dim=1).cpu().numpy()
        return pooled

    def _prompt(self, texts: Sequence[str]) -> PromptTensors:
        packed = self._encoder.pack([self._encoder.encode(text) for text in texts])
        return PromptTensors.from_packed(packed, self._encoder, self._device)

    def _decode(self, states: dict[int, torch.Tensor], texts: Sequence[str]) -> Scores:
        prompt = self._prompt(texts)
        hidden, _ = self._model.decode_text(states, prompt)
        scores: Scores = self._model.score_labels(hidden, prompt).cpu().numpy()
        return scores

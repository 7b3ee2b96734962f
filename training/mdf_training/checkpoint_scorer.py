"""A checkpoint as `evaluate` asks for it: numpy in and out, PyTorch within."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mdf_sdk.prompt import PromptEncoder
from mdf_training.checkpoint import load_checkpoint
from mdf_training.model import MDFModel, PromptTensors

Scores = npt.NDArray[np.float32]


class CheckpointScorer:
    """Scores with the PyTorch model on its device."""

    def __init__(self, model: MDFModel, encoder: PromptEncoder) -> None:
        self._model, self._encoder = model, encoder
        self._device = next(model.parameters()).device
        self.labels = encoder.labels
        self.image = model.config.image

    @classmethod
    def open(cls, folder: Path) -> "CheckpointScorer":
        """Load a checkpoint directory."""
        checkpoint = load_checkpoint(folder)
        return cls(checkpoint.model, checkpoint.prompt_encoder())

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
        tokens, width = (
            self._model.backbone.model.vision_model.num_patches,
            config.text["hidden_size"],
        )
        zeros = torch.zeros(len(texts), tokens, width, device=self._device)
        return self._decode(dict.fromkeys(config.text["cross_attention_layers"], zeros), texts)

    def _decode(self, states: dict[int, torch.Tensor], texts: Sequence[str]) -> Scores:
        packed = self._encoder.pack([self._encoder.encode(text) for text in texts])
        prompt = PromptTensors.from_packed(packed, self._encoder, self._device)
        hidden, _ = self._model.decode_text(states, prompt)
        scores: Scores = self._model.score_labels(hidden, prompt).cpu().numpy()
        return scores

"""A model and a few cases in, every tensor that passes between the engine's blocks out."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mdf_export.blocks.unet import FEATURES
from mdf_export.streaming import StreamedCheckpoint
from mdf_sdk.preprocessing import to_pixels
from mdf_training.data.synthetic import SyntheticData
from mdf_training.model import PromptTensors, decode_mask

Array = npt.NDArray[np.generic]
# A seed that no command of the README trains or evaluates on.
GOLDEN_CASES = SyntheticData(2, 20260101)


def save_golden(checkpoint: StreamedCheckpoint, path: Path) -> None:
    """Write golden.npz: `case{i}/{tensor}`, each case run by itself as the runtime would.

    The same tensors give the same bytes: numpy's own savez would add the time of day.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(len(GOLDEN_CASES)):
            case = GOLDEN_CASES[i]
            for name, array in reference_tensors(checkpoint, [case.image], [case.text]).items():
                entry = zipfile.ZipInfo(f"case{i}/{name}.npy")  # dated 1980
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)


@torch.no_grad()
def reference_tensors(
    checkpoint: StreamedCheckpoint, images: Sequence[npt.NDArray[np.uint8]], texts: Sequence[str]
) -> dict[str, Array]:
    """Run the PyTorch model and name its tensors as the engine does.

    Args:
        checkpoint: the reference.
        images: uint8 (H, W, 3) RGB, one for each text.
        texts: clinical texts.

    Returns:
        Inputs and outputs of every block: float32, int64 or bool.
    """
    model, encoder = checkpoint.model, checkpoint.prompt_encoder()
    packed = encoder.pack([encoder.encode(text) for text in texts])
    prompt = PromptTensors.from_packed(packed, encoder, checkpoint.device)
    pixels = [to_pixels(image, checkpoint.config.image) for image in images]
    tower_pixels, unet_pixels = (
        torch.from_numpy(np.stack(p)).to(checkpoint.device) for p in zip(*pixels, strict=True)
    )

    # On a card cuDNN would round a convolution's float32 to TF32: 2e-4 off at the 11B shape.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with checkpoint.flowing(), exact:
        image = model.encode_image(tower_pixels, unet_pixels)
        hidden, pooled = model.decode_text(image.states, prompt)
        text = model.backbone.model.language_model
        fed = slice(packed.prefix_length, None)
        tensors = {
            "tower_pixels": tower_pixels,
            "unet_pixels": unet_pixels,
            "vision_states": image.vision_states,
            **dict(zip(FEATURES, [*image.skips, image.bottleneck], strict=True)),
            "inputs_embeds": text.embed_tokens(prompt.input_ids)[:, fed],
            "position_ids": prompt.position_ids[:, fed],
            "attention_mask": prompt.attention_mask[:, None, fed],
            "body_mask": prompt.body_mask[:, fed].float(),
            "pooled": pooled,
            "mask": decode_mask(
                model.unet, model.film, image.skips, image.bottleneck, pooled
            ).sigmoid(),
        }
        for layer, states in image.states.items():
            attention = text.layers[layer].cross_attn
            keys = attention.k_proj(states).unflatten(-1, (-1, attention.head_dim))
            tensors[f"cross_key_{layer}"] = attention.k_norm(keys).flatten(2)
            tensors[f"cross_value_{layer}"] = attention.v_proj(states)
    with checkpoint.loaded(model.backbone.lm_head):
        tensors["scores"] = model.score_labels(hidden, prompt)
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
        for name, tensor in tensors.items()
    }

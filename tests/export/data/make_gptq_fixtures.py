"""Record what GPTQModel 7.7 writes and computes: the files beside this script.

Run in an environment of its own, `python make_gptq_fixtures.py`, with gptqmodel==7.7.0, torch and
transformers 5; a few minutes on two CPU cores. The project itself does not depend on GPTQModel.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default fails on a machine of two cores

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, PreTrainedTokenizerFast

DATA = Path(__file__).parent
# bits, group size, desc_act, format, and whether the file stays whole; of the others, KEPT is left.
CHECKPOINTS = {
    "v1": (4, 32, False, "gptq", True),
    "v1_act_order": (4, 32, True, "gptq", False),
    "v2": (4, 32, False, "gptq_v2", False),
    "v2_act_order": (4, 32, True, "gptq_v2", False),
    "v1_8bit": (8, -1, False, "gptq", False),
}
KEPT = ("self_attn.k_proj", "mlp.down_proj")  # whose dequantized weights are recorded
PLAIN_LINEARS = {"128": (128, False), "32": (32, False), "32_act_order": (32, True)}


def make_dense(folder: Path) -> None:
    """Write an Mllama of one self-attention and one cross-attention layer."""
    torch.manual_seed(0)
    config = MllamaConfig(
        text_config={
            "vocab_size": 24,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "cross_attention_layers": [1],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 1,
            "image_size": 4,
            "patch_size": 2,
            "vision_output_dim": 16,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
        },
        image_token_index=24,
    )
    model = MllamaForConditionalGeneration(config).half()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(24)}, unk_token="w3"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)


def make_checkpoint(dense: Path, name: str) -> dict[str, np.ndarray]:
    """Quantize, save and read back with GPTQModel; return its own dequantized weights (K, N)."""
    bits, group_size, desc_act, layout, whole = CHECKPOINTS[name]
    folder = DATA / f"gptq_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    config = QuantizeConfig(
        bits=bits, group_size=group_size, desc_act=desc_act, act_group_aware=False, format=layout
    )
    random = np.random.RandomState(1)
    rows = [{"input_ids": random.randint(3, 24, 64).tolist()} for _ in range(32)]
    calibration = [{**row, "attention_mask": [1] * 64} for row in rows]
    model = GPTQModel.load(str(dense), config, device="cpu")
    model.quantize(calibration, batch_size=1)
    with tempfile.TemporaryDirectory() as saved:
        model.save(saved)
        read = GPTQModel.load(saved, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
        expected = {
            f"{name}/{linear.removeprefix('model.')}": module.dequantize_weight().numpy()
            for linear, module in read.model.named_modules()
            if linear.endswith(KEPT) and hasattr(module, "dequantize_weight")
        }
        folder.mkdir()
        tensors = load_file(Path(saved) / "model.safetensors")
        if not whole:
            quantized = tuple(f"layers.0.{linear}." for linear in KEPT)
            tensors = {n: t for n, t in tensors.items() if any(q in n for q in quantized)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        settings = json.loads((Path(saved) / "quantize_config.json").read_text())
        settings["meta"] = {"quantizer": settings["meta"]["quantizer"]}
        (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if whole:
            document = json.loads((Path(saved) / "config.json").read_text())
            document["quantization_config"]["meta"] = settings["meta"]
            (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    return expected


def make_plain_linears() -> dict[str, np.ndarray]:
    """Run its GPTQ class on one linear: what it makes of (N, K) = (32, 256) at three settings."""
    random = np.random.RandomState(7)  # whose streams numpy has frozen
    weight = random.standard_normal((32, 256)).astype(np.float32)
    energy = np.exp(random.standard_normal(256))
    inputs = random.standard_normal((1024, 256)) @ random.standard_normal((256, 256)) / 16 * energy
    results: dict[str, np.ndarray] = {}
    for name, (group_size, desc_act) in PLAIN_LINEARS.items():
        linear = nn.Linear(256, 32, bias=False)
        linear.weight.data = torch.from_numpy(weight.copy())
        config = QuantizeConfig(
            bits=4,
            group_size=group_size,
            desc_act=desc_act,
            static_groups=desc_act,
            act_group_aware=False,
            damp_percent=0.01,
        )
        library = GPTQ(linear, config)
        library.quantizer.configure(perchannel=True)
        library.expected_nsamples = 1
        batch = torch.from_numpy(inputs.astype(np.float32))
        library.add_batch(batch, linear(batch))
        rounded, scales, _, groups, *_ = library.quantize()
        scales = scales.float()  # (N, K / group_size)
        codes = (rounded.float() / scales[:, groups.long()]).round()
        results[f"{name}/codes"] = codes.to(torch.int8).T.contiguous().numpy()  # (K, N)
        results[f"{name}/scales"] = scales.T.contiguous().numpy()
    return results


def main() -> None:
    """Write the checkpoints, their dequantized weights, and the results on plain linears."""
    np.savez_compressed(DATA / "gptq_plain_linears.npz", **make_plain_linears())
    expected: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as dense:
        make_dense(Path(dense))
        for name in CHECKPOINTS:
            expected |= make_checkpoint(Path(dense), name)
    np.savez_compressed(DATA / "gptq_dequantized.npz", **expected)


if __name__ == "__main__":
    main()

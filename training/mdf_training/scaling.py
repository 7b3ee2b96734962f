"""Full fine-tuning steps on random weights in; memory, speed and FLOP utilization out."""

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mdf_sdk.errors import InputError
from mdf_sdk.machine import machine_card
from mdf_training.config import ModelConfig, load_preset
from mdf_training.distributed import (
    Processes,
    build_hollow_model,
    fill,
    is_large,
    place_model,
    random_backbone,
)
from mdf_training.losses import segmentation_loss
from mdf_training.model import MDFModel, PromptTensors, build_model
from mdf_training.optimizer import build_optimizer
from mdf_training.recipes import RECIPES

LANGUAGE_TOKENS = 160  # about a prompt with a few sentences of clinical text
PREFIX_TOKENS = 24
WARM_UP_STEPS = 3


def measure_scaling(
    preset: str, processes: Processes, *, steps: int = 20, batch_size: int | None = None
) -> dict[str, Any]:
    """Time optimizer steps of everything trained, and account for memory and FLOPs.

    Weights, pixels and tokens are random: it is a measurement of speed, not of learning. bfloat16
    with float32 weights on CUDA, float32 on the CPU. Model FLOPs are those of the products that the
    forward pass needs, times three for the backward pass; what is computed again does not count
    (PaLM, Chowdhery et al., 2022, appendix B). Utilization is against a large product of the same
    precision, timed in the same run.

    Args:
        preset: "nano", "smol-135m" or "llama-3.2-11b".
        steps: that are timed, after WARM_UP_STEPS.
        batch_size: cases per step, of all processes together; the recipe's when left out.

    Returns:
        Plain JSON types, alike in every process; bytes and seconds as the names say.

    Raises:
        InputError: fewer cases than processes, or no step.
    """
    config, recipe = load_preset(preset), RECIPES[preset]
    cases = recipe.batch_size if batch_size is None else batch_size
    if steps < 1 or cases < processes.size:
        raise InputError(
            f"found {steps} steps of {cases} cases, expected 1 step or more of {processes.size} "
            "cases or more, one for each process. Example: --steps 20 --batch-size 8"
        )
    torch.manual_seed(recipe.seed)
    hollow = processes.shards("bfloat16") and is_large(config)
    model = build_hollow_model(config) if hollow else build_model(config, pretrained=False)
    parameters = sum(p.numel() for p in model.parameters())
    place_model(model, processes, "bfloat16", recompute=recipe.recompute)
    if hollow:
        fill(model, random_backbone(model, recipe.seed, processes.device))
    optimizer = build_optimizer(model, recipe)
    share = processes.share(cases).cases
    inputs = random_inputs(config, share.stop - share.start, processes.device)
    truth = torch.arange(share.start, share.stop, device=processes.device) % len(config.labels)
    kinds = len(config.mask_kinds), config.image.unet_px, config.image.unet_px
    masks = torch.rand(len(truth), *kinds, device=processes.device).round()

    model.train()
    times_ms, losses = [], []
    for _ in range(WARM_UP_STEPS + steps):
        start = time.perf_counter()
        output = model(*inputs)
        label_loss = F.cross_entropy(output.scores, truth)
        mask_loss = segmentation_loss(output.mask_logits, masks, masks.new_ones(masks.shape[:2]))
        loss = label_loss + recipe.mask_weight * mask_loss
        optimizer.zero_grad()
        processes.weigh(loss, len(truth)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
        _synchronize(processes.device)
        times_ms.append(1e3 * (time.perf_counter() - start))

    peaks = _gather(_peak_bytes(processes.device), processes)
    step_ms = statistics.median(times_ms[WARM_UP_STEPS:])
    flops = 3 * cases * count_forward_flops(config)
    product = measure_product(processes.device)
    per_s = 1e3 * cases / step_ms
    return {
        "preset": preset,
        "processes": processes.size,
        "device": _device_name(processes.device),
        "batch_size": cases,
        "steps": steps,
        "recompute": recipe.recompute,
        "parameters": parameters,
        "state_bytes_per_process": 16 * parameters // processes.size,
        "peak_bytes_per_process": peaks,
        "step_ms_p50": step_ms,
        "step_ms_range": [min(times_ms[WARM_UP_STEPS:]), max(times_ms[WARM_UP_STEPS:])],
        "cases_per_s": per_s,
        "language_tokens_per_s": per_s * LANGUAGE_TOKENS,
        "vision_tokens_per_s": per_s * config.vision_rows,
        "model_flops_per_step": flops,
        "product_flops_per_s": product,
        "model_flop_utilization": flops / (1e-3 * step_ms * processes.size * product),
        "link_bytes_per_s": measure_link(processes),
        "first_and_last_loss": [losses[0], losses[-1]],
        "machine": machine_card(("mdf-mllm", "torch", "transformers", "accelerate")),
    }


def random_inputs(
    config: ModelConfig, cases: int, device: torch.device
) -> tuple[Tensor, Tensor, PromptTensors]:
    """Make what MDFModel's forward takes: pixels, and a prompt with labels of one token each."""
    tower, unet = (
        torch.rand(cases, 3, side, side, device=device)
        for side in (config.image.tower_px, config.image.unet_px)
    )
    rows = LANGUAGE_TOKENS
    ids = torch.randint(config.text["vocab_size"], (cases, rows), device=device)
    causal = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    prompt = PromptTensors(
        ids,
        torch.arange(rows, device=device).expand(cases, rows),
        causal.expand(cases, rows, rows),
        torch.ones(cases, rows, dtype=torch.bool, device=device),
        PREFIX_TOKENS,
        torch.arange(len(config.labels), device=device),
        [[(0, column)] for column in range(len(config.labels))],
    )
    return tower, unet, prompt


def count_forward_flops(config: ModelConfig) -> int:
    """Count the FLOPs of one case's matrix products and convolutions, by their shapes alone."""
    device = torch.device("meta")
    with device:
        model = MDFModel(config).eval()
        inputs = random_inputs(config, 1, device)
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
    return int(counter.get_total_flops())


def measure_product(device: torch.device) -> float:
    """Return the FLOP/s of a large square product: bfloat16 on CUDA, float32 on the CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    factor = torch.randn(side, side, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        factor @ factor
        _synchronize(device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * side**3 / best_s


def measure_link(processes: Processes) -> float | None:
    """Return the bytes per second that each process sends in an all-reduce; None where alone.

    A ring moves every byte twice but for a process's own part (NCCL's "bus bandwidth").
    """
    if processes.size == 1:
        return None
    tensor = torch.ones(2**28 if processes.device.type == "cuda" else 2**18).to(processes.device)
    best_s = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        dist.all_reduce(tensor)
        _synchronize(processes.device)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * tensor.nbytes * (processes.size - 1) / processes.size / best_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int | None:
    """Return the most device memory that tensors took; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _gather(value: Any, processes: Processes) -> list[Any]:
    if processes.size == 1:
        return [value]
    values = [None] * processes.size
    dist.all_gather_object(values, value)
    return values

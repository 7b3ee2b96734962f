"""Several processes train one model: whose cases are whose, sums over all, and FSDP2's shards.

Every process draws the same random numbers for the whole batch and takes its share of the cases;
gradients, losses and batch norm's statistics are those of the whole batch. So the loss curve of a
run is the same, to rounding, on any number of processes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState, init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from mdf_training.backbone import build_backbone
from mdf_training.config import ModelConfig
from mdf_training.model import MDFModel

# Above it, a process never holds the whole model: it is filled shard by shard.
WHOLE_MODEL_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Share:
    """One process's part of a batch.

    Attributes:
        cases: which of the batch's cases. Never none, for every process must take part in every
            step: where there are fewer cases than processes, some take the first one along.
        counts: whether they count, or are only taken along.
    """

    cases: slice
    counts: bool


@dataclass(frozen=True)
class Processes:
    """The processes that train one model, as `torchrun` or `accelerate launch` started them.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        device: this process's own.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> "Processes":
        """Meet the other processes; one that was started alone is its own first and last."""
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, state.device)

    def leave(self) -> None:
        """Part from the others, at the end of a command."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> Share:
        """Return this process's share of a batch of `count` cases."""
        start, stop = (count * i // self.size for i in (self.rank, self.rank + 1))
        return Share(slice(start, stop), True) if start < stop else Share(slice(0, 1), False)

    def shards(self, compute: str) -> bool:
        """Whether a model that computes so is in shards here: on one card, for the precision."""
        return self.size > 1 or (compute == "bfloat16" and self.device.type == "cuda")

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors; no gradient flows."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def weigh(self, mean: Tensor, weight: float | Tensor) -> Tensor:
        """Scale a share's mean so that the average over the processes is the whole batch's mean.

        FSDP2 averages gradients over the processes: a loss that is weighed so has the gradient of
        the whole batch's loss.

        Args:
            mean: scalar, over `weight` items.
            weight: of this share, 0 where it does not count.
        """
        if self.size == 1:
            return mean
        own = torch.as_tensor(weight, dtype=torch.float32, device=mean.device)
        return mean * own * self.size / self.sum(own).clamp(min=1)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class WholeBatchNorm(nn.BatchNorm2d):
    """Batch norm over the cases of all processes, with a BatchNorm2d's names in the state dict.

    PyTorch's SyncBatchNorm runs on CUDA alone, and its conversion loses the activation that timm
    puts into its norms.

    Attributes:
        counts: whether this process's cases count in the statistics (see Share).
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        for name, value in (
            *norm.named_parameters(recurse=False),
            *norm.named_buffers(recurse=False),
        ):
            setattr(self, name, value)
        # timm's BatchNormAct2d drops and activates after it normalizes.
        self.after = nn.Sequential(
            *(getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name))
        )
        self.counts = True
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize float (B, C, H, W)."""
        mean, variance = self.running_mean, self.running_var
        assert mean is not None
        assert variance is not None
        if self.training:
            weight = float(self.counts)
            count = x.new_full((1,), weight * x.numel() / x.shape[1])
            sums = _SumOverProcesses.apply(torch.cat([weight * x.sum(dim=(0, 2, 3)), count]))
            count = sums[-1].detach()
            batch_mean = sums[:-1] / count
            centered = x - batch_mean[:, None, None]
            squares = _SumOverProcesses.apply(weight * centered.square().sum(dim=(0, 2, 3)))
            batch_variance = squares / count
            self._track(batch_mean.detach(), squares.detach() / (count - 1))
            scale = self.weight * (batch_variance + self.eps).rsqrt()
            x = centered * scale[:, None, None] + self.bias[:, None, None]
        else:
            x = F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)
        return self.after(x)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def share_batch_norms(model: nn.Module) -> None:
    """Put a WholeBatchNorm in the place of every BatchNorm2d."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, WholeBatchNorm(child))


def set_counting(model: nn.Module, counts: bool) -> None:
    """Tell every WholeBatchNorm whether this process's next cases count."""
    for module in model.modules():
        if isinstance(module, WholeBatchNorm):
            module.counts = counts


def layers_of(model: MDFModel) -> list[nn.Module]:
    """Return the layers that are sharded and recomputed one by one."""
    mllama = model.backbone.model
    vision = mllama.vision_model
    return [
        *vision.transformer.layers,
        *vision.global_transformer.layers,
        *mllama.language_model.layers,
        *model.fusion,
    ]


def checkpoint_activations(model: MDFModel) -> None:
    """Keep the inputs of every layer alone; backward computes its activations again."""
    for layer in layers_of(model):
        # Inside FSDP2's hooks, so that the recomputation finds the layer gathered.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def place_model(
    model: MDFModel, processes: Processes, compute: str, *, recompute: bool = False
) -> None:
    """Put a model where it trains, in place: on the device, or in shards over the processes.

    Args:
        compute: "float32" or "bfloat16"; the latter on CUDA alone.
        recompute: keep the layers' inputs alone (see `checkpoint_activations`).
    """
    if processes.device.type == "cuda":
        # Float32 products round to TF32, as cuDNN's convolutions do unasked.
        torch.set_float32_matmul_precision("high")
    if recompute:
        checkpoint_activations(model)
    if not processes.shards(compute):
        model.to(processes.device)
        return
    if processes.size > 1:
        share_batch_norms(model)
    half = compute == "bfloat16" and processes.device.type == "cuda"
    shard_model(model, processes, torch.bfloat16 if half else torch.float32)


def shard_model(model: MDFModel, processes: Processes, compute: torch.dtype) -> None:
    """Spread every parameter over the processes (FSDP2), in place; what is hollow gets memory.

    Each layer is gathered when it runs, in `compute`; the stored shards, their gradients and the
    optimizer's state are float32. The U-Net computes in float32: it is a small part of the work,
    and its batch norms want it. Parameters outside the layers (embeddings, head, FiLM) are gathered
    while the whole model's forward runs, so call the model, not its methods.
    """
    if not dist.is_initialized():  # one process alone
        backend = "nccl" if processes.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    shard = partial(fully_shard, mesh=init_device_mesh(processes.device.type, (processes.size,)))
    policy = MixedPrecisionPolicy(compute, torch.float32)
    for layer in layers_of(model):
        shard(layer, mp_policy=policy)
    exact = MixedPrecisionPolicy(torch.float32)
    for part in (model.unet.encoder, model.unet.decoder, model.unet.segmentation_head):
        shard(part, mp_policy=exact, reshard_after_forward=False)
    # Pixels stay float32: the vision tower casts them, the U-Net takes them as they are.
    shard(model, mp_policy=replace(policy, cast_forward_inputs=False))

    def allocate(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=processes.device) if tensor.is_meta else tensor

    model._apply(allocate)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward without a backward has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_large(config: ModelConfig) -> bool:
    """Whether no process should hold the whole model."""
    with torch.device("meta"):
        backbone = build_backbone(config)
    return sum(p.numel() for p in backbone.parameters()) > WHOLE_MODEL_PARAMETERS


def build_hollow_model(config: ModelConfig) -> MDFModel:
    """Build a model whose backbone has shapes and buffers but no weights ("meta")."""
    with init_empty_weights(include_buffers=False):
        backbone = build_backbone(config)
    return MDFModel(config, backbone)


def local_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """Return what this process holds of a tensor, sharing its memory, and which rows they are."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(None)
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    local = tensor.to_local()
    start = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return local, slice(start, start + len(local))


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the rows of all processes, which all must call in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors into a model by name; each process keeps its own rows of each."""
    state = model.state_dict()
    for name, tensor in tensors:
        local, rows = local_rows(state[name])
        local.copy_(tensor[rows] if tensor.ndim else tensor)


def random_backbone(
    model: MDFModel, seed: int, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield random weights for a hollow backbone, the same on any number of processes.

    Normal with transformers' initializer_range, norms at one, biases at zero; the gates of the
    cross-attention layers where the config has them.
    """
    generator = torch.Generator(device).manual_seed(seed)
    text_config: Any = model.backbone.config.text_config
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            continue
        tensor = torch.empty(parameter.shape, device=device)
        if ".cross_attn_" in name:
            tensor.fill_(model.config.cross_gate)
        elif parameter.ndim > 1 or name.endswith(("class_embedding", "gate_attn", "gate_ffn")):
            tensor.normal_(std=text_config.initializer_range, generator=generator)
        else:
            tensor.fill_(float(name.endswith(".weight")))
        yield name, tensor

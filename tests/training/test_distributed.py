"""mdf_training.distributed: any number of processes train the same model on the same losses."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mdf_sdk.errors import InputError
from mdf_training.checkpoint import load_checkpoint, load_weights, read_provenance
from mdf_training.config import load_preset
from mdf_training.distributed import (
    Processes,
    Share,
    WholeBatchNorm,
    build_hollow_model,
    checkpoint_activations,
    fill,
    is_large,
    place_model,
    random_backbone,
    reshard,
    set_counting,
    shard_model,
)
from mdf_training.model import MDFModel, ModelOutput, build_model
from mdf_training.recipes import RECIPES, Recipe
from mdf_training.scaling import random_inputs
from mdf_training.trainer import train

from .llama_directory import NANO, build_directory

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
# 35 cases to train on: a batch of 32, and one of 3 that two processes share unevenly.
DATA, EPOCHS = "synthetic:39:1", 2
PROCESSES = 2

# The first process of the second run is killed in its second epoch.
DRIVER = """
import dataclasses, os, signal, sys
from pathlib import Path
import torch
from mdf_training.epochs import EpochRunner
from mdf_training.trainer import train
from mdf_training.recipes import RECIPES

torch.set_num_threads(1)
data, epochs, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
recipe = dataclasses.replace(RECIPES["nano"], epochs=epochs)
train("nano", data, folder / "unbroken", recipe=recipe)
losses, calls = EpochRunner._losses, 0

def die_in_the_second_epoch(self, inputs):
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(self, inputs)

EpochRunner._losses = die_in_the_second_epoch
train("nano", data, folder / "killed", recipe=recipe)
"""


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """Start PROCESSES processes as `torchrun` does."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(PROCESSES), *words),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an unbroken run on two processes, and one that was killed in epoch 2."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "driver.py").write_text(DRIVER)
    done = launch(str(folder / "driver.py"), DATA, str(EPOCHS), str(folder))
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    return folder


def losses_of(history: list[dict[str, Any]]) -> list[float]:
    names = ("label_loss", "mask_loss", "validation_loss", "validation_mask_loss")
    return [epoch[name] for epoch in history for name in names]


def flat_gradient(model: nn.Module) -> Tensor:
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return torch.cat(whole)


def in_threads(
    monkeypatch: pytest.MonkeyPatch, size: int, work: Callable[[Processes], Any]
) -> list[Any]:
    """Do work in threads that sum their tensors as processes do; return the results by rank."""
    meeting, local, slots = threading.Barrier(size), threading.local(), dict[int, Tensor]()

    def all_reduce(tensor: Tensor) -> None:
        slots[local.rank] = tensor.clone()
        meeting.wait(timeout=60)
        tensor.copy_(torch.stack([slots[rank] for rank in range(size)]).sum(dim=0))
        meeting.wait(timeout=60)

    def start(rank: int) -> Any:
        local.rank = rank
        return work(Processes(rank, size, CPU))

    monkeypatch.setattr("mdf_training.distributed.dist.all_reduce", all_reduce)
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(start, range(size)))


def run(model: MDFModel) -> ModelOutput:
    torch.manual_seed(1)
    output: ModelOutput = model(*random_inputs(model.config, 2, CPU))
    return output


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(runs: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPES["nano"], epochs=EPOCHS)
    alone = train("nano", DATA, tmp_path / "alone", recipe=recipe)
    together = read_provenance(runs / "unbroken")
    # The first step of AdamW has the size of the learning rate whatever the gradient's, so one that
    # is all rounding moves a weight, and the running statistics of batch norm follow.
    expected, found = losses_of(alone["history"]), losses_of(together["history"])
    assert found == pytest.approx(expected, rel=1e-2)
    assert found[0::4] == pytest.approx(expected[0::4], rel=1e-4)
    assert found[1::4] == pytest.approx(expected[1::4], rel=1e-3)


@pytest.mark.slow
def test_a_run_that_was_killed_is_resumed_to_the_same_history_on_two_processes_and_on_one(
    runs: Path, tmp_path: Path
) -> None:
    unbroken = read_provenance(runs / "unbroken")["history"]
    killed = read_provenance(runs / "killed")["history"]
    assert killed == unbroken[:1]
    for name in ("two", "one"):
        shutil.copytree(runs / "killed", tmp_path / name)
    done = launch(
        *("-m", "mdf_sdk.cli", "train", "--preset", "nano", "--data", DATA, "--resume", "--json"),
        *("--out", str(tmp_path / "two"), "--epochs", str(EPOCHS)),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["history"] == unbroken
    first, second = (
        load_checkpoint(folder).model.state_dict()
        for folder in (runs / "unbroken", tmp_path / "two")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)

    recipe = dataclasses.replace(RECIPES["nano"], epochs=EPOCHS)
    alone = train("nano", DATA, tmp_path / "one", recipe=recipe, resume=True)
    assert losses_of(alone["history"]) == pytest.approx(losses_of(unbroken), rel=1e-2)


def test_every_process_reads_its_share_of_a_backbone(tmp_path: Path) -> None:
    folder = build_directory(tmp_path / "Llama-nano", NANO)
    recipe = dataclasses.replace(RECIPES["nano"], epochs=1)
    alone = train("nano", DATA, tmp_path / "one", recipe=recipe, backbone=folder)
    done = launch(
        *("-m", "mdf_sdk.cli", "train", "--preset", "nano", "--data", DATA, "--epochs", "1"),
        *("--backbone", str(folder), "--out", str(tmp_path / "two")),
    )
    assert done.returncode == 0, done.stderr
    history = read_provenance(tmp_path / "two")["history"]
    assert losses_of(history) == pytest.approx(losses_of(alone["history"]), rel=1e-3)


@pytest.mark.parametrize(("count", "size"), [(16, 2), (5, 2), (3, 4), (1, 8)])
def test_every_case_of_a_batch_counts_in_one_process(count: int, size: int) -> None:
    shares = [Processes(rank, size, CPU).share(count) for rank in range(size)]
    counted = [i for share in shares if share.counts for i in range(count)[share.cases]]
    assert counted == list(range(count))
    assert all(len(range(count)[share.cases]) > 0 for share in shares)


def test_alone_everything_is_ones_own() -> None:
    value = torch.tensor(3.0)
    assert ALONE.share(7) == Share(slice(0, 7), True)
    assert ALONE.weigh(value, 5) is value
    assert ALONE.sum(value) is value


@pytest.mark.parametrize("count", [5, 2])
def test_the_average_of_the_weighed_means_is_the_whole_batchs_mean(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.arange(1.0, count + 1) ** 2

    def work(processes: Processes) -> Tensor:
        share = processes.share(count)
        own = values[share.cases]
        return processes.weigh(own.mean(), len(own) * share.counts)

    weighed = in_threads(monkeypatch, 3, work)
    assert torch.stack(weighed).mean() == pytest.approx(float(values.mean()))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("count", [5, 2])
def test_batch_norm_over_processes_is_pytorchs_on_the_whole_batch(
    kind: type[nn.BatchNorm2d], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 5, 6, 6, generator=generator) * 3 + 10
    direction = torch.arange(pixels.numel()).view_as(pixels).sin()

    def make() -> nn.BatchNorm2d:
        norm = kind(5)
        nn.init.constant_(norm.weight, 0.7)
        nn.init.constant_(norm.bias, -0.2)
        return norm

    def work(processes: Processes) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        share = processes.share(count)
        norm = WholeBatchNorm(make())
        set_counting(norm, share.counts)
        x = pixels[share.cases].clone().requires_grad_()
        y = norm(x)
        (share.counts * (y * direction[share.cases]).sum()).backward()
        assert x.grad is not None
        kept = slice(None) if share.counts else slice(0, 0)
        return y.detach()[kept], x.grad[kept], norm.state_dict(), norm.eval()(pixels)

    expected = make()
    x = pixels.clone().requires_grad_()
    y = expected(x)
    (y * direction).sum().backward()
    shares = in_threads(monkeypatch, 3, work)
    assert torch.allclose(torch.cat([share[0] for share in shares]), y, atol=1e-5)
    assert torch.allclose(torch.cat([share[1] for share in shares]), x.grad, atol=1e-5)
    for _, _, state, evaluated in shares:
        assert state.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.allclose(state[name], tensor, atol=1e-4), name
        assert torch.allclose(evaluated, expected.eval()(pixels), atol=1e-4)


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model("nano").train()
        if recompute:
            checkpoint_activations(model)
        output = run(model)
        (output.scores.sum() + output.mask_logits.sum()).backward()
        gradients.append(flat_gradient(model))
    assert torch.equal(*gradients)


def test_shards_compute_what_the_whole_model_does(group: None) -> None:
    gradients = []
    for shard in (False, True):
        torch.manual_seed(0)
        model = build_model("nano").train()
        if shard:
            shard_model(model, ALONE, torch.float32)
        output = run(model)
        (output.scores.sum() + output.mask_logits.mean()).backward()
        gradients.append(flat_gradient(model))
    assert torch.allclose(*gradients, atol=1e-6)


def test_bfloat16_computes_beside_float32_weights(group: None) -> None:
    torch.manual_seed(0)
    whole = build_model("nano").eval()
    torch.manual_seed(0)
    model = build_model("nano").eval()
    shard_model(model, ALONE, torch.bfloat16)
    expected, found = run(whole), run(model)
    assert torch.allclose(found.scores, expected.scores, atol=0.1)
    assert not torch.equal(found.scores, expected.scores)
    # The U-Net is exact up to what FiLM brings it, and FiLM starts as the identity.
    assert torch.equal(found.mask_logits, expected.mask_logits)
    (found.scores.sum() + found.mask_logits.mean()).backward()
    reshard(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_a_hollow_model_is_filled_from_a_checkpoint(tiny_checkpoint: Path, group: None) -> None:
    expected = load_checkpoint(tiny_checkpoint).model
    model = build_hollow_model(expected.config).eval()
    assert next(model.backbone.parameters()).is_meta
    shard_model(model, ALONE, torch.float32)
    load_weights(model, tiny_checkpoint)
    with torch.no_grad():
        assert torch.equal(run(model).scores, run(expected).scores)


def test_random_weights_fill_the_whole_backbone_alike_each_time(group: None) -> None:
    model = build_hollow_model(load_preset("nano"))
    shard_model(model, ALONE, torch.float32)
    first = dict(random_backbone(model, 3, CPU))
    second = dict(random_backbone(model, 3, CPU))
    assert first.keys() == {n for n, _ in model.named_parameters() if n.startswith("backbone.")}
    assert all(torch.equal(first[name], second[name]) for name in first)
    fill(model, first.items())
    with torch.no_grad():
        assert run(model).scores.isfinite().all()


def test_the_papers_model_alone_is_too_large_to_hold_whole() -> None:
    assert [is_large(load_preset(name)) for name in ("nano", "llama-3.2-11b")] == [False, True]


def test_one_process_on_the_cpu_shards_nothing() -> None:
    model = build_model("nano")
    place_model(model, ALONE, "bfloat16")
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def test_a_precision_that_nothing_computes_in_is_refused() -> None:
    with pytest.raises(InputError, match="compute: found 'float16'"):
        Recipe(compute="float16")

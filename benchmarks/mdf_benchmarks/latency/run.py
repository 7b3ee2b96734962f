"""What was asked for in; engines measured, then rivals, and the reports saved after each step."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mdf_benchmarks.latency.against import add_peers
from mdf_benchmarks.latency.card import Card
from mdf_benchmarks.latency.measure import FULL, QUICK, measure, texts_for
from mdf_benchmarks.latency.peer_process import NEEDS_CHECKPOINT, PeerOptions, check_peers
from mdf_benchmarks.latency.random_engine import ensure_checkpoint, ensure_engine, run_module
from mdf_sdk import InputError
from mdf_sdk.manifest import Precision

Report = dict[str, Any]
Save = Callable[[Sequence[Report]], None]


@dataclass(frozen=True)
class Request:
    """How to benchmark, whatever the engine.

    Attributes:
        quick: 50 queries of each kind, not MLPerf's single stream.
        device, threads: as MDFClassifier takes them.
        against: peers.
        text_tokens: of the clinical texts; None takes two sentences.
    """

    quick: bool
    device: str
    threads: int | None
    against: tuple[str, ...]
    text_tokens: int | None

    def command(self, engine: Path) -> list[str]:
        """Return the words after `mdf` that ask the same of an engine, without peers."""
        words = ["benchmark", str(engine), "--device", self.device, "--json"]
        words += ["--quick"] * self.quick
        for name, value in (("--threads", self.threads), ("--text-tokens", self.text_tokens)):
            words += [] if value is None else [name, str(value)]
        return words


def benchmark_engine(
    engine: Path, checkpoint: Path | None, request: Request, save: Save
) -> list[Report]:
    """Measure an engine, and then what it is set against.

    Args:
        engine: its directory.
        checkpoint: what it was exported from, for the peer that runs it.
        request: how.
        save: called with the report when the engine is measured, and after each peer.

    Raises:
        MDFError: as `measure`.
    """
    report = measure(
        engine,
        QUICK if request.quick else FULL,
        device=request.device,
        threads=request.threads,
        against=request.against,
        checkpoint=checkpoint,
        text_tokens=request.text_tokens,
    )
    _add_rest([report], engine, checkpoint, request, save)
    return [report]


def benchmark_random(
    preset: str,
    precisions: Sequence[str],
    work: Path,
    tokenizer: Path | None,
    request: Request,
    save: Save,
    progress: Callable[[str], None],
) -> list[Report]:
    """Make engines of random weights, measure each, and then what they are set against.

    Each is made and measured in processes of its own, so that the memory which making it took is in
    no figure. On a card a peer is asked once for all of them.

    Args:
        preset: its name.
        precisions: one report for each.
        work: directory for checkpoint and engines; what is there already is not made again.
        tokenizer: the model's tokenizer.json; None takes a stand-in.
        request: how.
        save: called with the reports after each step.
        progress: told what is done, in words.

    Raises:
        MDFError: as `mdf export` and `measure`.
    """
    check_peers(request.against)
    if set(precisions) - set(get_args(Precision)) or len(set(precisions)) != len(precisions):
        raise InputError(
            f"precision: found {','.join(precisions)}, expected some of "
            f"{', '.join(get_args(Precision))}, each once"
        )
    start = time.monotonic()

    def tell(what: str) -> None:
        progress(f"{time.monotonic() - start:5.0f} s  {what}")

    checkpoint = ensure_checkpoint(preset, work, tokenizer)
    tell(f"{checkpoint}: a checkpoint of random weights")
    on_card = request.device != "cpu" and Card.open() is not None
    reports: list[Report] = []
    for precision in precisions:
        engine = ensure_engine(checkpoint, precision, "cuda" if on_card else "cpu")
        tell(f"{engine}: an engine")
        peers = [] if on_card else ["--against", ",".join(request.against)]
        if peers and NEEDS_CHECKPOINT in request.against:
            peers += ["--reference", str(checkpoint)]
        lines = run_module(["mdf_sdk.cli", *request.command(engine), *peers])
        reports.append(json.loads(lines[-1]))
        save(reports)
        tell(f"{engine}: measured")
    _add_rest(reports, engine, checkpoint, request, save)
    return reports


def _add_rest(
    reports: Sequence[Report],
    engine: Path,
    checkpoint: Path | None,
    request: Request,
    save: Save,
) -> None:
    """Ask the peers that were not asked in turn with the engine, now that it has left."""
    save(reports)
    answered = {peer["name"] for peer in reports[0]["peers"]}
    _, texts = texts_for(engine, request.text_tokens)
    device = "cpu" if reports[0]["device"] == "cpu" else "cuda"
    add_peers(
        reports,
        [name for name in request.against if name not in answered],
        PeerOptions(engine, checkpoint, device, request.threads, texts),
        (QUICK if request.quick else FULL).queries,
        lambda: save(reports),
    )

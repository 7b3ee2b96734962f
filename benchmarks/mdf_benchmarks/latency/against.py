"""An engine's report and peers' names in, how many times as long each of them takes out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from mdf_benchmarks.latency.peer_process import PeerFailure, PeerOptions, PeerProcess
from mdf_benchmarks.latency.statistics import Samples, ratio_interval
from mdf_benchmarks.latency.timing import ROUNDS, Question, Times, timed

KINDS = ("new_image", "same_image_new_text")
WITH_UNET = ("pytorch-cpu",)  # the others have less to do than the engine
_WARM_UP = 3
_MOST_QUERIES = 100
_ENOUGH_S = 30.0  # a slow one is asked less


def time_peer(
    name: str,
    options: PeerOptions,
    queries: int,
    engine: Mapping[str, Question] | None = None,
) -> dict[str, Any]:
    """Ask a peer the engine's questions, in a process of its own.

    Args:
        name: one of PEERS.
        options: what it is asked, and where.
        queries: of each kind; at most 100 are asked, of a slow one ten.
        engine: the engine's questions by kind, to be asked in turn with the peer's, so that what
            disturbs the machine meets both. None asks the peer alone.

    Returns:
        JSON types: `name`; `status`, "ok", "not_available", "out_of_memory" or "failed"; `reason`,
        None where it is ok. Then also what it is (`model`, `weights`, `versions`), `load_ms`,
        `first_answer_ms`, `peak_host_bytes`, `peak_device_bytes` (of PyTorch's allocator alone,
        without CUDA's own), and by kind in `latency` its times and, where the engine was asked in
        turn, the engine's in `engine_latency`.
    """
    try:
        with PeerProcess(name, options) as peer:
            theirs, ours = _ask(peer, queries, engine)
            return {
                "name": name,
                "status": "ok",
                "reason": None,
                **peer.about,
                "weights": "the checkpoint's" if name in WITH_UNET else "random",
                "unet": name in WITH_UNET,
                **peer.memory(),
                "latency": {kind: times.report() for kind, times in theirs.items()},
                "engine_latency": {kind: times.report() for kind, times in ours.items()} or None,
            }
    except PeerFailure as failure:
        return {"name": name, "status": failure.status, "reason": failure.reason}


def add_peers(
    reports: Sequence[dict[str, Any]],
    names: Iterable[str],
    options: PeerOptions,
    queries: int,
    save: Callable[[], None],
) -> None:
    """Ask peers alone, one after another, and add each to reports of engines of one shape.

    Args:
        reports: as `measure` returns them; `peers` grows.
        names: of PEERS.
        options, queries: as `time_peer` takes them.
        save: called after each, so that what ends the run takes nothing away.
    """
    for name in names:
        peer = time_peer(name, options, queries)
        for report in reports:
            report["peers"].append(with_ratios(peer, report["latency"]))
        save()


def with_ratios(peer: Mapping[str, Any], latency: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a peer's result how many times as long as the engine it takes.

    Args:
        peer: what `time_peer` returned.
        latency: the engine's, of its report; used where it was not asked in turn with the peer.

    Returns:
        The result with `ratios`: by kind, of `whole` calls and `without_image` (preparing the
        photograph left out): `ratio` of the medians and its 95 % interval.
    """
    if peer["status"] != "ok":
        return dict(peer)
    paired = peer["engine_latency"] is not None
    engine = peer["engine_latency"] or latency
    ratios = {
        kind: {
            part: _ratio(peer["latency"][kind], engine[kind], key, paired)
            for part, key in (
                ("whole", "samples_ms"),
                ("without_image", "without_image_samples_ms"),
            )
        }
        for kind in peer["latency"]
    }
    return {**peer, "ratios": ratios}


def rounds_of(times: Mapping[str, Any], key: str = "samples_ms") -> list[Samples]:
    """Cut raw samples of a report into their rounds."""
    samples = np.array(times[key])
    return np.split(samples, list(accumulate(times["round_sizes"]))[:-1])


def _ratio(
    peer: Mapping[str, Any], engine: Mapping[str, Any], key: str, paired: bool
) -> dict[str, Any]:
    ratio, low, high = ratio_interval(rounds_of(peer, key), rounds_of(engine, key), paired=paired)
    return {"ratio": ratio, "interval": [low, high]}


def _ask(
    peer: PeerProcess, queries: int, engine: Mapping[str, Question] | None
) -> tuple[dict[str, Times], dict[str, Times]]:
    theirs = {kind: Times() for kind in KINDS}
    ours = {kind: Times() for kind in engine or ()}
    longest_s = 0.0
    for kind in KINDS:
        for number in range(_WARM_UP):
            warm = peer.ask(kind, number)
            if engine is not None:
                engine[kind](number)()
        longest_s = max(longest_s, 1e-3 * warm.whole_ms)
    fit = int(_ENOUGH_S / (len(KINDS) * ROUNDS * longest_s))
    each = max(1, min(fit, -(-min(queries, _MOST_QUERIES) // ROUNDS)))
    for round_ in range(ROUNDS):
        for kind in KINDS:
            first = _WARM_UP + round_ * (each + 1)
            numbers = range(first + 1, first + 1 + each)
            if engine is not None:
                # Finds what the other kind left: does not count. Of the last number the engine
                # would still keep the photograph.
                engine[kind](first)()
                ours[kind].rounds.append([timed(engine[kind](i)) for i in numbers])
            theirs[kind].rounds.append([peer.ask(kind, i) for i in numbers])
    return theirs, ours

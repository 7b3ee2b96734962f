"""Two reports of `mdf benchmark` in, whether a difference between them is shown out."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mdf_benchmarks.latency.against import rounds_of
from mdf_benchmarks.latency.measure import FORMAT
from mdf_benchmarks.latency.statistics import overlap, ratio_interval
from mdf_benchmarks.latency.text import KIND_NAMES, describe_bytes, describe_interval
from mdf_sdk import InputError, MDFError

# Of two runs of one engine, whose processes lie differently in memory and time: docs/benchmark.md.
_NOISE = 0.1
NO_DIFFERENCE = "no difference shown"
_CONDITIONS = ("device", "card", "backend", "threads", "quick")
_HARDWARE = ("cpu", "cores", "card", "memory_bytes")
_MACHINE = (*_HARDWARE, "system", "power_mode", "versions")
_PARTS = {"whole": "", "without_image": ", without preparing the photograph"}


def load_report(path: Path) -> dict[str, Any]:
    """Read what `mdf benchmark --out` wrote.

    Raises:
        InputError: it is no such report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        found = report["format"]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a report. {_CURE}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: found no report, expected one. {_CURE}") from None
    if found != FORMAT:
        raise InputError(f"{path}: found a report of {found!r}, expected {FORMAT!r}. {_CURE}")
    checked: dict[str, Any] = report
    return checked


_CURE = "Make one: mdf benchmark ENGINE --out FILE"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)  # a report is strict JSON: no NaN, no Infinity


@contextmanager
def expect_whole(*paths: Path) -> Generator[None]:
    """Turn what a damaged report sets off while it is used into an InputError that names it."""
    try:
        yield
    except MDFError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{' or '.join(map(str, paths))}: found a report with a field missing or wrong "
            f"({type(error).__name__}: {error}), expected it as it was written. {_CURE}"
        ) from error


def compare_reports(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Set B beside A.

    Returns:
        JSON types: `a` and `b` (which engine, where, when); `warnings`; and in `latency`, by kind
        and part ("whole", "without_image"), both medians with the intervals over rounds, `ratio` of
        B to A with its `interval`, and `verdict`: "no difference shown" where the intervals of the
        medians overlap, or that of the ratio reaches 1, or within a tenth of it, or what the
        machine's own pace did; else "B is faster" or "B is slower".

    Raises:
        InputError: they asked different things, or different models.
    """
    for key in ("model", "text_tokens", "prompt_tokens"):
        if a[key] != b[key]:
            raise InputError(
                f"compare: found {key.replace('_', ' ')} {a[key]} and {b[key]}, expected the same: "
                "these reports answer different questions. Measure both alike: mdf benchmark ENGINE"
            )
    explained = {"two runs of one engine differ as much": (1 / (1 + _NOISE), 1 + _NOISE)}
    if not _differences(a["machine"], b["machine"], _HARDWARE):
        _, low, high = _pace(a, b)
        explained["the machine's own pace changed as much"] = (min(1.0, low), max(1.0, high))
    return {
        "a": _identity(a),
        "b": _identity(b),
        "warnings": _warnings(a, b),
        "latency": {
            kind: {
                part: _compare_part(a["latency"][kind], b["latency"][kind], part, explained)
                for part in _PARTS
            }
            for kind in KIND_NAMES
        },
        "memory": {
            key: [report["memory"][key] for report in (a, b)]
            for key in ("peak_host_bytes", "peak_device_bytes")
        },
    }


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Lay a comparison out for a terminal."""
    lines = []
    for letter in ("a", "b"):
        found = comparison[letter]
        lines.append(
            f"{letter.upper()}  {found['model']} {found['precision']} on {found['device']} "
            f"({found['card']}), {found['date']}, manifest {found['manifest_sha256'][:12]}"
        )
        if found["notice"]:
            lines.append(f"   NOTICE  {found['notice']}")
    lines += [f"WARNING  {warning}" for warning in comparison["warnings"]]
    for kind, name in KIND_NAMES.items():
        for part, words in _PARTS.items():
            found = comparison["latency"][kind][part]
            medians = " and ".join(
                f"{median['p50_ms']:.2f} ms ({describe_interval(median['p50_interval_ms'])})"
                for median in (found["a"], found["b"])
            )
            lines += [
                f"{name}{words}: {medians}",
                f"   B / A {found['ratio']:.3f} ({describe_interval(found['interval'])}): "
                f"{found['verdict']}",
            ]
    for key, sizes in comparison["memory"].items():
        if None not in sizes:
            words = key.removesuffix("_bytes").replace("_", " ")
            lines.append(f"{words} memory: {' and '.join(map(describe_bytes, sizes))}")
    return "\n".join(lines)


def _identity(report: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("model", "precision", "device", "card", "backend", "date", "manifest_sha256", "notice")
    return {key: report[key] for key in keys}


def _compare_part(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    part: str,
    explained: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    one, other = (times if part == "whole" else times["without_image"] for times in (a, b))
    key = "samples_ms" if part == "whole" else "without_image_samples_ms"
    ratio, low, high = ratio_interval(rounds_of(b, key), rounds_of(a, key))
    intervals = (one["p50_rounds_interval_ms"], other["p50_rounds_interval_ms"])
    reasons = [words for words, ratios in explained.items() if overlap((low, high), ratios)]
    if overlap(*intervals) or low <= 1 <= high:
        verdict = NO_DIFFERENCE
    elif reasons:
        verdict = f"{NO_DIFFERENCE}, {reasons[0]}"
    else:
        verdict = "B is slower" if ratio > 1 else "B is faster"
    return {
        "a": {"p50_ms": one["p50_ms"], "p50_interval_ms": intervals[0]},
        "b": {"p50_ms": other["p50_ms"], "p50_interval_ms": intervals[1]},
        "ratio": ratio,
        "interval": [low, high],
        "verdict": verdict,
    }


def _pace(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float, float]:
    """How many times as long the same plain work took in B's run as in A's, with its interval."""
    return ratio_interval(rounds_of(b["pace"]), rounds_of(a["pace"]))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{name}: {a[name]} and {b[name]}" for name in names if a[name] != b[name]]


def _warnings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    found = [f"different {words}" for words in _differences(a, b, _CONDITIONS)]
    machines = _differences(a["machine"], b["machine"], _MACHINE)
    found += [f"different machine, {words}" for words in machines]
    pace, low, high = _pace(a, b)
    if abs(pace - 1) > _NOISE:
        found.append(
            f"the machine's own pace: the same plain work took {pace:.2f} times as long "
            f"({low:.2f} to {high:.2f}) in B's run as in A's"
        )
    for letter, report in (("A", a), ("B", b)):
        state = report["card_state"]
        if state is not None and state["throttled_by"]:
            found.append(f"{letter}'s card was slowed down by {', '.join(state['throttled_by'])}")
    return found

"""A certificate in, lines for people out."""

from collections.abc import Callable, Mapping
from typing import Any

from mdf_sdk.manifest import BLOCKS

Document = Mapping[str, Any]
_MOST_FAULTS = 20


def format_parity(document: Document) -> str:
    """Lay a certificate out for a terminal: the verdict, every check in a line, every fault."""
    lines = [f"{document['verdict'].upper()}  {describe_subject(document)}"]
    fault = document["first_fault"]
    if fault is not None:
        lines.append(f"first at fault: {fault['check']}, {describe_fault(fault)}")
    lines.append("")
    lines += [
        f"{check['name']:14s} {'ok' if check['ok'] else 'FAIL':5s} {describe_check(check)}"
        for check in document["checks"]
    ]
    faults = [(c["name"], fault) for c in document["checks"] for fault in c["faults"]]
    if faults:
        lines += ["", f"{len(faults)} faults:"]
        lines += [f"  {name}: {describe_fault(fault)}" for name, fault in faults[:_MOST_FAULTS]]
        if len(faults) > _MOST_FAULTS:
            lines.append("  ... all are in the certificate")
    return "\n".join([*lines, "", *describe_proof(document)])


def describe_check(check: Mapping[str, Any]) -> str:
    """Say in a line what a check has measured."""
    results, name = check["results"], check["name"]
    if not results:
        return "could not be measured"
    if name in BLOCKS:
        return _describe_block(results)
    return _DESCRIBE[name](results)


def describe_subject(document: Document) -> str:
    """Say what was compared with what."""
    engine, data = document["engine"], document["data"]
    return (
        f"{engine['model']} {engine['precision']} on {engine['device']} against its checkpoint "
        f"{document['reference']['sha256'][:12]} in PyTorch float32, {data['cases']} cases of "
        f"{data['name']}"
    )


def describe_fault(fault: Mapping[str, Any]) -> str:
    """Say where a fault is, what was found and what expected."""
    return f"{fault['where']}: found {fault['found']}, expected {fault['expected']}"


def describe_off(value: float | None) -> str:
    """Write a difference; None, as JSON has it, is one that is not finite."""
    if value is None or value == float("inf"):
        return "NaN or infinity"
    return "0" if value == 0 else f"{value:.1e}"


def describe_proof(document: Document) -> list[str]:
    """Say what the data can prove, and what not."""
    results = document["checks"][-1]["results"]
    if not results:
        return ["Nothing of the decisions: there are no scores."]
    bound, proof = results["flip_bound"], results["noninferiority"]
    three = (
        f" (rule of three: 3 / {bound['n']} = {bound['rule_of_three']:.2g})"
        if bound["rule_of_three"] is not None
        else ""
    )
    lines = [
        f"Flips: {bound['flips']} in {bound['n']} cases, which bounds their rate at "
        f"{bound['upper']:.4f}{three}, one-sided, {bound['confidence']:.4g} confidence. Nothing "
        "smaller can be claimed of these data.",
        f"A margin of {proof['margin']:g} needs at least {proof['cases_needed_without_flips']} "
        f"cases even if no label differs; exact McNemar p = {results['mcnemar_p']:.3g}.",
    ]
    data = document["data"]
    if data["patients"] < data["cases"]:
        lines.append(
            f"The {data['cases']} cases are of {data['patients']} patients: the margin must also "
            "hold when whole patients are drawn, and the flip bound takes cases for independent."
        )
    return lines


def _rank(value: float | None) -> float:
    """A number to compare: what is not finite, None in JSON, is larger than all."""
    return float("inf") if value is None else value


def _describe_block(results: Mapping[str, Any]) -> str:
    outputs = results["outputs"]
    worst = max(outputs, key=lambda name: _rank(outputs[name]["relative_l2"]))
    words = (
        f"{results['precision']}: {worst} off by {describe_off(outputs[worst]['relative_l2'])} "
        f"of {results['tolerance']:g} allowed"
    )
    constants = results["constants"]
    if constants:
        total = sum(kind["n"] for kind in constants.values())
        gain = max((_rank(kind["gain_off_1"]) for kind in constants.values()), default=0.0)
        words += f"; {total} constants, gains within {describe_off(gain)} of 1"
    return words


def _describe_preprocessing(r: Mapping[str, Any]) -> str:
    off = max(_rank(r[name]) for name in ("tower_max_abs", "unet_max_abs", "embeddings_max_abs"))
    pixels = "bit for bit the same" if off == 0 else f"{describe_off(off)} at most off"
    return f"pixels and embeddings {pixels}; tokens of {r['texts']} texts and of all labels"


def _describe_golden(r: Mapping[str, Any]) -> str:
    return (
        f"what `mdf verify` goes by: {r['cases']} cases off by {describe_off(r['relative_l2'])} of "
        f"{r['tolerance']:g} allowed"
    )


def _describe_sensitivity(r: Mapping[str, Any]) -> str:
    shifts = [
        f"{name.replace('_', ' ')} {pair['engine_shift_nats']:.3g} "
        f"({pair['reference_shift_nats']:.3g})"
        for name, pair in r["controls"].items()
    ]
    return f"margins move, in nats, reference's in brackets: {', '.join(shifts)}"


def _describe_scores(r: Mapping[str, Any]) -> str:
    kl, shift = r["kl_nats"]["value"], r["margin_shift_nats"]
    before, after = (
        r["calibration"][name]["expected_calibration_error"] for name in ("reference", "engine")
    )
    return (
        f"KL {kl:.2e} nats; margins move by {shift['mean_abs']:.2e} on average, "
        f"{shift['max_abs']:.2e} at most; calibration error {before:.4f}, then {after:.4f}"
    )


def _describe_decisions(r: Mapping[str, Any]) -> str:
    proof, difference = r["noninferiority"], r["accuracy_difference"]
    low, high = difference["newcombe_interval_95"]
    shown = "shown" if proof["shown"] else "NOT shown"
    return (
        f"same label in {r['agreement']['correct']} of {r['agreement']['n']}; accuracy "
        f"{difference['value']:+.4f} ({low:+.4f} to {high:+.4f}); at most {proof['margin']:g} "
        f"worse: {shown}, p = {proof['p']:.2g}"
    )


_DESCRIBE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "preprocessing": _describe_preprocessing,
    "golden": _describe_golden,
    "sensitivity": _describe_sensitivity,
    "scores": _describe_scores,
    "decisions": _describe_decisions,
}

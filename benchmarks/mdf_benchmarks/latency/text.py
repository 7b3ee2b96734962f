"""A benchmark's report in, lines for people out."""

from collections.abc import Mapping, Sequence
from typing import Any

KIND_NAMES = {"new_image": "new image", "same_image_new_text": "same image, new text"}


def format_report(report: Mapping[str, Any]) -> str:
    """Lay a report out as tables for a terminal."""
    lines = [*_heading(report), "", *_latency(report), "", *_sweeps(report), "", *_memory(report)]
    lines += ["", *_floor(report["floor"])]
    if report["peers"]:
        lines += ["", *_peers(report["peers"])]
    return "\n".join(lines)


def describe_bytes(size: int | None) -> str:
    """Write a size in MB or GB."""
    if size is None:
        return "not told"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def describe_interval(interval: Sequence[float | None]) -> str:
    """Write an interval; an open end is said."""
    low, high = ("?" if end is None else f"{end:.2f}" for end in interval)
    return f"{low} to {high}"


def describe_peer(peer: Mapping[str, Any]) -> str:
    """Say what became of a peer that has no times."""
    return f"{peer['status'].replace('_', ' ')}: {peer['reason']}"


def _heading(report: Mapping[str, Any]) -> list[str]:
    machine, cold = report["machine"], report["cold_start"]
    lines = [
        f"{report['card']}, {machine['cores']} cores, {describe_bytes(machine['memory_bytes'])}, "
        f"{report['backend']} on {report['device']}, {report['date']}",
        f"{report['model']} {report['precision']}, {describe_bytes(report['size_bytes'])}, "
        f"loaded in {report['load_ms']:.0f} ms; prompts of {report['prompt_tokens']} tokens, "
        f"{report['text_tokens']} of them clinical text",
        f"cold start {cold['total_ms']:.0f} ms: python {cold['python_ms']:.0f}, imports "
        f"{cold['imports_ms']:.0f}, load and checks {cold['load_ms']:.0f}, first prediction "
        f"{cold['first_prediction_ms']:.0f}",
    ]
    return [f"NOTICE  {report['notice']}", *lines] if report["notice"] else lines


def _latency(report: Mapping[str, Any]) -> list[str]:
    head = f"{'ms':24s}{'p50':>9s}{'95 % interval':>19s}{'p90':>9s}{'p95':>9s}{'p99':>9s}"
    lines = [head + f"{'min':>9s}{'n':>8s}"]
    for kind, times in report["latency"].items():
        lines.append(_row(KIND_NAMES[kind], times))
        lines.append(_row("  without the photograph", times["without_image"]))
        lines += [
            _row(f"  {stage}", found)
            for stage, found in report["stages"][kind].items()
            if stage != "total" and found["p99_ms"] > 0
        ]
    decoding, pace = report["decode_and_square"], report["pace"]
    lines.append(_row(f"JPEG of {decoding['side_px']} px, squared", decoding))
    return [*lines, _row("machine's own pace", pace)]


def _row(name: str, times: Mapping[str, Any]) -> str:
    shown = describe_interval(times.get("p50_rounds_interval_ms", times["p50_interval_ms"]))
    figures = "".join(f"{times[f'{key}_ms']:9.2f}" for key in ("p90", "p95", "p99", "min"))
    return f"{name:24s}{times['p50_ms']:9.2f}{shown:>19s}{figures}{times['n']:8d}"


def _sweeps(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{'':24s}{'p50 ms':>9s}{'p99 ms':>9s}{'per s':>9s}"]
    for name, key in (("batch", "batches"), ("callers", "callers")):
        for entry in report[key]:
            size = entry["batch"] if key == "batches" else entry["callers"]
            row = f"{entry['p50_ms']:9.2f}{entry['p99_ms']:9.2f}{entry['per_s']:9.1f}"
            lines.append(f"{f'{name} {size}':24s}{row}")
    return lines


def _memory(report: Mapping[str, Any]) -> list[str]:
    memory, state = report["memory"], report["card_state"]
    lines = [
        f"{where} memory: peak {describe_bytes(memory[f'peak_{where}_bytes'])}, steady "
        f"{describe_bytes(memory[f'steady_{where}_bytes'])}, peak after sweeps "
        f"{describe_bytes(memory[f'peak_after_sweeps_{where}_bytes'])}"
        for where in ("host", "device")
        if where == "host" or report["device"] != "cpu"
    ]
    if state is not None:
        energy = state["energy_j_per_prediction"]
        lines.append(
            f"card: {'energy not told' if energy is None else f'{energy:.2f} J a prediction'}, "
            f"median {state['median_power_w']} W, {state['median_sm_clock_mhz']} MHz, "
            f"at most {state['most_temperature_c']} C, slowed down in "
            f"{state['throttled_share']:.0%} of the samples"
            + (f" by {', '.join(state['throttled_by'])}" if state["throttled_by"] else "")
        )
    return lines


def _floor(floor: Mapping[str, Any]) -> list[str]:
    lines, rates = [], floor["rates"]
    if not rates["reason"]:
        lines.append(
            f"this machine copies {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, multiplies "
            f"{rates['product_flop_per_s'] / 1e12:.2f} TFLOP/s in {rates['product_type']} "
            f"({rates['measured_by']})"
        )
    if floor["reason"]:
        lines.append(f"floor: {floor['reason']}")
    if floor["total"] is not None:
        lines.append(
            f"{'':24s}{'p50 ms':>9s}{'floor':>9s}{'times':>9s}{'GFLOP':>10s}{'MB':>10s}  bound by"
        )
        for name, block in floor["blocks"].items():
            lines.append(
                f"{name:24s}{block['p50_ms']:9.2f}{block['floor_ms']:9.3f}{block['times_floor']:9.1f}"
                f"{block['flop'] / 1e9:10.2f}{block['moved_bytes'] / 1e6:10.1f}  {block['bound']}"
            )
        total = floor["total"]
        lines.append(
            f"{'all':24s}{total['p50_ms']:9.2f}{total['floor_ms']:9.3f}{total['times_floor']:9.1f}"
        )
    return lines


def _peers(peers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "times as long as the engine (95 % interval), without preparing the photograph",
        f"{'':24s}{'new image':>40s}{'same image, new text':>40s}{'device':>12s}",
    ]
    for peer in peers:
        if peer["status"] != "ok":
            lines.append(f"{peer['name']:24s}{describe_peer(peer)}")
            continue
        cells = ""
        for kind in KIND_NAMES:
            found = peer["ratios"][kind]["without_image"]
            ms = peer["latency"][kind]["without_image"]["p50_ms"]
            cell = f"{ms:.2f} ms, {found['ratio']:.2f} ({describe_interval(found['interval'])})"
            cells += f"{cell:>40s}"
        held = peer["peak_device_bytes"] or peer["peak_host_bytes"]
        lines.append(f"{peer['name']:24s}{cells}{describe_bytes(held):>12s}")
        lines.append(
            f"  {peer['model']}, {peer['weights']} weights{'' if peer['unet'] else WITHOUT_UNET}"
        )
    return lines


WITHOUT_UNET = ", without the U-Net: less work than ours"

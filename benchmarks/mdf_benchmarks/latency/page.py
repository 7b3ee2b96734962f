"""A benchmark's report in, one HTML page out that needs nothing else: plots inside, print-ready."""

from collections.abc import Mapping
from typing import Any

from mdf_benchmarks.html import Markup, fill, to_document, to_note, to_section, to_table
from mdf_benchmarks.latency import plots
from mdf_benchmarks.latency.text import (
    KIND_NAMES,
    WITHOUT_UNET,
    describe_bytes,
    describe_interval,
    describe_peer,
)


def format_page(report: Mapping[str, Any]) -> str:
    """Write the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    name = f"{report['model']} {report['precision']}"
    return to_document(
        f"{name}: benchmark",
        fill("<h1>{}</h1>", f"{name} on {report['card']}"),
        to_note(f"{report['backend']} on {report['device']}, {report['date']}, mdf benchmark"),
        fill('<p class="banner warn"><b>{}</b></p>', report["notice"]) if report["notice"] else "",
        _figures(report),
        to_section("Latency", plots.plot_distribution(report), _latency(report)),
        to_section("Stages of a new photograph", plots.plot_waterfall(report), _stages(report)),
        to_section("Distance to the floor", *_floor(report)),
        to_section("Rivals", *_peers(report)) if report["peers"] else "",
        to_section("Memory over time", plots.plot_memory(report), _memory(report)),
        to_section("Batches and callers", plots.plot_sweeps(report), _sweeps(report)),
        to_section("Machine", _machine(report)),
        to_section("How it was measured", *_method(report)),
    )


def _figures(report: Mapping[str, Any]) -> Markup:
    new, kept = (report["latency"][kind] for kind in KIND_NAMES)
    memory = report["memory"]
    where = "host" if report["device"] == "cpu" else "device"
    most = max(entry["per_s"] for entry in report["callers"])
    shown = [
        (
            f"{new['p50_ms']:.2f} ms",
            f"new photograph, p50 ({describe_interval(new['p50_rounds_interval_ms'])})",
        ),
        (f"{new['without_image']['p50_ms']:.2f} ms", "the same without preparing the photograph"),
        (f"{kept['p50_ms']:.2f} ms", "same photograph, new text, p50"),
        (f"{new['p99_ms']:.2f} ms", "new photograph, p99"),
        (f"{most:.1f} per s", "predictions, several callers"),
        (describe_bytes(memory[f"peak_{where}_bytes"]), f"peak {where} memory"),
        (f"{report['cold_start']['total_ms'] / 1e3:.1f} s", "process start to first answer"),
    ]
    tiles = "".join(fill("<div><b>{}</b><span>{}</span></div>", *tile) for tile in shown)
    return fill('<div class="tiles">{}</div>', Markup(tiles))


_TIMES = ("ms", "min", "mean", "p50", "95 % interval", "p90", "p95", "p99", "95 % interval", "n")


def _times_row(name: str, times: Mapping[str, Any]) -> list[str]:
    return [
        name,
        *(f"{times[f'{key}_ms']:.2f}" for key in ("min", "mean", "p50")),
        describe_interval(times.get("p50_rounds_interval_ms", times["p50_interval_ms"])),
        *(f"{times[f'{key}_ms']:.2f}" for key in ("p90", "p95", "p99")),
        describe_interval(times["p99_interval_ms"]),
        str(times["n"]),
    ]


def _latency(report: Mapping[str, Any]) -> Markup:
    rows = []
    for kind, name in KIND_NAMES.items():
        times = report["latency"][kind]
        rows.append(_times_row(name, times))
        rows.append(_times_row("– without preparing the photograph", times["without_image"]))
    decoding = report["decode_and_square"]
    rows.append(_times_row(f"decoding and squaring a JPEG of {decoding['side_px']} px", decoding))
    rows.append(
        _times_row("the machine's own pace: the same plain work, each turn", report["pace"])
    )
    return to_table(_TIMES, rows)


def _stages(report: Mapping[str, Any]) -> Markup:
    stages = report["stages"]["new_image"]
    return to_table(_TIMES, [_times_row(name, times) for name, times in stages.items()])


def _floor(report: Mapping[str, Any]) -> list[str]:
    floor, rates = report["floor"], report["floor"]["rates"]
    parts: list[str] = []
    if floor["total"] is not None:
        parts.append(plots.plot_floor(report))
        rows = [
            [
                name,
                f"{block['flop'] / 1e9:.2f}",
                f"{block['moved_bytes'] / 1e6:.1f}",
                f"{block['bytes_ms']:.3f}",
                f"{block['arithmetic_ms']:.3f}",
                block["bound"],
                f"{block['p50_ms']:.2f}",
                f"{block['times_floor']:.1f}",
            ]
            for name, block in floor["blocks"].items()
        ]
        total = floor["total"]
        last = [f"{total['floor_ms']:.3f} ms at least", f"{total['p50_ms']:.2f}"]
        rows.append(["all", "", "", "", "", *last, f"{total['times_floor']:.1f}"])
        head = (
            "block",
            "GFLOP",
            "MB",
            "bytes, ms",
            "arithmetic, ms",
            "bound by",
            "p50, ms",
            "p50 / floor",
        )
        parts.append(to_table(head, rows, words=(0, 5)))
        parts.append(
            to_note(
                f"In this run the machine copied {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s and "
                f"multiplied {rates['product_flop_per_s'] / 1e12:.2f} TFLOP/s in "
                f"{rates['product_type']} ({rates['measured_by']}). Operations and bytes are "
                "counted from the blocks' graphs: products, convolutions and attentions; stored "
                "weights, inputs and outputs, each once."
            )
        )
    if floor["reason"]:
        parts.append(f"No floor: {floor['reason']}")
    return parts


def _peers(report: Mapping[str, Any]) -> list[str]:
    parts: list[str] = []
    if any(peer["status"] == "ok" for peer in report["peers"]):
        parts.append(plots.plot_peers(report))
    rows: list[list[str]] = []
    for peer in report["peers"]:
        if peer["status"] != "ok":
            rows.append([peer["name"], describe_peer(peer), "", "", "", "", "", ""])
            continue
        row = [peer["name"], f"{peer['model']}; {peer['weights']} weights"]
        row[1] += "" if peer["unet"] else WITHOUT_UNET
        for kind in KIND_NAMES:
            found = peer["ratios"][kind]["without_image"]
            row.append(f"{peer['latency'][kind]['without_image']['p50_ms']:.2f}")
            row.append(f"{found['ratio']:.2f} ({describe_interval(found['interval'])})")
        held = peer["peak_device_bytes"] or peer["peak_host_bytes"]
        rows.append([*row, describe_bytes(held), f"{peer['load_ms'] / 1e3:.1f} s"])
    head = (
        "peer",
        "what it is",
        "new image, ms",
        "times the engine",
        "new text, ms",
        "times the engine",
        "peak memory",
        "load",
    )
    parts.append(to_table(head, rows, words=(0, 1)))
    parts.append(
        to_note(
            "Each in a process of its own, same photograph and text; medians, preparing the "
            "photograph left out of both. Memory is the card's where there is one: what PyTorch's "
            "allocator holds, without CUDA's own."
        )
    )
    return parts


def _memory(report: Mapping[str, Any]) -> Markup:
    memory = report["memory"]
    wheres = ("host",) if report["device"] == "cpu" else ("host", "device")
    rows = [
        [
            where,
            describe_bytes(memory[f"steady_{where}_bytes"]),
            describe_bytes(memory[f"peak_{where}_bytes"]),
            describe_bytes(memory[f"peak_after_sweeps_{where}_bytes"]),
        ]
        for where in wheres
    ]
    return to_table(("", "steady", "peak, single calls", "peak, after all sweeps"), rows)


def _sweeps(report: Mapping[str, Any]) -> Markup:
    rows = [
        [
            f"batch of {e['batch']}"
            if "batch" in e
            else f"{e['callers']} caller{'s' * (e['callers'] > 1)}",
            f"{e['p50_ms']:.2f}",
            f"{e['p99_ms']:.2f}",
            f"{e['per_s']:.1f}",
            e["n"],
        ]
        for e in (*report["batches"], *report["callers"])
    ]
    return to_table(("", "p50 of a call, ms", "p99, ms", "predictions per s", "calls"), rows)


def _machine(report: Mapping[str, Any]) -> Markup:
    machine, card, state = report["machine"], report["machine"]["card"], report["card_state"]
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("memory", describe_bytes(machine["memory_bytes"])),
        ("clock governor", machine["power_mode"] or "not told"),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("versions", ", ".join(f"{name} {v}" for name, v in machine["versions"].items())),
    ]
    if card is not None:
        rows.append(
            (
                "card",
                f"{card['name']}, {describe_bytes(card['memory_bytes'])}, driver {card['driver']}, "
                f"power limit {card['power_limit_w']} W",
            )
        )
    if state is not None:
        energy = state["energy_j_per_prediction"]
        rows += [
            ("energy", "not told" if energy is None else f"{energy:.2f} J a prediction"),
            ("power", f"{state['median_power_w']} W, at most {state['most_power_w']}"),
            (
                "clock",
                f"{state['median_sm_clock_mhz']} MHz, at least {state['least_sm_clock_mhz']}",
            ),
            ("temperature", f"at most {state['most_temperature_c']} °C"),
            (
                "slowed down",
                f"in {state['throttled_share']:.0%} of the samples "
                + ", ".join(state["throttled_by"]),
            ),
        ]
    return to_table(("", ""), rows, words=(0, 1))


_SINGLE_STREAM = "MLPerf's single stream: at least 1,024 calls, and 60 s, of new photographs"


def _method(report: Mapping[str, Any]) -> list[str]:
    cold = report["cold_start"]
    return [
        f"{'A quick run' if report['quick'] else _SINGLE_STREAM}. {report['policy']}.",
        "Percentiles by nearest rank. Intervals of 95 % from order statistics, no distribution "
        "assumed; that of a median rests on the medians of the rounds, so that it is as wide as "
        "the machine's drift. Intervals of ratios by bootstrap over rounds.",
        f"Photographs of 512 px, decoded; prompts of {report['prompt_tokens']} tokens: "
        f"{report['instruction_tokens']} of instruction, which the engine carries, and "
        f"{report['text_tokens']} of clinical text.",
        f"Cold start, files in the system's cache: python {cold['python_ms']:.0f} ms, imports "
        f"{cold['imports_ms']:.0f}, load and checks {cold['load_ms']:.0f}, first prediction "
        f"{cold['first_prediction_ms']:.0f}; the median of {cold['runs']}.",
        f"Engine: manifest {report['manifest_sha256']}.",
    ]

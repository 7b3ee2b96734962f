"""A benchmark's report in, one HTML page out that needs nothing else: plots inside, print-ready."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mdf_benchmarks.latency import plots
from mdf_benchmarks.latency.text import (
    KIND_NAMES,
    WITHOUT_UNET,
    describe_bytes,
    describe_interval,
    describe_peer,
)

_CSS = """
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #222;
  background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0; }
.soft { color: #5b6673; }
.notice { border-left: 4px solid #d9822b; background: #fdf4e7; padding: .5rem .8rem;
  margin: .8rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.6rem, 1fr));
  gap: .5rem; margin: 1rem 0; }
.figures div { border: 1px solid #d7dde3; border-radius: 6px; padding: .5rem .6rem; }
.figures b { display: block; font-size: 1.15rem; white-space: nowrap; }
.figures span { display: block; font-size: .78rem; line-height: 1.35; color: #5b6673; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; margin: .5rem 0; }
th, td { text-align: right; padding: .22rem .45rem; border-bottom: 1px solid #e3e8ed; }
td { white-space: nowrap; }
th { font-weight: 600; color: #5b6673; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.words th:nth-child(2), .words td:nth-child(2) { text-align: left; white-space: normal; }
svg { width: 100%; height: auto; display: block; }
section { break-inside: avoid; }
@media print { body { margin: 0; max-width: none; font-size: 12px; } }
"""


def format_page(report: Mapping[str, Any]) -> str:
    """Write the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    name = f"{report['model']} {report['precision']}"
    parts = [
        f"<h1>{escape(name)} on {escape(report['card'])}</h1>",
        f'<p class="soft">{escape(report["backend"])} on {escape(report["device"])}, '
        f"{escape(report['date'])}, mdf benchmark</p>",
        f'<p class="notice"><b>{escape(report["notice"])}</b></p>' if report["notice"] else "",
        _figures(report),
        _section("Latency", plots.plot_distribution(report), _latency(report)),
        _section("Stages of a new photograph", plots.plot_waterfall(report), _stages(report)),
        _section("Distance to the floor", *_floor(report)),
        _section("Rivals", *_peers(report)) if report["peers"] else "",
        _section("Memory over time", plots.plot_memory(report), _memory(report)),
        _section("Batches and callers", plots.plot_sweeps(report), _sweeps(report)),
        _section("Machine", _machine(report)),
        _section("How it was measured", _method(report)),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: benchmark</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], *, words: bool = False) -> str:
    """Lay out a table; `words` lets the second column be long."""

    def cells(tag: str, row: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row) + "</tr>"

    kind = ' class="words"' if words else ""
    lines = [cells("th", head), *(cells("td", row) for row in rows)]
    return f"<table{kind}>" + "\n".join(lines) + "</table>"


def _figures(report: Mapping[str, Any]) -> str:
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
    tiles = "".join(f"<div><b>{escape(b)}</b><span>{escape(s)}</span></div>" for b, s in shown)
    return f'<div class="figures">{tiles}</div>'


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


def _latency(report: Mapping[str, Any]) -> str:
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
    return _table(_TIMES, rows)


def _stages(report: Mapping[str, Any]) -> str:
    stages = report["stages"]["new_image"]
    return _table(_TIMES, [_times_row(name, times) for name, times in stages.items()])


def _floor(report: Mapping[str, Any]) -> list[str]:
    floor, parts = report["floor"], []
    rates = floor["rates"]
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
        parts.append(_table(head, rows))
        parts.append(
            f'<p class="soft">In this run the machine copied '
            f"{rates['copy_bytes_per_s'] / 1e9:.1f} GB/s and multiplied "
            f"{rates['product_flop_per_s'] / 1e12:.2f} TFLOP/s in {rates['product_type']} "
            f"({escape(rates['measured_by'])}). Operations and bytes are counted from the blocks' "
            "graphs: products, convolutions and attentions; stored weights, inputs and outputs, "
            "each once.</p>"
        )
    if floor["reason"]:
        parts.append(f"<p>No floor: {escape(floor['reason'])}</p>")
    return parts


def _peers(report: Mapping[str, Any]) -> list[str]:
    parts = []
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
    parts.append(_table(head, rows, words=True))
    parts.append(
        '<p class="soft">Each in a process of its own, same photograph and text; medians, '
        "preparing the photograph left out of both. Memory is the card's where there is one: what "
        "PyTorch's allocator holds, without CUDA's own.</p>"
    )
    return parts


def _memory(report: Mapping[str, Any]) -> str:
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
    return _table(("", "steady", "peak, single calls", "peak, after all sweeps"), rows)


def _sweeps(report: Mapping[str, Any]) -> str:
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
    return _table(("", "p50 of a call, ms", "p99, ms", "predictions per s", "calls"), rows)


def _machine(report: Mapping[str, Any]) -> str:
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
    return _table(("", ""), rows, words=True)


_SINGLE_STREAM = "MLPerf's single stream: at least 1,024 calls, and 60 s, of new photographs"


def _method(report: Mapping[str, Any]) -> str:
    cold = report["cold_start"]
    lines = [
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
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)

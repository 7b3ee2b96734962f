"""`mdf scaling`: a preset in, what a training step costs on these processes out."""

import argparse
import json
from typing import Any

from mdf_sdk.errors import DeviceMemoryError
from mdf_sdk.extras import import_extra
from mdf_training.arguments import add_json


def add_scaling(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf scaling --preset P [--steps N] [--batch-size N]`."""
    parser = commands.add_parser(
        "scaling", help="memory, speed and FLOP utilization of training steps, under torchrun too"
    )
    parser.add_argument("--preset", required=True, help="nano, smol-135m or llama-3.2-11b")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument(
        "--batch-size", type=int, help="cases per step, of all processes; the recipe's if left out"
    )
    add_json(parser)
    parser.set_defaults(run=run_scaling)


def run_scaling(args: argparse.Namespace) -> int:
    """Measure, and let the first process print."""
    processes = import_extra("mdf_training.distributed", "training").Processes.join()
    scaling = import_extra("mdf_training.scaling", "training")
    try:
        report = scaling.measure_scaling(
            args.preset, processes, steps=args.steps, batch_size=args.batch_size
        )
    except RuntimeError as error:  # of a card, and of a processor, which PyTorch has no class for
        said = str(error)
        if "out of memory" not in said and "can't allocate memory" not in said:
            raise
        raise DeviceMemoryError(
            f"found too little memory on {processes.device} for a step of {args.preset} "
            f"({said.splitlines()[0]}), expected enough. Try a smaller batch: --batch-size 1"
        ) from None
    if processes.is_main:
        print(format_scaling(report))
        if args.json:
            print(json.dumps(report))
    processes.leave()
    return 0


def format_scaling(report: dict[str, Any]) -> str:
    """Lay `measure_scaling`'s result out for people."""
    peaks = [peak for peak in report["peak_bytes_per_process"] if peak is not None]
    memory = f"{max(peaks) / 1e9:.1f} GB at most" if peaks else "not measured on the CPU"
    low, high = report["step_ms_range"]
    return "\n".join(
        [
            f"{report['preset']}, {report['parameters'] / 1e6:.1f} million parameters, on "
            f"{report['processes']} x {report['device']}",
            f"step        {report['step_ms_p50']:.1f} ms (p50; {low:.1f} to {high:.1f}), "
            f"{report['batch_size']} cases",
            f"speed       {report['cases_per_s']:.2f} cases/s, "
            f"{report['language_tokens_per_s']:.0f} language and "
            f"{report['vision_tokens_per_s']:.0f} vision tokens/s",
            f"memory      {memory} for each process",
            f"utilization {report['model_flop_utilization']:.3f} of "
            f"{report['product_flops_per_s'] / 1e12:.2f} TFLOP/s in a large product",
        ]
    )

"""`mdf ablate`: studies, a preset and data in, a table, a plot and a JSON document of each out."""

import argparse
import json
import shlex
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mdf_sdk.extras import import_extra
from mdf_sdk.machine import machine_card
from mdf_training.arguments import add_json, names

PACKAGES = ("mdf-mllm", "torch", "transformers", "numpy")


def add_ablate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `mdf ablate --study NAME,... --preset P --data DATA --test DATA --out DIR`."""
    from mdf_training.ablation.studies import STUDIES

    parser = commands.add_parser(
        "ablate", help="train variants of the model over seeds and compare them"
    )
    parser.add_argument(
        "--study",
        type=names,
        required=True,
        metavar="NAME,...",
        help=f"of {', '.join(STUDIES)}; runs that several need are done once",
    )
    parser.add_argument("--preset", required=True, help="nano, smol-135m or llama-3.2-11b")
    parser.add_argument(
        "--data", required=True, help="folder with labels.csv, or synthetic:COUNT:SEED"
    )
    parser.add_argument(
        "--test", metavar="DATA", help="unseen cases; the part test of --split when left out"
    )
    parser.add_argument(
        "--split", type=Path, metavar="FILE", help="CSV file of mdf split: train, validation, test"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new, or of a study to go on with"
    )
    parser.add_argument("--seeds", type=_seeds, default=(0, 1, 2), help="default 0,1,2")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs side by side, over all CUDA devices; one of smol-135m takes some 24 GB there",
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="of each run: one for a CUDA device"
    )
    parser.add_argument("--epochs", type=int, help="the preset's own number when left out")
    parser.add_argument("--labels", type=names, metavar="A,B,...", help="as for mdf train")
    parser.add_argument("--mask-kinds", type=names, metavar="A,B,...", help="as for mdf train")
    parser.add_argument("--unet-weights", type=Path, metavar="FILE", help="as for mdf train")
    parser.add_argument("--backbone", type=Path, metavar="DIR", help="as for mdf train")
    add_json(parser)
    parser.set_defaults(run=run_ablate)


def run_ablate(args: argparse.Namespace) -> int:
    """Run the studies, write and print their tables; 1 where a run failed."""
    ablation = import_extra("mdf_training.ablation.runs", "training")
    report = import_extra("mdf_training.ablation.report", "training")
    plot_study = import_extra("mdf_training.ablation.plots", "training").plot_study
    from mdf_training.ablation.studies import find_studies

    studies = find_studies(args.study)
    setting = ablation.Setting(
        preset=args.preset,
        data=args.data,
        test=args.test,
        split=args.split,
        epochs=args.epochs,
        labels=args.labels,
        mask_kinds=args.mask_kinds,
        unet_weights=args.unet_weights,
        backbone=args.backbone,
    )
    start = time.monotonic()
    runs = ablation.ablate(
        studies, setting, args.seeds, args.out, jobs=args.jobs, processes=args.processes
    )
    shared = _document(args, time.monotonic() - start) | {"devices": ablation.devices(runs)}
    documents = []
    for study in studies:
        document = shared | report.report_study(study, runs)
        text = report.format_study(document)
        plot_study(document, args.out / f"{study.name}.png", losses=study.name == "policy")
        (args.out / f"{study.name}.md").write_text(text + _origin(document), encoding="utf-8")
        ablation.write_json(args.out / f"{study.name}.json", document)
        print(text)
        documents.append(document)
    print(f"written to {args.out}")
    if args.json:
        print(json.dumps({"studies": documents}, allow_nan=False))
    return 0 if all(run.finished for run in runs) else 1


def _document(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Say what was run, where, when and for how long."""
    return {
        "command": shlex.join(["mdf", "ablate", *_words(args)]),
        "preset": args.preset,
        "data": args.data,
        "test": args.test or f"part test of {args.split}",
        "seeds": list(args.seeds),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": machine_card(PACKAGES),
    }


def _words(args: argparse.Namespace) -> list[str]:
    """Write the options down again, those that were left out too where they have a default."""
    words = []
    for name, value in vars(args).items():
        if value is None or name in ("command", "run", "json"):
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return words


def _origin(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return (
        f"\n![plot]({document['study']}.png)\n\n    {document['command']}\n\n"
        f"{document['seconds']} s on {machine['cores']} cores of {machine['cpu']}, runs on "
        f"{', '.join(document['devices'])}, {document['date'][:10]}; {versions}.\n"
    )


def _seeds(words: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(word) for word in words.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(
            f"found {words!r}, expected distinct numbers of 0 or more, such as 0,1,2"
        )
    return seeds

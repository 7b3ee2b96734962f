"""One run of a study, in a process of its own: the run.json of a directory in, its report out."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mdf_sdk.machine import cpu_name
from mdf_training.ablation.runs import HISTORY, PREDICTIONS, REPORT, RUN, write_json
from mdf_training.config import FusionConfig, to_tuples
from mdf_training.data.folder import open_data
from mdf_training.data.splits import TEST
from mdf_training.distributed import Processes
from mdf_training.evaluation.cnn import train_cnn
from mdf_training.evaluation.evaluate import evaluate_cases, open_scorer
from mdf_training.evaluation.predictions import save_predictions
from mdf_training.recipes import Recipe
from mdf_training.trainer import TRAINER, train


def run(folder: Path) -> None:
    """Train and evaluate what run.json says; what an interrupted run left is gone on with.

    The checkpoint goes once it is evaluated: the same settings make it again.
    """
    plan = json.loads((folder / RUN).read_text(encoding="utf-8"))
    settings, read = plan["settings"], plan["read"]
    checkpoint = folder / "checkpoint"
    start = time.monotonic()
    processes = Processes.join()
    if not (folder / HISTORY).exists():
        provenance = _train(settings, read, checkpoint)
        if processes.is_main:
            write_json(folder / HISTORY, provenance["history"])
    processes.leave()
    if not processes.is_main:
        return
    trained = time.monotonic()
    part = {} if read["test"] else {"split": read["split"], "part": TEST}
    data = open_data(read["test"] or read["data"], settings["labels"], **part)
    scorer = open_scorer(checkpoint)
    evaluation = evaluate_cases(scorer, data)
    save_predictions(folder / PREDICTIONS, scorer.labels, data, evaluation.scores)
    report = evaluation.report
    report["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    report["seconds"] = {
        "train": round(trained - start, 1),
        "evaluate": round(time.monotonic() - trained, 1),
    }
    write_json(folder / REPORT, report)
    shutil.rmtree(checkpoint)


def _train(
    settings: Mapping[str, Any], read: Mapping[str, str | None], checkpoint: Path
) -> dict[str, Any]:
    recipe = Recipe.from_dict(settings["recipe"])
    assert read["data"] is not None
    where = settings["preset"], read["data"], checkpoint
    if settings["model"] == "cnn":
        return train_cnn(
            *where,
            recipe=recipe,
            labels=settings["labels"],
            split=read["split"],
            unet_weights=read["unet_weights"],
        )
    return train(
        *where,
        recipe=recipe,
        fusion=FusionConfig(**to_tuples(settings["fusion"])),
        resume=(checkpoint / TRAINER).exists(),
        labels=settings["labels"],
        mask_kinds=settings["mask_kinds"],
        split=read["split"],
        unet_weights=read["unet_weights"],
        backbone=read["backbone"],
    )


def _end_with_parent() -> None:
    """End this process when its standard input does: the study that started it is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    run(Path(sys.argv[1]))

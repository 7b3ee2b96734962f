"""Studies and seeds in, one training run for each variant and seed, their results out.

A run is a process of its own (`single_run`) and a directory, OUT/VARIANT-seedN:

    run.json         what it was started with; a directory with other settings is refused
    log.txt          what the process said
    history.json     the losses of every epoch, once it is trained
    predictions.csv  the scores of every unseen case
    report.json      evaluate's report, written last: a directory that has it is finished

A study that was interrupted goes on when it is given again: finished runs are kept, others resume
after the last epoch that they saved. Variants of equal settings, in whatever studies, share a run.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from mdf_sdk.errors import DataError, InputError, StorageError
from mdf_sdk.extras import import_extra
from mdf_training.ablation.studies import STUDIES, Study, Variant
from mdf_training.config import load_preset, set_task
from mdf_training.data.cases import DataSet
from mdf_training.data.folder import open_data
from mdf_training.data.splits import TEST, describe_split
from mdf_training.recipes import RECIPES

PACKAGES = ("mdf-mllm", "torch", "transformers", "segmentation-models-pytorch")
RUN, LOG, HISTORY = "run.json", "log.txt", "history.json"
PREDICTIONS, REPORT = "predictions.csv", "report.json"
POLL_S, STOP_S = 0.05, 10.0


@dataclass(frozen=True)
class Setting:
    """What all runs of a study share.

    Attributes:
        preset: "nano", "smol-135m" or "llama-3.2-11b".
        data: folder with labels.csv, or "synthetic:COUNT:SEED".
        test: unseen cases, likewise; None: the part "test" of `split`.
        split: CSV file that gives every file of `data` its part.
        epochs: the recipe's own when None.
        labels, mask_kinds: the preset's own when None.
        unet_weights: file of ImageNet weights that U-Net encoder and CNN start from.
        backbone: Hugging Face directory that the backbone starts from.
    """

    preset: str
    data: str
    test: str | None = None
    split: Path | None = None
    epochs: int | None = None
    labels: tuple[str, ...] | None = None
    mask_kinds: tuple[str, ...] | None = None
    unet_weights: Path | None = None
    backbone: Path | None = None


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        variants: the names of all variants that this run serves.
        folder: its directory.
        settings: JSON types; what decides its result.
    """

    variants: frozenset[str]
    seed: int
    folder: Path
    settings: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        return (self.folder / REPORT).exists()


def ablate(
    studies: Sequence[Study],
    setting: Setting,
    seeds: Sequence[int],
    out: Path,
    *,
    jobs: int = 1,
    processes: int = 1,
    command: Callable[[Path, int], list[str]] | None = None,
    tell: Callable[[str], None] = print,
) -> list[Run]:
    """Run what is not yet finished; return every run, failed ones too.

    Args:
        studies: runs that several of them need are done once.
        setting: what the runs share.
        seeds: one run of every variant for each.
        out: directory; what a former call left there is gone on with.
        jobs: runs side by side, spread over the CUDA devices where there are any.
        processes: of each run, under torchrun where there is more than one.
        command: the words that start the run in a directory; this module's own when left out.
        tell: is told of every run that ends.

    Raises:
        InputError: `out` holds a run of other settings.
        DataError: the data cannot be used, or test patients are among those trained on.
        StorageError: `out` cannot be made.
    """
    if jobs < 1 or processes < 1:
        raise InputError(f"jobs, processes: found {jobs} and {processes}, expected 1 or more")
    runs = plan_runs(studies, setting, seeds, out)
    for run in runs:
        _check_settings(run)
    for run in runs:
        _drop_useless(run)
    waiting = [run for run in runs if not run.finished]
    if not waiting:
        return runs
    groups = device_groups(processes)
    read = _places(setting)
    for run in waiting:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{run.folder}: {error.strerror}, expected a directory that can be made. Choose "
                "another --out"
            ) from None
        write_json(run.folder / RUN, {"settings": run.settings, "read": read})
    start, done = time.monotonic(), len(runs) - len(waiting)
    with closing(_run_all(waiting, jobs, processes, groups, command or run_command)) as ended:
        for run in ended:
            done += 1
            word = _accuracy(run) if run.finished else f"failed: {failure(run)}"
            tell(
                f"{done} of {len(runs)}, {time.monotonic() - start:.0f} s: {run.folder.name} {word}"
            )
    return runs


def plan_runs(
    studies: Sequence[Study], setting: Setting, seeds: Sequence[int], out: Path
) -> list[Run]:
    """List the runs, those of the first seed first; variants of equal settings share one.

    A run has the name of the first variant of all studies that has its settings, so the name does
    not depend on the studies asked for.
    """
    shared = _shared_settings(setting)
    variants = {v.name: v for study in STUDIES.values() for v in study.variants}
    variants |= {v.name: v for study in studies for v in study.variants}
    asked = {v.name for study in studies for v in study.variants}
    runs = []
    for seed in seeds:
        equal: dict[str, list[str]] = {}
        for variant in variants.values():
            key = json.dumps(_settings(variant, setting, seed) | shared, sort_keys=True)
            equal.setdefault(key, []).append(variant.name)
        runs += [
            Run(frozenset(names), seed, out / f"{names[0]}-seed{seed}", json.loads(key))
            for key, names in equal.items()
            if asked & set(names)
        ]
    return runs


def run_command(folder: Path, processes: int) -> list[str]:
    """Return the words that start the run in `folder`."""
    words = ["-m", "mdf_training.ablation.single_run", str(folder)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        words = [*torchrun, f"--nproc-per-node={processes}", *words]
    return [sys.executable, *words]


def device_groups(processes: int) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES for the runs to take in turn; nothing where there is no device.

    Raises:
        InputError: fewer devices than a run has processes.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = import_extra("torch", "training").cuda.device_count()
        devices = [str(i) for i in range(count)]
    else:
        devices = [name.strip() for name in visible.split(",") if name.strip()]
    if devices and len(devices) < processes:
        raise InputError(
            f"processes: found {processes}, expected at most {len(devices)}, one for each CUDA "
            "device. Hide the devices by CUDA_VISIBLE_DEVICES= to run on processors."
        )
    starts = range(0, len(devices) - processes + 1, processes)
    return [",".join(devices[i : i + processes]) for i in starts]


def failure(run: Run) -> str:
    """Return the last line that a run said."""
    try:
        text = (run.folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "silent")


def _settings(variant: Variant, setting: Setting, seed: int) -> dict[str, Any]:
    """Resolve what a variant trains with."""
    config = load_preset(setting.preset)
    recipe = replace(RECIPES[config.preset], **{**variant.recipe, "seed": seed})
    if setting.epochs is not None:
        recipe = replace(recipe, epochs=setting.epochs)
    fusion = replace(config.fusion, **variant.fusion)
    return {"model": variant.model, "fusion": asdict(fusion), "recipe": asdict(recipe)}


def _shared_settings(setting: Setting) -> dict[str, Any]:
    """Say what the runs share, files by their content: a name may come to mean something else."""
    config = load_preset(setting.preset)
    labels, kinds = setting.labels or config.labels, setting.mask_kinds or config.mask_kinds
    set_task(config, labels, kinds)  # refuses what no run could use
    if setting.test is None and setting.split is None:
        raise InputError(
            "test: found nothing, expected unseen cases. Example: --test synthetic:2000:999, or "
            "--split FILE with a part named test"
        )
    data = open_data(setting.data, labels)
    if setting.test is None:
        test = open_data(setting.data, labels, split=setting.split, part=TEST)
    else:
        test = open_data(setting.test, labels)
        _check_unseen(data, test)
    return {
        "preset": config.preset,
        "labels": labels,
        "mask_kinds": kinds,
        "data": _rows(data),
        "test": _rows(test),
        "split": setting.split and describe_split(setting.split),
        "unet_weights": _describe("unet_weights", "weights", setting.unet_weights),
        "backbone": _describe("llama_weights", "backbone", setting.backbone),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _check_unseen(data: DataSet, test: DataSet) -> None:
    """Refuse test cases of patients that are trained on."""
    known = {(row.source, row.patient_id) for row in data.rows}
    both = sorted({row.patient_id for row in test.rows if (row.source, row.patient_id) in known})
    if both:
        raise DataError(
            f"test: found {len(both)} patients of the training data ({', '.join(both[:5])}), "
            "expected unseen ones. Give other cases, or split one data set by patient: mdf split"
        )


def _check_settings(run: Run) -> None:
    """Refuse a directory that holds a run of other settings."""
    path = run.folder / RUN
    if not path.exists():
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["settings"]
        different = [key for key in run.settings if saved.get(key) != run.settings[key]]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: found something else than a run's settings. Remove {run.folder}."
        ) from None
    if different:
        raise InputError(
            f"{run.folder}: found a run of other settings ({', '.join(different)}), expected the "
            "same. Choose another --out, or give what it was started with: see its run.json"
        )


def _drop_useless(run: Run) -> None:
    """Remove a checkpoint that a killed run left: evaluated, or trained but without its history."""
    checkpoint = run.folder / "checkpoint"
    if checkpoint.exists() and (run.finished or not (run.folder / HISTORY).exists()):
        state = import_extra("mdf_training.trainer", "training").TRAINER
        if run.finished or not (checkpoint / state).exists():
            shutil.rmtree(checkpoint)


def _run_all(
    runs: Sequence[Run],
    jobs: int,
    processes: int,
    groups: Sequence[str],
    command: Callable[[Path, int], list[str]],
) -> Generator[Run]:
    """Start every run, `jobs` at a time, and yield each as it ends; none outlives this call."""
    waiting, slots = deque(runs), deque(range(jobs))
    alive: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or alive:
            while waiting and slots:
                slot, run = slots.popleft(), waiting.popleft()
                device = groups[slot % len(groups)] if groups else None
                words = command(run.folder, 1 if run.settings["model"] == "cnn" else processes)
                alive[slot] = run, _start(words, run.folder, device)
            for slot, (run, process) in list(alive.items()):
                if (code := process.poll()) is None:
                    continue
                if code < 0:  # it could not say so itself
                    with (run.folder / LOG).open("a", encoding="utf-8") as log:
                        log.write(f"\nkilled by signal {-code}\n")
                _end(process)
                del alive[slot]
                slots.append(slot)
                yield run
            time.sleep(POLL_S)
    finally:
        for _, process in alive.values():
            process.terminate()
        for _, process in alive.values():
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a process that ends or was told to; kill one that does not heed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _start(words: list[str], folder: Path, device: str | None) -> "subprocess.Popen[bytes]":
    """Start a run; the end of its standard input tells it that this process is gone."""
    # One thread: runs side by side would fight for cores, and the last digits depend on it.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def _places(setting: Setting) -> dict[str, str | None]:
    """Say where a run reads what, from whatever folder it is started in."""
    names = ("data", "test", "split", "unet_weights", "backbone")
    places = {name: getattr(setting, name) for name in names}
    return {
        name: place
        if place is None or str(place).startswith("synthetic:")
        else str(Path(place).resolve())
        for name, place in places.items()
    }


def _rows(data: DataSet) -> str:
    return sha256(repr(list(data.rows)).encode()).hexdigest()


def _describe(module: str, what: str, path: Path | None) -> dict[str, str] | None:
    """Name a file by its content, as the trainer does."""
    if path is None:
        return None
    home = import_extra(f"mdf_training.{module}", "training")
    found: dict[str, str] = getattr(home, f"describe_{what}")(path)
    return found


def devices(runs: Sequence[Run]) -> list[str]:
    """Name the cards or processors that the finished runs ran on."""
    return sorted({_report(run)["device"] for run in runs if run.finished})


def _report(run: Run) -> dict[str, Any]:
    path = run.folder / REPORT
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(
            f"{path}: found something else than a run's report. Remove {run.folder}."
        ) from None
    return report


def _accuracy(run: Run) -> str:
    return f"accuracy {_report(run)['accuracy']['value']:.3f}"


def write_json(path: Path, value: Any) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)

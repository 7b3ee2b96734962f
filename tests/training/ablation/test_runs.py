"""ablation.runs: every run once, those that fail apart, and nothing outlives a study."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdf_sdk.errors import DataError, InputError, StorageError
from mdf_training.ablation import single_run
from mdf_training.ablation.commands import add_ablate
from mdf_training.ablation.runs import (
    HISTORY,
    LOG,
    PREDICTIONS,
    REPORT,
    RUN,
    Run,
    Setting,
    ablate,
    device_groups,
    devices,
    plan_runs,
)
from mdf_training.ablation.studies import find_studies
from mdf_training.data.folder import open_data
from mdf_training.recipes import Recipe
from mdf_training.trainer import train

SETTING = Setting("nano", "synthetic:8:1", "synthetic:4:2", epochs=1)
# What a run does, without a model: it notes its device, and reports. `{act}` comes before.
FAKE = """
import json, os, signal, sys
from pathlib import Path
folder = Path(sys.argv[1])
settings = json.loads((folder / "run.json").read_text())["settings"]
{act}
(folder / "history.json").write_text("[]")
report = {{"accuracy": {{"value": 0.5}}, "device": os.environ.get("CUDA_VISIBLE_DEVICES")}}
(folder / "report.json").write_text(json.dumps(report))
"""
# Says that it is there, and goes on when all four runs of the study are.
MEET = """
import time
(folder / "new").write_text(str(os.getpid()))
(folder / "new").rename(folder / "pid")
end = time.monotonic() + 60
while len(list(folder.parent.glob("*/pid"))) < 4:
    assert time.monotonic() < end
"""
NO_FILM = "not settings['fusion']['film']"


class Fake:
    """The words that start a fake run, and the names of the runs that were started."""

    def __init__(self, act: str = "") -> None:
        self.script = FAKE.format(act=act)
        self.started: list[str] = []

    def __call__(self, folder: Path, processes: int) -> list[str]:
        self.started.append(folder.name)
        return [sys.executable, "-S", "-c", self.script, str(folder)]


def study_fusion(out: Path, command: Callable[[Path, int], list[str]], **options: Any) -> list[Run]:
    options = {"tell": lambda line: None, **options}
    return ablate(find_studies(["fusion"]), SETTING, (0,), out, command=command, **options)


def test_studies_share_the_runs_of_equal_settings(tmp_path: Path) -> None:
    studies = find_studies(["frozen", "fusion", "depths", "query", "alpha"])
    runs = plan_runs(studies, SETTING, (0, 1, 2), tmp_path)
    # 4 + 4 + 5 + 2 + 4 rows, of which five are the one reference.
    assert len(runs) == 3 * (19 - 4) == len({run.folder for run in runs})
    assert runs[0].variants >= {"fused", "alpha-1", "joint"}


def test_the_first_seed_comes_first(tmp_path: Path) -> None:
    runs = plan_runs(find_studies(["query"]), SETTING, (4, 2), tmp_path)
    names = ["fused-seed4", "query-skip-seed4", "fused-seed2", "query-skip-seed2"]
    assert [run.folder.name for run in runs] == names


def test_a_run_has_the_same_name_in_every_study(tmp_path: Path) -> None:
    (run, *_) = plan_runs(find_studies(["alpha"]), SETTING, (0,), tmp_path)
    assert run.folder.name == "fused-seed0"


def test_a_study_that_is_given_again_keeps_what_is_finished(tmp_path: Path) -> None:
    first, second = Fake(), Fake()
    runs = study_fusion(tmp_path, first)
    assert first.started == [run.folder.name for run in runs]
    assert study_fusion(tmp_path, second) == runs
    assert second.started == []


def test_a_place_where_no_directory_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file.fused-seed0: .*Choose another --out"):
        study_fusion(tmp_path / "file", Fake())


def test_a_damaged_report_is_named_with_its_cure(tmp_path: Path) -> None:
    (run, *_) = runs = study_fusion(tmp_path, Fake())
    (run.folder / REPORT).write_text('{"accuracy":')
    with pytest.raises(InputError, match=r"report\.json: .*Remove .*fused-seed0"):
        devices(runs)


def test_a_checkpoint_that_no_run_can_use_goes(tmp_path: Path) -> None:
    runs = study_fusion(tmp_path, Fake(f"if {NO_FILM}: sys.exit(1)"))
    evaluated, resumable, trained, unnoted = (run.folder / "checkpoint" for run in runs)
    for checkpoint in (evaluated, resumable, trained, unnoted):
        checkpoint.mkdir()
    (resumable / "trainer.json").touch()
    (trained.parent / REPORT).unlink()
    study_fusion(tmp_path, Fake("sys.exit(1)"))
    assert [c.exists() for c in (evaluated, resumable, trained, unnoted)] == [0, 1, 1, 0]


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    told: list[str] = []
    fails = Fake(f"if {NO_FILM}: sys.exit('no memory')")
    runs = study_fusion(tmp_path, fails, tell=told.append)
    assert [run.finished for run in runs] == [True, False, True, False]
    assert told[1].endswith("cross-attention-seed0 failed: no memory")
    assert told[2].startswith("3 of 4, ")
    again = Fake()
    assert all(run.finished for run in study_fusion(tmp_path, again))
    assert again.started == ["cross-attention-seed0", "no-fusion-seed0"]


def test_a_run_that_was_killed_says_by_which_signal(tmp_path: Path) -> None:
    told: list[str] = []
    study_fusion(
        tmp_path,
        Fake(f"if {NO_FILM}: os.kill(os.getpid(), signal.SIGKILL)"),
        tell=told.append,
    )
    assert told[1].endswith("failed: killed by signal 9")


def test_a_directory_with_other_settings_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    study_fusion(tmp_path, Fake())
    before = (tmp_path / "fused-seed0" / RUN).read_bytes()
    other = Setting("nano", "synthetic:9:1", "synthetic:4:2", epochs=2)
    with pytest.raises(InputError, match=r"fused-seed0: found .* other settings \(data, recipe\)"):
        ablate(find_studies(["fusion"]), other, (0,), tmp_path, command=Fake())
    assert (tmp_path / "fused-seed0" / RUN).read_bytes() == before


def test_something_else_in_the_place_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fused-seed0").mkdir()
    (tmp_path / "fused-seed0" / RUN).write_text("[]")
    with pytest.raises(InputError, match="something else than a run's settings"):
        study_fusion(tmp_path, Fake())


def test_jobs_run_side_by_side_and_take_the_devices_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    runs = study_fusion(tmp_path, Fake(MEET), jobs=4)
    devices = [json.loads((run.folder / REPORT).read_text())["device"] for run in runs]
    assert devices == ["5", "7", "5", "7"]


def test_devices_are_grouped_by_the_processes_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert device_groups(2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_groups(2) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(InputError, match="expected at most 1, one for each CUDA device"):
        device_groups(2)


def test_an_interrupt_stops_every_run(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    stays = Fake(f"{MEET}\nif {NO_FILM}: signal.pause()")
    with pytest.raises(KeyboardInterrupt):
        study_fusion(tmp_path, stays, jobs=4, tell=interrupt)
    pids = [int(path.read_text()) for path in tmp_path.glob("*/pid")]
    assert len(pids) == 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_run_ends_when_the_study_that_started_it_is_gone() -> None:
    code = """
import threading
from mdf_training.ablation.single_run import _end_with_parent
_end_with_parent()
print("up", flush=True)
threading.Event().wait(60)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"up\n"
        assert run.stdin is not None
        run.stdin.close()
        assert run.wait(30) == 1


def test_patients_that_were_trained_on_are_refused_as_test(tmp_path: Path) -> None:
    setting = Setting("nano", "synthetic:8:1", "synthetic:4:1")
    with pytest.raises(DataError, match="4 patients of the training data"):
        ablate(find_studies(["query"]), setting, (0,), tmp_path, command=Fake())


def test_a_study_without_unseen_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--test synthetic:2000:999"):
        ablate(find_studies(["query"]), Setting("nano", "synthetic:8:1"), (0,), tmp_path)


def test_an_interrupted_run_of_a_split_ends_as_the_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, split = "synthetic:24:1", tmp_path / "split.csv"
    parts = ["train"] * 16 + ["validation"] * 4 + ["test"] * 4
    rows = [f"{row.file},{part}" for row, part in zip(open_data(data).rows, parts, strict=True)]
    split.write_text("\n".join(["file,part", *rows]) + "\n")
    setting, only_plans = Setting("nano", data, split=split, epochs=2), Fake("sys.exit()")
    (run, *_) = ablate(find_studies(["query"]), setting, (3,), tmp_path, command=only_plans)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mdf_training.epochs.nn.utils.clip_grad_norm_", _after(1, stop))
        with pytest.raises(KeyboardInterrupt):
            single_run.run(run.folder)
    assert not (run.folder / HISTORY).exists()
    single_run.run(run.folder)
    recipe = Recipe(epochs=2, seed=3)
    unbroken = train("nano", data, tmp_path / "whole", recipe=recipe, split=split)
    assert json.loads((run.folder / HISTORY).read_text()) == unbroken["history"]
    tested = (run.folder / PREDICTIONS).read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in tested] == [row.split(",")[0] for row in rows[20:]]
    assert {path.name for path in run.folder.iterdir()} == {RUN, LOG, HISTORY, PREDICTIONS, REPORT}


def _after(calls: int, stop: Callable[..., None]) -> Callable[..., Any]:
    """Let as many calls through, then stop."""
    from torch.nn.utils import clip_grad_norm_

    left = [calls]

    def clip(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        return stop() if left[0] < 0 else clip_grad_norm_(*args, **options)

    return clip


def test_the_command_writes_table_plot_and_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_ablate(parser.add_subparsers(dest="command"))
    words = ["ablate", "--study", "query", "--preset", "nano", "--data", "synthetic:24:1"]
    words += ["--test", "synthetic:6:2", "--seeds", "0", "--epochs", "1", "--jobs", "2"]
    args = parser.parse_args([*words, "--out", str(tmp_path / "out"), "--json"])
    assert args.run(args) == 0
    (document,) = json.loads(capsys.readouterr().out.splitlines()[-1])["studies"]
    assert [v["accuracy"]["n"] for v in document["variants"]] == [6, 6]
    assert document["command"].startswith("mdf ablate --study query --preset nano --data")
    assert (tmp_path / "out" / "query.png").stat().st_size > 1000
    assert "| query-skip | query skip | " in (tmp_path / "out" / "query.md").read_text()
    assert json.loads((tmp_path / "out" / "query.json").read_text()) == document
    runs = {"fused-seed0", "query-skip-seed0"}
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == runs

"""ablation.report: figures, intervals and verdicts from what runs left behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mdf_sdk.errors import DataError
from mdf_training.ablation.report import format_study, report_study, resample
from mdf_training.ablation.runs import HISTORY, LOG, PREDICTIONS, REPORT, Run
from mdf_training.ablation.studies import FUSED, Study, Variant
from mdf_training.data.cases import Row
from mdf_training.evaluation.predictions import save_predictions
from mdf_training.evaluation.statistics import Proportion, exact_mcnemar

LABELS = ("Acquired", "Inherited")
OTHER = Variant("other", fusion={"film": False})
STUDY = Study("study", "Which?", FUSED, (OTHER,), claim="fused is better")
RNG = np.random.default_rng(7)
Bool = npt.NDArray[np.bool_]
SHARED = {"preset": "nano", "data": "synthetic:8:1", "test": "synthetic:4:2", "seeds": [0, 1]}


class Rows:
    """Cases without pictures: two of every patient, the sources in turn."""

    def __init__(self, count: int, sources: tuple[str, ...] = ("one",)) -> None:
        self.rows = [
            Row(f"{i}.png", LABELS[i // 2 % 2], "", str(i // 2), sources[i // 2 % len(sources)])
            for i in range(count)
        ]


def save_run(folder: Path, variant: Variant, seed: int, correct: Bool, rows: Rows) -> Run:
    """Write what a run leaves, given which cases it has right."""
    run = Run(frozenset({variant.name}), seed, folder / f"{variant.name}-seed{seed}", {})
    run.folder.mkdir()
    truth = np.array([LABELS.index(row.label) for row in rows.rows])
    chosen = np.where(correct, truth, 1 - truth)
    scores = np.eye(2, dtype=np.float32)[chosen]
    save_predictions(run.folder / PREDICTIONS, LABELS, rows, scores)  # type: ignore[arg-type]
    blank = Proportion(len(truth) // 2, len(truth)).to_dict()
    (run.folder / REPORT).write_text(json.dumps({"controls": {"blank_image": blank}}))
    (run.folder / HISTORY).write_text(json.dumps([{"validation_loss": 0.5}]))
    return run


def failed_run(folder: Path, variant: Variant, seed: int, said: str) -> Run:
    run = Run(frozenset({variant.name}), seed, folder / f"{variant.name}-seed{seed}", {})
    run.folder.mkdir()
    (run.folder / LOG).write_text(f"Traceback\n{said}\n\n")
    return run


def save_pair(folder: Path, better: float, rows: Rows) -> dict[str, Any]:
    """Report fused runs that have 80 % right against runs that have `better` more."""
    n = len(rows.rows)
    runs = []
    for seed in (0, 1):
        fused, other = (RNG.random(n) < share for share in (0.8, 0.8 + better))
        runs.append(save_run(folder, FUSED, seed, fused, rows))
        runs.append(save_run(folder, OTHER, seed, other, rows))
    return report_study(STUDY, runs)


def test_accuracy_is_that_of_all_seeds_together_with_wilsons_interval(tmp_path: Path) -> None:
    rows = Rows(40)
    correct = [RNG.random(40) < 0.8 for _ in range(3)]
    runs = [save_run(tmp_path, FUSED, seed, c, rows) for seed, c in enumerate(correct)]
    (fused, _) = report_study(STUDY, runs)["variants"]
    assert fused["accuracy"] == Proportion(int(np.sum(correct)), 120).to_dict()
    assert fused["accuracy_by_seed"] == [c.mean() for c in correct]
    assert fused["controls"]["blank_image"] == Proportion(60, 120).to_dict()


def test_the_difference_is_paired_by_case_and_seed(tmp_path: Path) -> None:
    rows, kept = Rows(40), np.arange(40) % 10 != 3
    correct = [RNG.random(40) < 0.8 for _ in range(3)]
    runs = [save_run(tmp_path, FUSED, seed, c, rows) for seed, c in enumerate(correct)]
    runs += [save_run(tmp_path, OTHER, seed, c & kept, rows) for seed, c in enumerate(correct)]
    difference = report_study(STUDY, runs)["variants"][1]["difference"]
    lost = [int((c & ~kept).sum()) for c in correct]
    assert difference["by_seed"] == pytest.approx([-n / 40 for n in lost])
    assert difference["accuracy"]["value"] == pytest.approx(-sum(lost) / 120)
    low, high = difference["accuracy"]["interval_95"]
    assert low < -sum(lost) / 120 < high <= 0
    expected = [exact_mcnemar(c & kept, c) for c in correct]
    assert difference["mcnemar_p_by_seed"] == expected


def test_equal_runs_differ_by_nothing(tmp_path: Path) -> None:
    rows = Rows(20)
    correct = RNG.random(20) < 0.7
    runs = [save_run(tmp_path, v, 0, correct, rows) for v in (FUSED, OTHER)]
    difference = report_study(STUDY, runs)["variants"][1]["difference"]
    assert difference["accuracy"] == {"value": 0.0, "interval_95": [0.0, 0.0]}
    assert difference["mcnemar_p_by_seed"] == [1.0]


def test_balanced_accuracy_weighs_the_classes_alike(tmp_path: Path) -> None:
    rows = Rows(12)
    rows.rows = rows.rows[:2] + [row for row in rows.rows if row.label == "Inherited"]
    acquired = np.array([row.label == "Acquired" for row in rows.rows])
    run = save_run(tmp_path, FUSED, 0, acquired, rows)
    (fused, _) = report_study(STUDY, [run])["variants"]
    assert fused["accuracy"]["value"] == 0.25
    assert fused["balanced_accuracy"]["value"] == 0.5


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_cases() -> None:
    values = (RNG.random((1, 2000)) < 0.8).astype(np.float64)
    truth = np.array(["a", "b"] * 1000)
    accuracy, _ = resample(values, truth, np.arange(2000))
    half = 1.96 * np.sqrt(0.8 * 0.2 / 2000)
    low, high = np.percentile(accuracy, [2.5, 97.5])
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_two_cases_of_one_patient_count_as_one() -> None:
    """Each patient's cases are alike: as wide as half as many cases, not as all of them."""
    once = (RNG.random((1, 500)) < 0.8).astype(np.float64)
    twice = np.repeat(once, 2, axis=1)
    truth = np.array(["a"] * 1000)
    of_patients, _ = resample(twice, truth, np.repeat(np.arange(500), 2))
    of_cases, _ = resample(twice, truth, np.arange(1000))
    alone, _ = resample(once, truth[:500], np.arange(500))
    assert of_patients.std() == pytest.approx(alone.std(), rel=0.1)
    assert of_patients.std() == pytest.approx(np.sqrt(2) * of_cases.std(), rel=0.1)


def test_seeds_that_differ_widen_the_interval() -> None:
    seeds = np.array([[0.2], [0.5], [0.8]]) > RNG.random(900)
    truth, patients = np.array(["a"] * 900), np.arange(900)
    apart, _ = resample(seeds.astype(np.float64), truth, patients)
    # The mean of three seeds drawn from three: variance of the seeds over three.
    assert apart.std() == pytest.approx(np.std([0.2, 0.5, 0.8]) / np.sqrt(3), rel=0.15)


def test_the_share_of_the_classes_is_drawn_too() -> None:
    """A model that always says "a" is as right as there are cases of a."""
    truth = np.array(["a", "b"] * 200)
    accuracy, balanced = resample((truth == "a")[None].astype(np.float64), truth, np.arange(400))
    assert accuracy.std() == pytest.approx(np.sqrt(0.5 * 0.5 / 400), rel=0.1)
    assert balanced.std() == 0


def test_no_draw_lacks_a_class() -> None:
    truth = np.array(["rare"] + ["common"] * 30)
    _, balanced = resample(np.ones((1, 31)), truth, np.arange(31))
    assert (balanced == 1).all()


@pytest.mark.parametrize(
    ("better", "cases", "verdict"),
    [
        (-0.3, 400, "holds: every interval is below 0"),
        (-0.02, 60, "holds in the means alone: the interval of other includes 0"),
        (0.2, 200, "does not hold: other not below fused"),
    ],
)
def test_the_order_of_the_paper_is_reported_as_found(
    better: float, cases: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.RNG", np.random.default_rng(1))
    document = save_pair(tmp_path, better, Rows(cases))
    assert document["claim"]["verdict"] == verdict
    assert document["claim"]["holds"] == verdict.startswith("holds:")
    text = format_study(SHARED | document)
    assert f"Order of the paper (fused is better): {verdict}." in text


def test_a_claim_without_a_finished_pair_is_not_tested(tmp_path: Path) -> None:
    runs = [save_run(tmp_path, FUSED, 0, np.ones(8, np.bool_), Rows(8))]
    runs.append(failed_run(tmp_path, OTHER, 0, "no memory"))
    document = report_study(STUDY, runs)
    assert document["claim"]["verdict"] == "not tested: no finished pair of runs of other"


def test_a_failed_run_is_named_and_leaves_the_other_seeds_paired(tmp_path: Path) -> None:
    rows, right = Rows(8), np.ones(8, np.bool_)
    runs = [save_run(tmp_path, FUSED, seed, right, rows) for seed in (0, 1)]
    runs += [save_run(tmp_path, OTHER, 1, ~right, rows)]
    runs += [failed_run(tmp_path, OTHER, 0, "no memory")]
    document = report_study(STUDY, runs)
    assert document["variants"][1]["difference"]["seeds"] == [1]
    assert "- other, seed 0: no memory" in format_study(SHARED | document)


def test_a_study_of_which_nothing_finished_says_why(tmp_path: Path) -> None:
    runs = [failed_run(tmp_path, v, 0, "no memory") for v in (FUSED, OTHER)]
    with pytest.raises(DataError, match=r"no finished run, expected one or more; .*: no memory"):
        report_study(STUDY, runs)


def test_runs_on_other_cases_are_not_compared(tmp_path: Path) -> None:
    runs = [save_run(tmp_path, FUSED, 0, np.ones(8, np.bool_), Rows(8))]
    runs += [save_run(tmp_path, OTHER, 0, np.ones(6, np.bool_), Rows(6))]
    with pytest.raises(DataError, match="found other cases than in the other runs"):
        report_study(STUDY, runs)


def test_every_source_has_its_own_rows_where_there_are_several(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    text = format_study(SHARED | save_pair(one, 0, Rows(40)))
    assert "Each source:" not in text
    document = save_pair(two, 0, Rows(40, ("hrf", "fives", "hrf")))
    per_source = document["variants"][1]["per_source"]
    assert {s: p["n"] for s, p in per_source.items()} == {"fives": 14, "hrf": 26}
    assert per_source["hrf"]["accuracy"]["n"] == 2 * 26
    assert "| fives | 14 | fused | " in format_study(SHARED | document)


def test_one_number_in_two_sources_is_two_patients(tmp_path: Path) -> None:
    rows = Rows(4)
    rows.rows = [
        Row(f"{i}.png", LABELS[i // 2], "", "7", source) for i, source in enumerate("abab")
    ]
    run = save_run(tmp_path, FUSED, 0, np.ones(4, np.bool_), rows)
    assert report_study(STUDY, [run])["patients"] == 2


def test_the_same_runs_give_the_same_document(tmp_path: Path) -> None:
    rows = Rows(30)
    runs = [
        save_run(tmp_path, v, s, RNG.random(30) < 0.8, rows) for v in (FUSED, OTHER) for s in (0, 1)
    ]
    assert report_study(STUDY, runs) == report_study(STUDY, runs)

"""A study's finished runs in, its figures, intervals and paired tests out; as Markdown too."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mdf_sdk.errors import DataError
from mdf_training.ablation.runs import HISTORY, PREDICTIONS, REPORT, Run, failure
from mdf_training.ablation.studies import Study, Variant
from mdf_training.evaluation.predictions import ABOUT, SCORE
from mdf_training.evaluation.statistics import Estimate, Proportion, exact_mcnemar

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
RESAMPLES = 2000


@dataclass(frozen=True)
class Cases:
    """Unseen cases, in one order for all runs of a study; arrays (N,) of str."""

    files: npt.NDArray[np.str_]
    sources: npt.NDArray[np.str_]
    patients: npt.NDArray[np.str_]
    truth: npt.NDArray[np.str_]


@dataclass(frozen=True)
class Outcome:
    """What one variant came to.

    Attributes:
        correct: seed -> bool (N,), which cases a finished run had right.
        reports, histories: seed -> what `evaluate` and `train` returned.
        failed: seed -> the last words of a run that did not finish.
    """

    variant: Variant
    correct: Mapping[int, Bool]
    reports: Mapping[int, Mapping[str, Any]]
    histories: Mapping[int, Sequence[Mapping[str, Any]]]
    failed: Mapping[int, str]


def report_study(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """Put the runs of a study together.

    Returns:
        JSON types. For each variant: accuracy pooled over the seeds with Wilson's interval and
        balanced accuracy with a bootstrap interval, both by seed too; the controls; every source;
        the losses by epoch; and the difference to the reference, paired by case and seed. The
        bootstrap is that of `resample`.

    Raises:
        DataError: no run finished, or two were tested on other cases.
    """
    cases, outcomes = _read_outcomes(study, runs)
    reference = outcomes[0]
    variants = [_figures(cases, outcome, reference) for outcome in outcomes]
    document: dict[str, Any] = {
        "study": study.name,
        "question": study.question,
        "note": study.note,
        "reference": study.reference.name,
        "cases": len(cases.truth),
        "patients": len(np.unique(_patients(cases))),
        "variants": variants,
    }
    if study.claim:
        document["claim"] = {"text": study.claim, **_judge(variants)}
    return document


def resample(
    values: Float64,
    truth: npt.NDArray[np.str_],
    patients: npt.NDArray[Any],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Float64, Float64]:
    """Draw seeds and, independently, patients with replacement (a crossed bootstrap).

    Seeds and cases are crossed: every seed answers the same cases, so one draw of patients serves
    all seeds drawn. For the mean over classes, patients are drawn within the set of classes that
    they have, so that no class is ever absent.

    Args:
        values: (S, N), of seed s on case n: 1 or 0 for right or wrong, or a difference of such.
        truth: (N,), the classes.
        patients: (N,), whose case it is.

    Returns:
        The mean over cases, and the mean over classes of the mean over their cases: (resamples,)
        each.
    """
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), resamples)
    _, patient = np.unique(patients, return_inverse=True)
    _, label = np.unique(truth, return_inverse=True)
    shape = label.max() + 1, patient.max() + 1
    counts = np.zeros(shape)  # cases of class k that patient p has
    np.add.at(counts, (label, patient), 1)
    sums = np.zeros((len(values), *shape))  # of the values of seed s on them
    for of_seed, row in zip(values, sums, strict=True):
        np.add.at(row, (label, patient), of_seed)
    of_seeds = np.einsum("rs,skp->krp", seeds / len(values), sums)
    _, classes = np.unique(counts.T > 0, axis=0, return_inverse=True)
    anyone, stratified = (_draw(strata, resamples, rng) for strata in (0 * classes, classes))
    accuracy = (of_seeds.sum(axis=0) * anyone).sum(axis=1) / (anyone @ counts.sum(axis=0))
    by_class = (of_seeds * stratified).sum(axis=2) / (counts @ stratified.T)
    return accuracy, by_class.mean(axis=0)


def _draw(
    strata: npt.NDArray[np.int64], resamples: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw patients within each stratum (P,): how often each was drawn, (resamples, P)."""
    drawn = np.zeros((resamples, len(strata)), np.int64)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        share = np.full(len(members), 1 / len(members))
        drawn[:, members] = rng.multinomial(len(members), share, resamples)
    return drawn


def _read_outcomes(study: Study, runs: Sequence[Run]) -> tuple[Cases, list[Outcome]]:
    cases: Cases | None = None
    outcomes = []
    for variant in study.variants:
        mine = [run for run in runs if variant.name in run.variants]
        finished = [run for run in mine if run.finished]
        correct = {}
        for run in finished:
            found, correct[run.seed] = read_decisions(run.folder / PREDICTIONS)
            cases = cases or found
            if not np.array_equal(cases.files, found.files):
                raise DataError(
                    f"{run.folder / PREDICTIONS}: found other cases than in the other runs of the "
                    "study, expected the same. Remove the directory and run the study again."
                )
        outcomes.append(
            Outcome(
                variant,
                correct,
                {run.seed: _read_json(run.folder / REPORT) for run in finished},
                {run.seed: _read_json(run.folder / HISTORY) for run in finished},
                {run.seed: failure(run) for run in mine if not run.finished},
            )
        )
    if cases is None:
        said = next(iter(outcomes[0].failed.values()))
        raise DataError(
            f"{study.name}: found no finished run, expected one or more; the first said: {said}"
        )
    return cases, outcomes


def read_decisions(path: Path) -> tuple[Cases, Bool]:
    """Read a run's predictions.csv: the cases, and which of them were right, bool (N,)."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    cases = Cases(*(np.array([row[name] for row in rows]) for name in ABOUT))
    columns = [name for name in rows[0] if name.startswith(SCORE)]
    scores = np.array([[float(row[name]) for name in columns] for row in rows])
    labels = np.array([name.removeprefix(SCORE) for name in columns])
    return cases, labels[scores.argmax(axis=1)] == cases.truth


def _figures(cases: Cases, outcome: Outcome, reference: Outcome) -> dict[str, Any]:
    everything = np.ones(len(cases.truth), np.bool_)
    sources = np.unique(cases.sources)
    found: dict[str, Any] = {
        "name": outcome.variant.name,
        "changes": outcome.variant.changes(),
        "seeds": sorted(outcome.correct),
        "failed": {str(seed): said for seed, said in outcome.failed.items()},
    }
    if not outcome.correct:
        return found
    found |= _scores(cases, outcome, reference, everything)
    found["controls"] = _pool_controls(outcome.reports.values())
    if len(sources) > 1:
        found["per_source"] = {
            str(s): _scores(cases, outcome, reference, cases.sources == s) for s in sources
        }
    found["histories"] = {str(seed): outcome.histories[seed] for seed in sorted(outcome.histories)}
    return found


def _scores(cases: Cases, outcome: Outcome, reference: Outcome, chosen: Bool) -> dict[str, Any]:
    """Give the accuracies on the chosen cases, and the differences to the reference."""
    truth, patients = cases.truth[chosen], _patients(cases)[chosen]
    correct = np.stack([outcome.correct[seed][chosen] for seed in sorted(outcome.correct)])
    found: dict[str, Any] = {
        "n": int(chosen.sum()),
        "accuracy": Proportion.of(correct.ravel()).to_dict(),
        "accuracy_by_seed": [float(row.mean()) for row in correct],
        "balanced_accuracy": _balanced(correct, truth, patients),
        "balanced_accuracy_by_seed": [_class_mean(row, truth) for row in correct],
    }
    shared = sorted(outcome.correct.keys() & reference.correct.keys())
    if outcome.variant.name == reference.variant.name or not shared:
        return found
    ours, theirs = (
        np.stack([o.correct[seed][chosen] for seed in shared]) for o in (outcome, reference)
    )
    difference = ours.astype(np.float64) - theirs
    accuracy, balanced = resample(difference, truth, patients)
    by_class = float(np.mean([_class_mean(row, truth) for row in difference]))
    found["difference"] = {
        "seeds": shared,
        "accuracy": _estimate(float(difference.mean()), accuracy),
        "balanced_accuracy": _estimate(by_class, balanced),
        "by_seed": [float(row.mean()) for row in difference],
        "mcnemar_p_by_seed": [exact_mcnemar(a, b) for a, b in zip(ours, theirs, strict=True)],
    }
    return found


def _balanced(
    correct: Bool, truth: npt.NDArray[np.str_], patients: npt.NDArray[Any]
) -> dict[str, Any]:
    values = correct.astype(np.float64)
    _, balanced = resample(values, truth, patients)
    return _estimate(float(np.mean([_class_mean(row, truth) for row in values])), balanced)


def _class_mean(values: npt.NDArray[Any], truth: npt.NDArray[np.str_]) -> float:
    return float(np.mean([values[truth == k].mean() for k in np.unique(truth)]))


def _estimate(value: float, draws: Float64) -> dict[str, Any]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, (float(low), float(high))).to_dict()


def _pool_controls(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the seeds' counts of every control up."""
    counts: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        for name, control in report["controls"].items():
            counts.setdefault(name, []).append(control)
    return {
        name: Proportion(sum(c["correct"] for c in found), sum(c["n"] for c in found)).to_dict()
        for name, found in counts.items()
    }


def _patients(cases: Cases) -> npt.NDArray[np.str_]:
    """Tell patients of two sources apart that have one number."""
    return np.char.add(np.char.add(cases.sources, "\0"), cases.patients)


def _judge(variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say whether the reference is better than every other variant, and how sure that is."""
    words, above, unsure, missing = [], [], [], []
    for variant in variants[1:]:
        name = variant["name"]
        if "difference" not in variant:
            missing.append(name)
            continue
        estimate = variant["difference"]["accuracy"]
        low, high = estimate["interval_95"]
        words.append(f"{name} {estimate['value']:+.3f} ({low:+.3f} to {high:+.3f})")
        if estimate["value"] >= 0:
            above.append(name)
        elif high >= 0:
            unsure.append(name)
    if above:
        verdict = f"does not hold: {', '.join(above)} not below {variants[0]['name']}"
    elif missing:
        verdict = f"not tested: no finished pair of runs of {', '.join(missing)}"
    elif unsure:
        verdict = f"holds in the means alone: the interval of {', '.join(unsure)} includes 0"
    else:
        verdict = "holds: every interval is below 0"
    return {"holds": not (above or missing or unsure), "verdict": verdict, "differences": words}


def format_study(document: Mapping[str, Any]) -> str:
    """Lay a study out as Markdown."""
    variants = document["variants"]
    reference = document["reference"]
    lines = [
        f"# Study {document['study']}",
        "",
        " ".join(filter(None, (document["question"], document["note"]))),
        "",
        f"Preset {document['preset']}, trained on {document['data']}, tested on "
        f"{document['cases']} unseen cases of {document['patients']} patients "
        f"({document['test']}), seeds {', '.join(map(str, document['seeds']))}.",
        "",
        "| variant | changes | accuracy | 95 % interval | by seed | balanced | 95 % interval |",
        "|---|---|---|---|---|---|---|",
        *(_row(variant) for variant in variants),
        "",
        f"Held against {reference}, case by case and seed by seed:",
        "",
        "| variant | accuracy | 95 % interval | balanced | 95 % interval | by seed | McNemar p |",
        "|---|---|---|---|---|---|---|",
        *(_difference_row(v["name"], v["difference"]) for v in variants if "difference" in v),
        "",
    ]
    if claim := document.get("claim"):
        lines += [
            f"Order of the paper ({claim['text']}): {claim['verdict']}. "
            f"Accuracy against {reference}: {'; '.join(claim['differences'])}.",
            "",
        ]
    lines += _format_controls(variants) + _format_sources(variants)
    compared = sum("difference" in variant for variant in variants)
    lines += [
        "Accuracy: the right answers of all seeds together, with Wilson's interval, which takes "
        "them for independent; beside it the range over the seeds. Balanced accuracy and "
        "differences: bootstrap over seeds and patients, 2.5 % to 97.5 %; few seeds show the "
        "spread between seeds roughly. McNemar: exact, two-sided, the largest p of the seeds. "
        f"{compared} comparison{'s' * (compared != 1)}, not corrected for their number.",
    ]
    failed = [(v["name"], seed, said) for v in variants for seed, said in v["failed"].items()]
    if failed:
        lines += ["", "Runs that failed, and are missing above:", ""]
        lines += [f"- {name}, seed {seed}: {said}" for name, seed, said in failed]
    return "\n".join(lines) + "\n"


def _row(variant: Mapping[str, Any]) -> str:
    start = f"| {variant['name']} | {variant['changes']} "
    if "accuracy" not in variant:
        return start + "| failed | | | | |"
    accuracy, balanced = variant["accuracy"], variant["balanced_accuracy"]
    return start + (
        f"| {accuracy['value']:.3f} | {_interval(accuracy)} "
        f"| {_range(variant['accuracy_by_seed'], '.3f')} "
        f"| {balanced['value']:.3f} | {_interval(balanced)} |"
    )


def _difference_row(name: str, difference: Mapping[str, Any]) -> str:
    accuracy, balanced = difference["accuracy"], difference["balanced_accuracy"]
    return (
        f"| {name} | {accuracy['value']:+.3f} | {_interval(accuracy, '+.3f')} "
        f"| {balanced['value']:+.3f} | {_interval(balanced, '+.3f')} "
        f"| {_range(difference['by_seed'], '+.3f')} | {max(difference['mcnemar_p_by_seed']):.2g} |"
    )


def _format_controls(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for v in variants for name in v.get("controls", {})))
    if not names:
        return []
    return [
        "What is left of the accuracy without a part of the input, all seeds:",
        "",
        f"| variant | {' | '.join(name.replace('_', ' ') for name in names)} |",
        "|" + "---|" * (len(names) + 1),
        *(
            f"| {v['name']} | {' | '.join(_value(v['controls'].get(name)) for name in names)} |"
            for v in variants
            if "controls" in v
        ),
        "",
    ]


def _format_sources(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for variant in variants:
        for source, scores in variant.get("per_source", {}).items():
            accuracy, balanced = scores["accuracy"], scores["balanced_accuracy"]
            row = (
                f"| {source} | {scores['n']} | {variant['name']} | {accuracy['value']:.3f} "
                f"| {_interval(accuracy)} | {balanced['value']:.3f} "
            )
            if "difference" in scores:
                against = scores["difference"]["accuracy"]
                row += f"| {against['value']:+.3f} | {_interval(against, '+.3f')} |"
            else:
                row += "| | |"
            rows.append((source, row))
    if not rows:
        return []
    return [
        "Each source:",
        "",
        "| source | cases | variant | accuracy | 95 % interval | balanced | against the reference "
        "| 95 % interval |",
        "|---|---|---|---|---|---|---|---|",
        *(row for _, row in sorted(rows, key=lambda pair: pair[0])),
        "",
    ]


def _value(estimate: Mapping[str, Any] | None) -> str:
    return f"{estimate['value']:.3f}" if estimate else ""


def _interval(estimate: Mapping[str, Any], form: str = ".3f") -> str:
    low, high = estimate["interval_95"]
    return f"{low:{form}} to {high:{form}}"


def _range(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

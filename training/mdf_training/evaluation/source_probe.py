"""Features of a model and the cases' sources in; how well the source is told from them out.

A classifier that can tell the camera can use it: where every class has cameras of its own, the
camera alone gives the class away. So a probe stays within one class, where the class is no cue.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mdf_sdk.extras import import_extra
from mdf_training.evaluation.statistics import Proportion, estimate_balanced_accuracy

FOLDS = 5
MIN_PATIENTS = 2 * FOLDS  # two for each fold


def probe_sources(
    features: npt.NDArray[np.float32],
    labels: Sequence[str],
    sources: Sequence[str],
    patients: Sequence[str],
) -> dict[str, Any]:
    """Predict the source from features by logistic regression, within each class.

    Standardized features, an L2 penalty, sources weighed alike; cross-validated in FOLDS parts that
    share no patient. Needs scikit-learn.

    Args:
        features: float32 (N, F).
        labels, sources, patients: N of each.

    Returns:
        JSON types, by class: balanced accuracy with its interval, to be held against `chance` (one
        over the sources), and accuracy, to be held against `largest_share`; `sources` counts the
        cases of each. A source with fewer than MIN_PATIENTS patients of the class is left out, and
        a class with fewer than two sources is absent.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    label_of, source_of, patient_of = (np.array(v) for v in (labels, sources, patients))
    report = {}
    for label in np.unique(label_of):
        of_class = label_of == label
        kept = [
            s
            for s in np.unique(source_of[of_class])
            if len(np.unique(patient_of[of_class & (source_of == s)])) >= MIN_PATIENTS
        ]
        if len(kept) < 2:
            continue
        chosen = np.flatnonzero(of_class & np.isin(source_of, kept))
        names, truth, counts = np.unique(source_of[chosen], return_inverse=True, return_counts=True)
        told = _cross_validate(features[chosen], truth, patient_of[chosen])
        balanced = estimate_balanced_accuracy(truth, told, patient_of[chosen].tolist())
        report[str(label)] = {
            "balanced_accuracy": balanced.to_dict(),
            "chance": 1 / len(names),
            "accuracy": Proportion.of(told == truth).to_dict(),
            "largest_share": float(counts.max() / counts.sum()),
            "sources": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        }
    return report


def _cross_validate(
    features: npt.NDArray[np.float32],
    truth: npt.NDArray[np.int64],
    patients: npt.NDArray[np.str_],
) -> npt.NDArray[np.int64]:
    """Return for each case the source that a probe says which did not see its patient."""
    selection, linear, pipeline, preprocessing = (
        import_extra(f"sklearn.{name}", "training")
        for name in ("model_selection", "linear_model", "pipeline", "preprocessing")
    )
    probe = pipeline.make_pipeline(
        preprocessing.StandardScaler(),
        linear.LogisticRegression(class_weight="balanced", max_iter=2000),
    )
    folds = selection.StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    # float64: of float32 features the solver's steps depend on how the sums are threaded.
    told: npt.NDArray[np.int64] = selection.cross_val_predict(
        probe, features.astype(np.float64), truth, groups=patients, cv=folds
    )
    return told

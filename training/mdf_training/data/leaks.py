"""Texts and labels in, by how much the texts give the labels away out.

A clinical text may help: of the synthetic ones nearly half decide their case. It must not be the
answer written in another column, as the diagnostic keywords of ODIR-5K are.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mdf_sdk.errors import DataError
from mdf_sdk.extras import import_extra
from mdf_training.data.cases import Row
from mdf_training.data.diseases import Disease, read_diseases
from mdf_training.data.folder import list_problems
from mdf_training.data.synthetic import NEUTRAL_TEXT

# A word of a label may occur by the way ("otherwise healthy", "best corrected"): it gives the label
# away where it is this many times as frequent in the label's own texts as in the others'.
FREQUENCY_RATIO = 2
# Of `TextOnly.skill`: 0 is chance, 1 is every label. synthetic:6000:1 has 0.45.
WARN_SKILL, REFUSE_SKILL = 0.2, 0.9
MIN_PATIENTS, FOLDS = 20, 5
MAX_SHOWN = 3


@dataclass(frozen=True)
class LabelWord:
    """A name of a label or of one of its diseases that occurs in texts.

    Attributes:
        own, others: number of texts with it that have the label, and another label.
        files: some of the label's own.
    """

    word: str
    label: str
    own: int
    others: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class TextOnly:
    """What a bag of words tells of the label, cross-validated by patient."""

    balanced_accuracy: float
    chance: float

    @property
    def skill(self) -> float:
        """The share of the way from chance to every label."""
        return (self.balanced_accuracy - self.chance) / (1 - self.chance)


@dataclass(frozen=True)
class LeakReport:
    """What `find_leaks` found.

    Attributes:
        words: those that give their label away.
        text_only: None where there are too few patients or labels to say.
        neutral_share: label -> share of its texts that say nothing.
    """

    words: tuple[LabelWord, ...]
    text_only: TextOnly | None
    neutral_share: dict[str, float]

    @property
    def errors(self) -> list[str]:
        """What no model should be trained on unseen."""
        found = [
            f"the name {w.word!r} of label {w.label} is in {w.own} texts of that label and"
            f" {w.others} of others, as in {', '.join(w.files)}"
            for w in self.words
        ]
        if self.text_only and self.text_only.skill >= REFUSE_SKILL:
            found.append(f"{_describe(self.text_only)}: the texts are the labels in other words")
        return found

    @property
    def warnings(self) -> list[str]:
        """What may be right, and should be known."""
        found = []
        if self.text_only and WARN_SKILL <= self.text_only.skill < REFUSE_SKILL:
            found.append(f"{_describe(self.text_only)}: look at `text only` of mdf evaluate")
        shares = self.neutral_share.values()
        if shares and max(shares) - min(shares) > 0.5:
            listed = ", ".join(f"{k} {v:.0%}" for k, v in self.neutral_share.items())
            found.append(f"texts that say nothing ({listed}): having a text tells the label")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "words": [asdict(word) for word in self.words],
            "text_only": asdict(self.text_only) if self.text_only else None,
            "neutral_share": self.neutral_share,
        }


def check_leaks(
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    allow: bool,
    diseases: Iterable[Disease] = (),
) -> LeakReport:
    """Refuse texts that give the label away.

    Args:
        labels: the label set.
        allow: report it instead.
        diseases: of a map other than the packaged one; its names are looked for too.

    Raises:
        DataError: names of the label are in its texts, or a bag of words tells nearly every label.
    """
    report = find_leaks(rows, labels, diseases)
    if report.errors and not allow:
        raise DataError(
            list_problems(
                "data, column text: found the answer in the question, expected texts that can be"
                " written before the diagnosis is known. Choose another column or reword them; if"
                " they are right as they are: --allow-label-words",
                report.errors,
            )
        )
    return report


def find_leaks(
    rows: Sequence[Row], labels: Sequence[str], diseases: Iterable[Disease] = ()
) -> LeakReport:
    """Look for label words, for what a bag of words tells, and for labels that have no texts."""
    counts = Counter(row.label for row in rows)
    neutral = Counter(row.label for row in rows if row.text == NEUTRAL_TEXT)
    share = {label: neutral[label] / count for label, count in sorted(counts.items())}
    words = find_label_words(rows, label_names(labels, diseases))
    return LeakReport(words, text_only(rows), share)


def find_label_words(rows: Sequence[Row], names: Mapping[str, str]) -> tuple[LabelWord, ...]:
    """Find the names that give their label away.

    Args:
        names: name -> label, as `label_names` gives them.
    """
    words = re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, names), key=len, reverse=True))})\b")
    counts = Counter(row.label for row in rows)
    own: dict[str, list[str]] = {}
    others: Counter[str] = Counter()
    for row in rows:
        for name in set(words.findall(_plain(row.text))):
            if names[name] == row.label:
                own.setdefault(name, []).append(row.file)
            else:
                others[name] += 1

    def gives_away(name: str) -> bool:
        label = names[name]
        rest = len(rows) - counts[label]
        return len(own[name]) * rest > FREQUENCY_RATIO * others[name] * counts[label]

    return tuple(
        LabelWord(name, names[name], len(files), others[name], tuple(files[:MAX_SHOWN]))
        for name, files in sorted(own.items())
        if others[name] == 0 or gives_away(name)
    )


def label_names(labels: Iterable[str], diseases: Iterable[Disease] = ()) -> dict[str, str]:
    """Map every name of a label to it: its own, and those of the diseases that have it.

    Names are in the form that `find_label_words` searches: lower case, hyphens as spaces.
    """
    plain = {_plain(label): label for label in labels}
    names = dict(plain)
    for disease in (*diseases, *read_diseases()):
        own = [plain[name] for name in map(_plain, disease.names) if name in plain]
        label = own[0] if own else plain.get(_plain(disease.label))
        if label is not None:
            for name in disease.names:
                names.setdefault(_plain(name), label)
    return names


def text_only(rows: Sequence[Row]) -> TextOnly | None:
    """Tell the label from words and pairs of words, by logistic regression.

    Returns:
        None with fewer than two labels, MIN_PATIENTS patients, or two patients of a label.
    """
    patients: dict[str, set[str]] = {}
    for row in rows:
        patients.setdefault(row.label, set()).add(row.patient_id)
    fewest = min((len(found) for found in patients.values()), default=0)
    everyone = {row.patient_id for row in rows}
    if len(patients) < 2 or fewest < 2 or len(everyone) < MIN_PATIENTS:
        return None
    import_extra("sklearn", "training")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score
    from sklearn.model_selection import StratifiedGroupKFold

    # Words of one character count too: an age, a code, an eye.
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", binary=True)
    bags = words.fit_transform([row.text for row in rows])
    truth = np.array([row.label for row in rows])
    folds = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=0)
    told = np.empty_like(truth)
    for train, held in folds.split(bags, truth, [row.patient_id for row in rows]):
        if len(set(truth[train])) == 1:
            told[held] = truth[train][0]
            continue
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        told[held] = model.fit(bags[train], truth[train]).predict(bags[held])
    recall = recall_score(truth, told, average="macro", zero_division=0.0)
    return TextOnly(float(recall), 1 / len(patients))


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("-", " ").split())


def _describe(text_only: TextOnly) -> str:
    return (
        f"a bag of words tells the label with balanced accuracy {text_only.balanced_accuracy:.3f}"
        f" (chance {text_only.chance:.3f})"
    )

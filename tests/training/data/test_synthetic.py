import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mdf_sdk.errors import DataError
from mdf_training.data.rendering import MASK_KINDS, SIGNS, SIZE_PX, render
from mdf_training.data.synthetic import (
    EVIDENCE,
    GROSS_SIGNS,
    LABELS,
    LOOK_ALIKES,
    NEUTRAL_TEXT,
    TINY_SIGNS,
    SyntheticData,
    corpus,
)

DISTANT_SEED = 10_000  # no other test renders these cases


@pytest.fixture(scope="module")
def data():
    return SyntheticData(5000, seed=11)


@pytest.fixture(scope="module")
def findings(data):
    return [data.findings(i) for i in range(len(data))]


def words(text):
    return set(re.findall(r"[a-z0-9/]+", text.lower()))


# What is drawn


def test_a_case_is_the_same_whenever_it_is_asked_for(data):
    again = SyntheticData(6, seed=11)
    np.testing.assert_array_equal(data[5].image, again[5].image)
    np.testing.assert_array_equal(again[-1].image, again[5].image)
    assert data.rows[:6] == again.rows


def test_other_seeds_and_indices_give_other_cases(data):
    other = SyntheticData(1000, seed=12)
    assert not np.array_equal(other[0].image, data[0].image)
    assert not np.array_equal(data[1].image, data[0].image)
    shared = {row.text for row in other.rows} & {row.text for row in data.rows}
    assert len(shared) < 0.03 * len(other)


def test_a_data_set_ends_at_its_count():
    data = SyntheticData(3, seed=0)
    assert len(list(data)) == 3
    with pytest.raises(IndexError):
        data[3]


def test_a_data_set_without_cases_is_refused():
    with pytest.raises(DataError, match="expected at least 1"):
        SyntheticData(0, seed=0)


@pytest.mark.parametrize("sign", SIGNS)
def test_a_picture_is_a_round_photograph_with_a_bright_disc_and_dark_vessels(sign):
    image, masks = render(sign, np.random.default_rng([DISTANT_SEED, 1]))
    assert (image.shape, image.dtype) == ((SIZE_PX, SIZE_PX, 3), np.uint8)
    assert tuple(masks) == MASK_KINDS
    assert all(m.shape == image.shape[:2] and m.dtype == bool for m in masks.values())
    assert image[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 10
    field = image.max(axis=2) > 20
    assert 0.88 < field.any(axis=0).mean() < 0.96
    red, green, blue = image[field].mean(axis=0)
    assert red > green > blue
    disc = masks["disc"] & ~masks["vessel"] & ~masks["lesion"]
    vessel = masks["vessel"] & ~masks["disc"]
    brightness = image.mean(axis=2)
    assert brightness[disc].mean() > brightness[field].mean() + 30
    assert brightness[vessel].mean() < brightness[field].mean() - 15
    assert masks["lesion"].any() == (sign != "pale_disc")


def test_the_lesion_mask_holds_the_tiny_dots_and_nothing_else():
    image, masks = render("red_dots", np.random.default_rng(DISTANT_SEED))
    other, _ = render("dark_dots", np.random.default_rng(DISTANT_SEED))
    differs = np.abs(image.astype(int) - other).max(axis=2)
    assert 80 < masks["lesion"].sum() < 60 * 9
    assert np.median(differs[masks["lesion"]]) > 50
    assert (differs[~masks["lesion"]] > 50).mean() < 1e-3


# How it is decided


def test_labels_are_balanced_and_evidence_has_its_shares(findings):
    count = len(findings)
    assert abs(Counter(f.label for f in findings)["Acquired"] / count - 0.5) < 0.03
    evidence = Counter(f.evidence for f in findings)
    assert {kind: pytest.approx(n / count, abs=0.03) for kind, n in evidence.items()} == EVIDENCE


def test_the_bayes_accuracies_are_those_the_task_was_built_for():
    text = EVIDENCE["text"] + EVIDENCE["both"]
    picture = 1 - EVIDENCE["text"]
    assert sum(EVIDENCE.values()) == pytest.approx(1)
    assert 0.70 <= text + (1 - text) / 2 <= 0.74
    assert 0.84 <= picture + (1 - picture) / 2 <= 0.86


def test_a_sign_decides_exactly_where_the_picture_is_said_to_decide(findings):
    labels_of = {}
    for f in findings:
        labels_of.setdefault(f.sign, set()).add(f.label)
        assert (f.sign in LOOK_ALIKES) == (f.evidence == "text")
        side = LABELS.index(f.label)
        known = {**TINY_SIGNS[side], **GROSS_SIGNS[side]}
        assert f.disease in known
        if f.evidence == "tiny":
            assert TINY_SIGNS[side][f.disease] == f.sign
    assert set(labels_of) == set(SIGNS)
    assert all(len(labels) == 1 + (sign in LOOK_ALIKES) for sign, labels in labels_of.items())


def test_look_alikes_are_as_frequent_in_either_class(findings):
    for sign in LOOK_ALIKES:
        labels = [f.label for f in findings if f.sign == sign]
        assert abs(labels.count("Acquired") / len(labels) - 0.5) < 3 * 0.5 / np.sqrt(len(labels))


def test_nothing_in_the_picture_tells_the_classes_apart_where_the_text_decides(data, findings):
    features, label = [], []
    for index in [i for i, f in enumerate(findings) if f.evidence == "text"][:600]:
        case = data[index]
        sizes = [mask.mean() for mask in case.masks.values()]
        features.append([*sizes, *case.image.mean(axis=(0, 1)), *case.image.std(axis=(0, 1))])
        label.append(case.label == "Acquired")
    features, label = np.array(features), np.array(label)
    a, b = features[label], features[~label]
    z = (a.mean(0) - b.mean(0)) / np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert np.abs(z).max() < 3.5


# Texts


def test_texts_are_short_and_name_neither_disease_nor_class(data):
    forbidden = words(
        "acquired inherited hereditary genetic retinopathy diabetic degeneration macular drusen"
        " glaucoma retinitis pigmentosa dystrophy stargardt best vitelliform"
    )
    for text in corpus(2000, seed=5):
        assert not words(text) & forbidden
        assert 8 <= len(text.split()) <= 45
        assert "{" not in text
    vocabulary = set().union(*(words(row.text) for row in data.rows))
    assert 120 < len(vocabulary) < 400
    assert len({row.text for row in data.rows}) > 0.98 * len(data)


def test_the_corpus_is_the_texts_of_the_data_set(data):
    assert list(corpus(50, seed=11)) == [row.text for row in data.rows[:50]]
    assert NEUTRAL_TEXT not in corpus(50, seed=11)


def bag_of_words(texts, vocabulary):
    index = {word: i for i, word in enumerate(vocabulary)}
    bags = np.zeros((len(texts), len(vocabulary)))
    for bag, text in zip(bags, texts, strict=True):
        bag[[index[word] for word in words(text) if word in index]] = 1
    return bags


def naive_bayes_accuracy(texts, label, train):
    """Learn on the first `train` texts, and score the others."""
    vocabulary = sorted(set().union(*map(words, texts[:train])))
    bags = bag_of_words(texts, vocabulary)
    rate = [(bags[:train][label[:train] == c].sum(0) + 1) for c in (0, 1)]
    rate = [r / (2 + (label[:train] == c).sum()) for c, r in enumerate(rate)]
    score = bags @ np.log(rate[1] / rate[0]) + (1 - bags) @ np.log((1 - rate[1]) / (1 - rate[0]))
    return ((score[train:] > 0) == label[train:]).mean()


def test_words_alone_decide_about_half_of_the_cases(data, findings):
    texts = [row.text for row in data.rows]
    label = np.array([f.label == "Inherited" for f in findings])
    accuracy = naive_bayes_accuracy(texts, label, train=3000)
    print(f"all texts: {accuracy:.3f}")
    assert 0.64 < accuracy < 0.76


@pytest.mark.parametrize(
    ("kinds", "low", "high"), [(("text", "both"), 0.93, 1), (("gross", "tiny"), 0.42, 0.58)]
)
def test_words_decide_where_the_text_is_said_to_and_nowhere_else(data, findings, kinds, low, high):
    chosen = [i for i, f in enumerate(findings) if f.evidence in kinds]
    label = np.array([findings[i].label == "Inherited" for i in chosen])
    texts = [data.rows[i].text for i in chosen]
    accuracy = naive_bayes_accuracy(texts, label, train=2 * len(chosen) // 3)
    print(f"{kinds}: {accuracy:.3f}")
    assert low <= accuracy <= high


def test_no_single_word_gives_many_cases_away(data, findings):
    label = np.array([f.label == "Inherited" for f in findings])
    texts = [row.text for row in data.rows]
    bags = bag_of_words(texts, sorted(set().union(*map(words, texts))))
    agreement = (bags == label[:, None]).mean(axis=0)
    assert np.abs(agreement - 0.5).max() < 0.12


# Tiny signs


def resized(image, side_px):
    return np.asarray(
        Image.fromarray(image).resize((side_px, side_px), Image.Resampling.BILINEAR), np.float32
    )


def dot_statistics(picture):
    """Moments, tails and color correlations of what differs from its four neighbors."""
    neighbors = picture[:-2, 1:-1] + picture[2:, 1:-1] + picture[1:-1, :-2] + picture[1:-1, 2:]
    detail = picture[1:-1, 1:-1] - neighbors / 4
    y, x = np.indices(detail.shape[:2]) - (len(detail) - 1) / 2
    detail = detail[np.hypot(x, y) < 0.42 * len(detail)]  # (N, 3)
    correlation = np.corrcoef(detail.T)[np.triu_indices(3, 1)]
    tails = np.percentile(detail, (0.3, 1, 99, 99.7), axis=0)
    moments = [detail.mean(0), detail.std(0), (detail**3).mean(0), picture.mean(axis=(0, 1))]
    return np.concatenate([*moments, tails.ravel(), correlation])


def ridge_accuracy(features, label, train, penalty):
    """Fit a linear probe on the first `train` rows, and score the others."""
    x = (features - features[:train].mean(0)) / (features[:train].std(0) + 1e-6)
    y = 2.0 * label - 1
    gram = x[:train] @ x[:train].T + penalty * x.shape[1] * np.eye(train)
    score = x[train:] @ (x[:train].T @ np.linalg.solve(gram, y[:train]))
    return ((score > 0) == label[train:]).mean()


def test_tiny_signs_are_lost_at_48_px_and_plain_at_128_px():
    count, train = 900, 600
    label = np.arange(count) % 2 == 1
    statistics, pixels = {48: [], 128: []}, []
    for index in range(count):
        sign = "dark_dots" if label[index] else "red_dots"
        image, _ = render(sign, np.random.default_rng([DISTANT_SEED, index]))
        for side_px, found in statistics.items():
            found.append(dot_statistics(resized(image, side_px)))
        pixels.append(resized(image, 48).ravel())
    at_48, at_128 = (
        ridge_accuracy(np.array(s), label, train, penalty=0.1) for s in statistics.values()
    )
    of_pixels = ridge_accuracy(np.array(pixels), label, train, penalty=1)
    print(f"statistics at 48 px {at_48:.3f}, pixels {of_pixels:.3f}; at 128 px {at_128:.3f}")
    assert at_48 <= 0.6
    assert of_pixels <= 0.6
    assert at_128 >= 0.95


def test_exchanging_the_tiny_sign_changes_little_at_48_px():
    change, between_cases = {48: [], 128: []}, {48: [], 128: []}
    before = None
    for index in range(40):
        red, dark = (
            render(sign, np.random.default_rng([DISTANT_SEED, index]))[0]
            for sign in ("red_dots", "dark_dots")
        )
        for side_px in change:
            small = resized(red, side_px)
            change[side_px].append(np.sqrt(np.mean((small - resized(dark, side_px)) ** 2)))
            if before is not None:
                between_cases[side_px].append(
                    np.sqrt(np.mean((small - resized(before, side_px)) ** 2))
                )
        before = red
    ratio = {px: np.mean(change[px]) / np.mean(between_cases[px]) for px in change}
    print(f"change over the difference between cases: {ratio}")
    assert np.mean(change[48]) < 0.6  # of 255
    assert ratio[128] > 5 * ratio[48]


def test_rendering_needs_neither_torch_nor_scipy():
    code = "import sys, mdf_training.data.synthetic; print({'torch', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""Procedural cases that need both picture and text: `synthetic:COUNT:SEED` in, a data set out.

What decides a case is drawn first. Where the text decides, the picture shows a look-alike that
either class of its pair may have; where the picture decides, the text is neutral.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from mdf_sdk.errors import DataError
from mdf_training.data.cases import Case, Row
from mdf_training.data.rendering import MASK_KINDS, render

LABELS = ("Acquired", "Inherited")
NEUTRAL_TEXT = "No clinical information."

# Share of the cases that each kind of evidence decides. Text alone reaches 0.73 (what it does not
# decide is a coin's toss), the picture alone 0.85, a tower that misses tiny signs 0.715.
EVIDENCE = {"text": 0.30, "gross": 0.27, "tiny": 0.27, "both": 0.16}

# Sign -> the disease of either label that it may belong to.
LOOK_ALIKES = {
    "spots": ("age-related degeneration", "Stargardt"),
    "yolk": ("age-related degeneration", "Best"),
    "scars": ("diabetic retinopathy", "retinitis pigmentosa"),
    "pale_disc": ("glaucoma", "retinitis pigmentosa"),
}
# Disease of either label -> the sign that decides.
GROSS_SIGNS = (
    {
        "diabetic retinopathy": "exudates",
        "age-related degeneration": "atrophy",
        "glaucoma": "cupping",
    },
    {"retinitis pigmentosa": "spicules", "Stargardt": "bulls_eye", "Best": "layered_yolk"},
)
TINY_SIGNS = ({"diabetic retinopathy": "red_dots"}, {"retinitis pigmentosa": "dark_dots"})


@dataclass(frozen=True)
class Findings:
    """The truth behind a case, which no model sees.

    Args:
        evidence: a key of `EVIDENCE`: what decides the case.
        sign: what the picture shows, a key of `rendering.SIGNS`.
    """

    label: str
    disease: str
    evidence: str
    sign: str


class SyntheticData:
    """`count` rendered cases; case i of a seed is always the same, other seeds give unseen ones."""

    labels = LABELS
    mask_kinds = MASK_KINDS

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise DataError(f"found {count} cases, expected at least 1: synthetic:1000:{seed}")
        self.seed = seed
        self.rows = tuple(_row(seed, index) for index in range(count))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Case:
        index = range(len(self))[index]
        image, masks = render(self.findings(index).sign, _generator(self.seed, index, "picture"))
        return Case(**asdict(self.rows[index]), image=image, masks=masks)

    def read(self, index: int, least_px: int | None) -> Case:
        return self[index]

    def findings(self, index: int) -> Findings:
        """Give what is behind case `index`."""
        return _draw_findings(_generator(self.seed, index, "findings"))


def corpus(count: int, seed: int) -> Iterator[str]:
    """Yield the texts of `SyntheticData(count, seed)`."""
    return (_row(seed, index).text for index in range(count))


def _generator(seed: int, index: int, part: str) -> np.random.Generator:
    """Start the random numbers of one part of a case; no part moves those of another."""
    return np.random.default_rng([seed, index, ("findings", "text", "picture").index(part)])


def _row(seed: int, index: int) -> Row:
    findings = _draw_findings(_generator(seed, index, "findings"))
    return Row(
        file=f"images/{index:05d}.png",
        label=findings.label,
        text=_write_text(findings, _generator(seed, index, "text")),
        patient_id=f"synthetic-{seed}-{index}",
        source="synthetic",
    )


def _draw_findings(rng: np.random.Generator) -> Findings:
    side = int(rng.integers(2))
    evidence = str(rng.choice(list(EVIDENCE), p=list(EVIDENCE.values())))
    if evidence == "text":
        sign = _pick(rng, tuple(LOOK_ALIKES))
        disease = LOOK_ALIKES[sign][side]
    else:
        signs = (TINY_SIGNS if evidence == "tiny" else GROSS_SIGNS)[side]
        disease = _pick(rng, tuple(signs))
        sign = signs[disease]
    return Findings(LABELS[side], disease, evidence, sign)


INTRODUCTIONS = (
    "{age}-year-old {sex} with {complaint}.",
    "{age}-year-old {sex}, {complaint} for {months} months.",
    "Patient aged {age}, {sex}, reports {complaint}.",
    "Referred at {age} for {complaint}.",
    "This {age}-year-old {sex} came because of {complaint}.",
    "{sex} of {age} years with {complaint}.",
)
COMPLAINTS = (
    "blurred central vision",
    "blurred vision",
    "trouble seeing at night",
    "poor vision in dim light",
    "difficulty reading",
    "slowly falling sight",
    "glare in bright light",
    "distorted lines",
    "trouble with faces",
    "loss of side vision",
    "a dark spot in the middle",
    "tired eyes",
)
FILLERS = (
    "Visual acuity {acuity} right and {acuity} left.",
    "Sees {acuity} with glasses.",
    "Acuity {acuity}, better in the left eye.",
    "Acuity {acuity}, better in the right eye.",
    "Pupils were dilated for the photograph.",
    "The lens is clear.",
    "Wears glasses for reading.",
)

# Neutral histories speak of the same things as the decisive ones, and leave them open.
NEUTRAL = (
    "Family history is not known.",
    "It is not known whether a brother, sister or parent is affected.",
    "Past illness, diabetes or steroids, is not recorded.",
    "No record of eye pressure or blood sugar.",
    "Age at the first symptoms is not recorded.",
    "No gene test has been done.",
    "Adopted, nothing is known of mother or father.",
    "Cannot say when it began, as a child or after sixty.",
    "Earlier records, family and treatment, were not available.",
)
ACQUIRED = {
    "diabetic retinopathy": (
        "Has had diabetes for {years} years.",
        "Takes insulin for diabetes found {years} years ago.",
        "Blood sugar has been high for {years} years, blood pressure too.",
        "Diabetes of {years} years has already damaged the kidneys.",
    ),
    "age-related degeneration": (
        "Sight was good until the first symptoms after sixty.",
        "Has smoked for {years} years and saw well until after sixty.",
        "The first symptoms came late, after the age of sixty.",
        "It began {months} months ago, never before had any trouble with the eyes.",
    ),
    "glaucoma": (
        "Eye pressure was raised at {pressure} mmHg.",
        "Took steroids for {years} years, then eye pressure rose to {pressure} mmHg.",
        "Uses drops every day because eye pressure is high.",
        "Eye pressure has been high since an injury {years} years ago.",
    ),
}
# Said beside a decisive history, never alone.
NO_RELATIVE = (
    "No brother, sister or parent is affected.",
    "Family history is clear.",
    "Mother and father saw well all their lives.",
    "A gene test found no variant.",
    "Had no symptoms as a child.",
)
INHERITED = (
    "Symptoms began at the age of {onset}.",
    "Could not see well in the dark as a child.",
    "Teachers noticed the poor sight at school at the age of {onset}.",
    "The {relative} has the same eye disease.",
    "The {relative} is affected too, both since they were children.",
    "The {relative} lost sight early in life, so did a cousin.",
    "A gene test found a variant that explains it.",
    "The parents are cousins and the {relative} is affected.",
)
NO_CAUSE = (
    "No diabetes, eye pressure is normal.",
    "Never took steroids, never smoked.",
    "Blood sugar and blood pressure are normal.",
    "No injury, no drops, no past illness.",
    "Eye pressure is {normal_pressure} mmHg.",
)


def _write_text(findings: Findings, rng: np.random.Generator) -> str:
    """Write two to four short sentences; where the picture decides they know nothing of it."""
    histories: tuple[str, ...]
    company: tuple[str, ...]
    if findings.evidence not in ("text", "both"):
        ages, histories, company = (25, 66), NEUTRAL, NEUTRAL
    elif findings.label == "Inherited":
        ages, histories, company = (18, 61), INHERITED, NO_CAUSE
    else:
        ages = (64, 85) if findings.disease == "age-related degeneration" else (40, 75)
        histories, company = ACQUIRED[findings.disease], NO_RELATIVE
    history = _pick(rng, histories)
    told = [history]
    if rng.random() < 0.6:
        told.append(_pick(rng, tuple(sentence for sentence in company if sentence != history)))
    if rng.random() < 0.5:
        told.insert(int(rng.integers(len(told) + 1)), _pick(rng, FILLERS))
    text = " ".join([_pick(rng, INTRODUCTIONS), *told]).format(
        age=rng.integers(*ages),
        sex=_pick(rng, ("man", "woman")),
        complaint=_pick(rng, COMPLAINTS),
        months=rng.integers(2, 25),
        years=rng.integers(8, 31),
        onset=rng.integers(6, 16),
        pressure=rng.integers(26, 41),
        normal_pressure=rng.integers(12, 19),
        relative=_pick(rng, ("brother", "sister", "mother", "father")),
        acuity=_pick(rng, ("6/9", "6/12", "6/18", "6/24", "6/36", "6/60")),
    )
    return text[0].upper() + text[1:]


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]

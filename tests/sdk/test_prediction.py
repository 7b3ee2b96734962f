import json

import numpy as np
import numpy.typing as npt

from mdf_sdk import MDFClassifier

Picture = npt.NDArray[np.uint8]


def test_the_dict_survives_json_and_keeps_the_answer(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    prediction = classifier.predict(photograph, "a", mask=True, evidence=True)
    document = json.loads(json.dumps(prediction.to_dict(), allow_nan=False))
    assert document["label"] == prediction.label
    assert document["probabilities"] == prediction.probabilities
    assert document["mask_shares"] == prediction.mask_shares
    assert np.shape(document["evidence"]) == (7, 7)
    assert document["engine"]["manifest_sha256"] == prediction.engine.manifest_sha256


def test_what_was_not_asked_for_is_none_in_the_dict(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    document = classifier.predict(photograph, "a").to_dict()
    assert document["mask_shares"] is None
    assert document["evidence"] is None


def test_printing_shows_label_engine_and_notice(
    classifier: MDFClassifier, photograph: Picture
) -> None:
    prediction = classifier.predict(photograph, "a secret", mask=True)
    printed = str(prediction)
    assert printed.startswith(f"{prediction.label} 0.")
    assert "toy fp32 on cpu" in printed
    assert "vessel" in printed
    assert "not for clinical use" in printed
    assert "secret" not in printed

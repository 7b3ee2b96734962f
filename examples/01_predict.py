"""Classify one photograph: python examples/01_predict.py [PICTURE [TEXT]]"""

import sys
import tempfile
from pathlib import Path

from mdf_sdk import MDFClassifier, save_picture
from mdf_training.data.synthetic import SyntheticData

ENGINE = Path(__file__).parent / "demo_engine"


def main() -> None:
    case = SyntheticData(1, 3)[0]  # a rendered case, where no picture is given
    image = sys.argv[1] if len(sys.argv) > 1 else case.image
    text = sys.argv[2] if len(sys.argv) > 2 else case.text

    with MDFClassifier(ENGINE) as classifier:
        prediction = classifier.predict(image, text, mask=True, evidence=True)
        print(prediction)

        # What depends on the picture alone is kept: another text about it runs the decoder only.
        again = classifier.predict(image, "No clinical information.")
        print(f"without the text: {again.label} {again.probability:.3f}")
        print(
            f"vision tower {again.latency_ms['vision']} ms, all {again.latency_ms['total']:.1f} ms"
        )

    picture = Path(tempfile.mkdtemp()) / "prediction.png"
    save_picture(picture, image, prediction)
    print(f"photograph, mask and evidence map: {picture}")


if __name__ == "__main__":
    main()

"""Score a folder with labels.csv: python examples/03_score_a_folder.py [FOLDER [OUT.csv]]"""

import csv
import sys
import tempfile
from pathlib import Path

from mdf_sdk import MDFClassifier
from mdf_training import open_data
from mdf_training.data.folder import save_data
from mdf_training.data.synthetic import SyntheticData

ENGINE = Path(__file__).parent / "demo_engine"
BATCH = 8


def main() -> None:
    scratch = Path(tempfile.mkdtemp())
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else scratch / "data"
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else scratch / "predictions.csv"
    if len(sys.argv) == 1:
        save_data(SyntheticData(24, 4), folder)

    data = open_data(str(folder))
    with MDFClassifier(ENGINE) as classifier, out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "predicted", "probability"])
        for start in range(0, len(data), BATCH):
            cases = [data[i] for i in range(start, min(start + BATCH, len(data)))]
            images, texts = [c.image for c in cases], [c.text for c in cases]
            for case, p in zip(cases, classifier.predict_batch(images, texts), strict=True):
                writer.writerow([case.file, case.label, p.label, f"{p.probability:.4f}"])
    print(f"{len(data)} cases: {out}")


if __name__ == "__main__":
    main()

"""Train a tiny model on rendered cases and export it: python examples/02_train_and_export.py"""

import tempfile
from pathlib import Path

from mdf_export import build_engine
from mdf_sdk import MDFClassifier, verify_engine
from mdf_training import train
from mdf_training.data.synthetic import SyntheticData
from mdf_training.recipes import Recipe


def main() -> None:
    folder = Path(tempfile.mkdtemp())

    # Two epochs on 64 cases show the road, not a result: README.md has the recipe that learns.
    recipe = Recipe(epochs=2, batch_size=16)
    provenance = train("nano", "synthetic:64:1", folder / "checkpoint", recipe=recipe)
    print(f"validation loss {provenance['history'][-1]['validation_loss']:.3f}")

    manifest = build_engine(folder / "checkpoint", folder / "engine", "int4")
    print(
        f"engine with {len(manifest.files)} files, verified: {verify_engine(folder / 'engine').ok}"
    )

    case = SyntheticData(1, 2)[0]
    with MDFClassifier(folder / "engine") as classifier:
        print(classifier.predict(case.image, case.text))


if __name__ == "__main__":
    main()

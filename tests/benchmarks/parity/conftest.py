"""One reference for all tests of parity, and faults planted in copies of real engines."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from onnx import numpy_helper

from mdf_benchmarks.parity.decisions import Thresholds
from mdf_benchmarks.parity.reference import Reference, run_reference
from mdf_export.graph import save_graph
from mdf_sdk.integrity import digest
from mdf_sdk.manifest import MANIFEST_NAME, Manifest, load_manifest, save_manifest
from mdf_training.data.folder import open_data

DATA = "synthetic:16:4242"
# Random weights decide near the middle: a wide margin is all that 16 cases can show of them.
WIDE = Thresholds(margin=0.4)


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Reference:
    return run_reference(tiny_checkpoint, open_data(DATA), DATA)


@dataclasses.dataclass(frozen=True)
class Planter:
    """Changes a copy of an engine and renews the manifest's digests, as who exported it wrong."""

    folder: Path

    def copy(self, engine: Path) -> Path:
        return shutil.copytree(engine, self.folder / f"engine{len(list(self.folder.iterdir()))}")

    def change_graph(
        self, engine: Path, block: str, change: Callable[[onnx.GraphProto], None]
    ) -> Path:
        faulty = self.copy(engine)
        path = faulty / f"{block}.onnx"
        model = onnx.load(path)
        change(model.graph)
        save_graph(model, path)
        return self.seal(faulty)

    def change_constants(
        self,
        engine: Path,
        block: str,
        pattern: Callable[[str], bool],
        change: Callable[[np.ndarray], np.ndarray],
    ) -> Path:
        """Change every constant whose name the pattern takes; at least one."""

        def apply(graph: onnx.GraphProto) -> None:
            chosen = [tensor for tensor in graph.initializer if pattern(tensor.name)]
            assert chosen
            for tensor in chosen:
                value = numpy_helper.to_array(tensor)
                changed = np.ascontiguousarray(change(value), value.dtype)
                assert (changed != value).any()
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))

        return self.change_graph(engine, block, apply)

    def change_manifest(self, engine: Path, change: Callable[[Manifest], Manifest]) -> Path:
        faulty = self.copy(engine)
        return self.seal(faulty, change)

    def seal(
        self, engine: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest
    ) -> Path:
        files = {p.name: digest(p) for p in sorted(engine.iterdir()) if p.name != MANIFEST_NAME}
        manifest = change(load_manifest(engine))
        save_manifest(dataclasses.replace(manifest, files=files), engine)
        return engine


@pytest.fixture
def planter(tmp_path: Path) -> Planter:
    (tmp_path / "planted").mkdir()
    return Planter(tmp_path / "planted")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private key and its public half."""
    return make_keys(tmp_path_factory.mktemp("keys"))


def make_keys(folder: Path) -> tuple[Path, Path]:
    key, pem = Ed25519PrivateKey.generate(), Encoding.PEM
    private, public = folder / "private.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(pem, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo))
    return private, public

"""Run an MDF-MLLM engine: a fundus photograph and a clinical text in, a `Prediction` out.

    from mdf_sdk import MDFClassifier
    prediction = MDFClassifier("engine_dir").predict("eye.jpg", "58 years old, blurred vision")

Every error is an `MDFError`; see `mdf_sdk.errors` for the tree.
"""

from mdf_sdk.classifier import MDFClassifier
from mdf_sdk.errors import (
    BackendError,
    BackendRunError,
    BackendUnavailableError,
    BusyError,
    CertificateError,
    CheckpointError,
    ClosedError,
    DataError,
    DeviceMemoryError,
    EngineError,
    ImageError,
    InputError,
    IntegrityError,
    ManifestError,
    MDFError,
    MissingExtraError,
    SignatureError,
    StorageError,
    TextError,
)
from mdf_sdk.integrity import check_files
from mdf_sdk.manifest import Manifest, load_manifest
from mdf_sdk.photograph import load_image
from mdf_sdk.picture import save_picture
from mdf_sdk.prediction import EngineIdentity, Prediction
from mdf_sdk.verify import VerifyReport, verify_engine

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendRunError",
    "BackendUnavailableError",
    "BusyError",
    "CertificateError",
    "CheckpointError",
    "ClosedError",
    "DataError",
    "DeviceMemoryError",
    "EngineError",
    "EngineIdentity",
    "ImageError",
    "InputError",
    "IntegrityError",
    "MDFClassifier",
    "MDFError",
    "Manifest",
    "ManifestError",
    "MissingExtraError",
    "Prediction",
    "SignatureError",
    "StorageError",
    "TextError",
    "VerifyReport",
    "__version__",
    "check_files",
    "load_image",
    "load_manifest",
    "save_picture",
    "verify_engine",
]

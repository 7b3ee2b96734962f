"""Training: fundus photographs and clinical texts in, a full-precision fused checkpoint out.

Everything here but the data sets and `evaluate` needs the extra `training`, and imports it on first
use.
"""

from mdf_sdk.extras import import_extra

_HOMES = {
    "build_model": "mdf_training.model",
    "train": "mdf_training.trainer",
    "load_checkpoint": "mdf_training.checkpoint",
    "save_checkpoint": "mdf_training.checkpoint",
    "evaluate": "mdf_training.evaluation.evaluate",
    "open_scorer": "mdf_training.evaluation.evaluate",
    "open_data": "mdf_training.data.folder",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_extra(_HOMES[name], "training"), name)

"""Export: a full-precision checkpoint in, an engine directory that runs without torch out."""

from mdf_sdk.extras import import_extra

__all__ = ["build_engine"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_extra("mdf_export.engine", "export"), name)

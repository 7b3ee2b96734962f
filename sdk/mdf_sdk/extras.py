"""Heavy modules, imported where they are needed, with the install line in the failure."""

import importlib
from types import ModuleType

from mdf_sdk.errors import MissingExtraError


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of this distribution that needs an extra.

    Raises:
        MissingExtraError: a package of the extra is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("mdf_"):
            raise
        raise MissingExtraError(
            f"{module}: found no installed package {error.name}, expected the extra {extra!r}. "
            f"Install it: pip install 'mdf-mllm[{extra}]'"
        ) from error

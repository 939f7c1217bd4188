"""Optional dependencies: one line that says what is missing and how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

from d2llm.core.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: the module to import, for example ``"peft"``.
        extra: the extra of d2llm that brings it, for example ``"train"``.
        purpose: what it is needed for, as a noun phrase ("LoRA tuning").

    Raises:
        MissingExtraError: one line naming the module, the purpose and the pip command, or what kept an installed
            module from being imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if not _is_missing(module, error):
            raise MissingExtraError(
                f"{purpose} needs the package '{module}', which is installed but cannot be imported ({error}): "
                f"pip install --upgrade 'd2llm[{extra}]'"
            ) from error
        raise MissingExtraError(
            f"{purpose} needs the package '{module}', which is not installed: pip install 'd2llm[{extra}]'"
        ) from error


def _is_missing(module: str, error: ImportError) -> bool:
    """Whether ``module`` itself, or a package that it lies in, was not found, rather than something that it imports."""
    return isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")

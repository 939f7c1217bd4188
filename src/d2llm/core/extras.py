"""Optional dependencies, and a one-line error that says what is missing and how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType

from d2llm.core.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: the module to import, for example ``"peft"``.
        extra: the extra of d2llm that installs it, for example ``"train"``.
        purpose: what it is needed for, as a noun phrase ("LoRA tuning").

    Raises:
        MissingExtraError: the module is not installed or cannot be imported; one line names the module, the purpose
            and the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # Missing is the module itself or one of its parent packages; anything else is something that it imports.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            problem = f"which is not installed: pip install 'd2llm[{extra}]'"
        else:
            problem = f"which is installed but cannot be imported ({error}): pip install --upgrade 'd2llm[{extra}]'"
        raise MissingExtraError(f"{purpose} needs the package '{module}', {problem}") from error

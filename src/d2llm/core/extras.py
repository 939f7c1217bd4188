"""Optional dependencies, and a one-line error that says what is missing and how to install it."""

from __future__ import annotations

import importlib
import sys
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


def require_openvino(purpose: str) -> ModuleType:
    """Import OpenVINO without its telemetry; errors are those of ``require``.

    When it is imported, it writes an id into the user's home folder, and sends an event to Google Analytics from a fork
    of this process, unless the user has opted out. Without the package that does so, it uses a stub of its own.
    """
    telemetry = "openvino_telemetry"
    if "openvino" in sys.modules or telemetry in sys.modules:  # somebody else's decision
        return require("openvino", extra="export", purpose=purpose)
    sys.modules[telemetry] = None  # pyright: ignore[reportArgumentType]  # an import of it is now an ImportError
    try:
        return require("openvino", extra="export", purpose=purpose)
    finally:
        del sys.modules[telemetry]

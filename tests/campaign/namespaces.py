"""A script in namespaces of Linux, where it may mount disks and cut networks without any rights outside of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache

_INSIDE = "D2LLM_TEST_NAMESPACES"


@cache
def why_not() -> str:
    """Why there are no namespaces here; "" if there are."""
    if shutil.which("unshare") is None:
        return "needs Linux with unshare"
    tried = subprocess.run(["unshare", "-rmn", "true"], capture_output=True, text=True, check=False)
    return tried.stderr


def enter(module: str) -> None:
    """Begin the script anew as root of its own namespaces of users, mounts and networks."""
    if _INSIDE not in os.environ:
        command = ["unshare", "-rmn", sys.executable, "-m", module, *sys.argv[1:]]
        os.execvpe("unshare", command, os.environ | {_INSIDE: "1"})


def run_as_root(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, capture_output=True)

"""A virtual environment that links to all packages installed here, except d2llm."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

WITHOUT = "d2llm"


def write_bare_environment(folder: Path) -> Path:
    """Create the environment and return its Python. The ``.pth`` files of editable installations are left out too."""
    venv.EnvBuilder(symlinks=os.name != "nt", with_pip=False).create(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    report = subprocess.run(
        [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    packages = Path(report.stdout.strip())
    for source in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(source).iterdir():
            if WITHOUT in path.name or path.suffix == ".pth" or (packages / path.name).exists():
                continue
            (packages / path.name).symlink_to(path, target_is_directory=path.is_dir())
    return python

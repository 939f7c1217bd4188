"""Run the notebooks of docs/notebooks in empty folders, and store what their cells print.

    python scripts/run_notebooks.py [NOTEBOOK ...]

A cell prints; it shows nothing else, so no kernel is needed. The tests run them and compare.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"


def outputs(notebook: dict[str, Any], folder: Path) -> list[str]:
    """What each cell of code prints, run in order in a folder."""
    names: dict[str, object] = {"__name__": "__main__"}
    printed: list[str] = []
    with _in_folder(folder):
        for index, cell in enumerate(notebook["cells"]):
            if cell["cell_type"] == "code":
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    exec(compile("".join(cell["source"]), f"cell {index + 1}", "exec"), names)
                printed.append(output.getvalue())
    return printed


def stored_outputs(notebook: dict[str, Any]) -> list[str]:
    """What each cell of code printed when it was stored."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in cells]


def store(notebook: dict[str, Any], printed: list[str]) -> str:
    """The notebook as text, with what its cells printed."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(cells, printed, strict=True), start=1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell.update(execution_count=number, outputs=[stream] if text else [])
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:  # contextlib.chdir is of Python 3.11
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> None:
    """Run the named notebooks, or all."""
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        with TemporaryDirectory() as folder:
            printed = outputs(notebook, Path(folder))
        path.write_text(store(notebook, printed), encoding="utf-8")


if __name__ == "__main__":
    main()

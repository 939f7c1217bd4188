"""A copy of a student with all weights of its backbone, so that whoever has the folder needs nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

from d2llm.models.student import Student
from d2llm.models.student_files import ADAPTER_FILE, BACKBONE_FOLDER


def merge_student(folder: Path, copy: Path) -> None:
    """Write the student in ``folder`` to ``copy`` with all weights, in float32: those of no machine in particular.

    What else there is goes along: what the manifest records, the card as it is, a licence.

    Raises:
        D2LLMError: the student cannot be loaded (``Student.load``).
    """
    Student.load(folder, device="cpu", dtype="float32").save(copy, merge=True)
    for path in folder.iterdir():
        ours = (copy / path.name, copy / BACKBONE_FOLDER / path.name)
        if path.suffix == ".md" or (path.is_file() and path.name != ADAPTER_FILE and not any(map(Path.exists, ours))):
            shutil.copyfile(path, copy / path.name)

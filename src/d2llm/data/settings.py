"""The settings of reading files as documents: the same in Python and on the command line."""

from __future__ import annotations

from typing import ClassVar

from d2llm.core.errors import InputError
from d2llm.core.settings import Settings, Shown, setting


def _megabytes(text: str, option: str) -> int:
    try:
        return int(text) << 20
    except ValueError:
        raise InputError(f"{option} is {text!r}; give a whole number of megabytes") from None


class ReadingSettings(Settings):
    """How files of documents are found and read.

    Example:
        >>> from d2llm import find_documents
        >>> len(find_documents("docs", max_bytes=1_000_000, exclude="tea.*").files)
        1
    """

    noun: ClassVar[str] = "setting of reading documents"

    exclude: tuple[str, ...] = setting(
        (),
        "Leave these out of folders of documents, as in a .gitignore; may be given several times.",
        Shown(metavar="PATTERN"),
        strict=False,
    )
    follow_links: bool = setting(
        True, "Whether to read what symbolic links in folders of documents lead to, which may be outside of them."
    )
    max_bytes: int = setting(100 << 20, "Skip larger files.", Shown(python_only=True), ge=0)
    seconds_per_file: float = setting(
        120.0,
        "Skip documents that take longer than N seconds to read.",
        Shown(option="file_seconds", metavar="N"),
        gt=0,
    )
    memory_per_file: int = setting(
        2 << 30,
        "Skip documents that take more memory to read (Linux): bytes in Python, megabytes on the command line. "
        "At least 64.",
        Shown(option="file_memory", metavar="MB", default="2048, which is 2 GiB", parse=_megabytes),
        ge=64 << 20,
    )
    ocr: str | None = setting(
        None,
        "Languages of text in pictures and scanned pages, such as eng+chi_sim, which the program tesseract recognises; "
        "none: no recognition.",
        Shown(metavar="LANGUAGES", default="eng if tesseract is installed"),
    )

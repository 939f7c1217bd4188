"""Text in pictures, recognised by the program tesseract if it is installed (OCR)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from functools import cache
from itertools import groupby
from pathlib import Path

from d2llm.core.errors import InputError
from d2llm.core.types import Section
from d2llm.data.contents import FileContents, SkippedPart, UnreadableFileError

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"})
"""The suffixes of pictures, which are read if their text can be recognised."""
OFF = "none"
NOT_RECOGNISED = "it is a picture; to recognise its text (OCR), install the program tesseract"
NO_TEXT = "no text was recognised in it"
_PROGRAM = "tesseract"
_DEFAULT = "eng"
_LAYOUT = "osd"  # the data with which it finds out how a page is turned
_SIGNATURES = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|II[*+]\0|MM\0[*+]|RIFF....WEBP|P5 ", re.DOTALL)
_MIN_CONFIDENCE = 50.0  # of 100; a page that was read upside down has 39, a scan with noise 96
_FRACTION_OF_TIME = 0.9  # of a file's, so that what was recognised is returned in time
_WORD_LEVEL = "5"  # of a line of its table
_HYPHEN = "\ufffe"  # PDFium's sign for a hyphen at the end of a line, whose parts it joins
_SPLIT_WORD = re.compile(rf"(\w+){_HYPHEN}\s*(\w+)")
_NAMED_PAGES = 20
_HAN = "[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
_BETWEEN_HAN = re.compile(rf"(?<={_HAN}) (?={_HAN})")


def languages_of(setting: str | None) -> str:
    """The languages to recognise, joined by "+" as in ``eng+chi_sim``, or "" if no text is recognised.

    Args:
        setting: the languages, ``none``, or None: English if tesseract is installed.

    Raises:
        InputError: tesseract cannot be started, or it or the data of one of these languages are not installed.
    """
    if setting == OFF:
        return ""
    installed = _installed_languages()
    if setting is None and _DEFAULT not in installed:
        return ""
    languages = setting or _DEFAULT
    if not installed:
        raise InputError(f"text in {languages} cannot be recognised: the program tesseract is not installed")
    if missing := [name for name in languages.split("+") if name not in installed]:
        raise InputError(
            f"text in {', '.join(missing)} cannot be recognised: tesseract has only {', '.join(sorted(installed))}; "
            f"install its data (on Debian, chi_sim is tesseract-ocr-chi-sim), or write {OFF} to recognise no text"
        )
    return languages


@cache
def _installed_languages() -> frozenset[str]:
    """The languages that tesseract knows; none if it is not installed."""
    program = shutil.which(_PROGRAM)
    if program is None:
        return frozenset()
    try:
        listed = subprocess.run([program, "--list-langs"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"{program} cannot be started ({error.strerror}); write {OFF} to recognise no text") from error
    return frozenset(listed.stdout.split("\n")[1:]) - {""}


class Recogniser:
    """Recognises text in the pictures of one file, which takes at most ``seconds`` to read from now on."""

    def __init__(self, languages: str, seconds: float) -> None:
        self._languages = languages
        self._seconds = seconds
        self._end = time.monotonic() + _FRACTION_OF_TIME * seconds

    def seconds_left(self) -> float:
        """The time that is left, or an ``UnreadableFileError`` if there is none."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise self._late()
        return seconds

    def _late(self) -> UnreadableFileError:
        return UnreadableFileError(
            f"there was no time to recognise its text; allow more than {self._seconds:g} s for a file"
        )

    def read(self, picture: bytes) -> list[str]:
        """The text of each page of a picture in PNG, JPEG, TIFF, WebP or PGM ("" if there is none).

        A hyphen at the end of a line is written as PDFium does (``with_whole_words``).

        Raises:
            UnreadableFileError: its text cannot be recognised, or there is no time for it.
        """
        seconds_left = self.seconds_left()
        # Else tesseract takes it for a list of pictures to read, which may be anywhere.
        if _SIGNATURES.match(picture) is None:
            raise UnreadableFileError("it is no picture in PNG, JPEG, TIFF or WebP")
        mode = "1" if _LAYOUT in _installed_languages() else "3"
        options = ("stdin", "stdout", "-l", self._languages, "--psm", mode, "tsv")
        try:
            done = subprocess.run(
                [_PROGRAM, *options],
                input=picture,
                capture_output=True,
                check=True,
                timeout=seconds_left,
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},  # files are read at the same time
            )
        except subprocess.TimeoutExpired as error:
            raise self._late() from error
        except OSError as error:
            raise UnreadableFileError(
                f"tesseract cannot be started ({error.strerror}) to recognise its text"
            ) from error
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
            raise UnreadableFileError(f"its text cannot be recognised (tesseract: {lines[-1][:200]})") from error
        return _pages_of(done.stdout.decode(errors="replace"))


def _pages_of(table: str) -> list[str]:
    """The text of each page from tesseract's table, whose rows have 12 columns (a page, block, ..., a word)."""
    rows = [line.split("\t") for line in table.splitlines()[1:]]
    pages: list[str] = []
    for _, of_page in groupby((row for row in rows if len(row) == 12), key=lambda row: row[1]):
        words = [row for row in of_page if row[0] == _WORD_LEVEL and row[11].strip()]
        num_chars = sum(len(row[11]) for row in words)
        confidence = sum(float(row[10]) * len(row[11]) for row in words)
        is_legible = confidence >= _MIN_CONFIDENCE * num_chars
        paragraphs = (_paragraph(list(of_one)) for _, of_one in groupby(words, key=lambda row: row[2:4]))
        pages.append("\n\n".join(paragraphs) if is_legible else "")
    return pages


def _paragraph(words: list[list[str]]) -> str:
    lines = [" ".join(row[11] for row in line) for _, line in groupby(words, key=lambda row: row[4])]
    text = "\n".join(_BETWEEN_HAN.sub("", line) for line in lines)
    return re.sub(r"(?<=\w)-\n(?=\w)", f"{_HYPHEN}\n", text)


def read_picture(path: Path, recogniser: Recogniser | None) -> FileContents:
    """The text of a picture, a section for each page of a TIFF.

    Raises:
        UnreadableFileError: it has no text, or it cannot be recognised.
    """
    if recogniser is None:
        raise UnreadableFileError(NOT_RECOGNISED)
    pages = with_whole_words(recogniser.read(path.read_bytes()))
    numbered = list(enumerate(pages, start=1))
    sections = tuple(Section(text, page=n if len(pages) > 1 else None) for n, text in numbered if text)
    blank = [n for n, text in numbered if not text]
    skipped = (SkippedPart(page_names(blank), NO_TEXT),) if blank and sections else ()
    if not sections:
        raise UnreadableFileError(NO_TEXT)
    return FileContents("", sections, skipped=skipped, has_pictures=True)


def page_names(numbers: list[int]) -> str:
    """Pages by their numbers, such as "pages 2, 4"; of many, the first."""
    names = ", ".join(map(str, numbers[:_NAMED_PAGES]))
    more = f" and {len(numbers) - _NAMED_PAGES:,} more" if len(numbers) > _NAMED_PAGES else ""
    return f"page{'s' if len(numbers) > 1 else ''} {names}{more}"


def with_whole_words(pages: list[str]) -> list[str]:
    """Pages whose words are whole where they were split at the end of a line.

    A hyphen stays if the rest of the file has the word with it rather than without, or knows both parts as words, or
    if the second part begins with a capital letter or a digit.
    """
    if not any(_HYPHEN in page for page in pages):
        return pages
    whole = (re.sub(_SPLIT_WORD, " ", page) for page in pages)
    words = [word.casefold() for page in whole for word in re.findall(r"\w+(?:-\w+)*", page)]
    known = Counter([*words, *(part for word in words if "-" in word for part in word.split("-"))])

    def joined(match: re.Match[str]) -> str:
        compound, word = f"{match[1]}-{match[2]}", match[1] + match[2]
        with_hyphen, without = known[compound.casefold()], known[word.casefold()]
        if with_hyphen or without:
            return compound if with_hyphen > without else word
        is_name = not match[2][0].islower() and not match[1].isupper()
        are_words = min(len(match[1]), len(match[2])) > 2 and all(known[part.casefold()] for part in match.groups())
        return compound if is_name or are_words else word

    return [re.sub(_SPLIT_WORD, joined, page).replace(_HYPHEN, "-") for page in pages]

"""When two texts are the same, and passages that repeat another's: they must not count as negatives."""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Iterable

from d2llm.data.beir import Dataset


def comparable(text: str) -> str:
    """What of a text is compared: letters (with their marks) and digits, in lower case, words apart by one space."""
    return " ".join(_words().findall(unicodedata.normalize("NFKC", text).casefold()))


class SameText:
    """Finds passages that repeat another's text; what is compared, ``comparable`` says."""

    def __init__(self, dataset: Dataset) -> None:
        self._text_of: dict[str, str] = {}
        self._ids_of: dict[str, list[str]] = {}
        for passage in dataset.passages.values():
            text = comparable(passage.text)
            self._text_of[passage.id] = text
            self._ids_of.setdefault(text, []).append(passage.id)

    def as_any_of(self, passage_ids: Iterable[str]) -> set[str]:
        """Other passages with the text of one of these. A text without letters and digits equals no other."""
        given = set(passage_ids)
        texts = {self._text_of[passage_id] for passage_id in given} - {""}
        return {passage_id for text in texts for passage_id in self._ids_of[text]} - given


@functools.cache
def _words() -> re.Pattern[str]:
    # \w alone leaves out the vowel signs of Hindi or Thai, and so makes one word of two.
    marks = "".join(chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")
    return re.compile(rf"[\w{marks}]+")

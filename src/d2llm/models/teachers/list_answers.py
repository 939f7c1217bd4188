"""Reads what a language model says about a numbered list of passages: grades, or a ranking.

Nothing but numbers is taken from an answer, so an instruction that was hidden in a passage can at worst give wrong
numbers. What is missing or doubtful is left out, never guessed: the caller asks again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.json_values import parse_json
from d2llm.core.types import Task
from d2llm.models.prompt_sets import read_prompt_section
from d2llm.models.remote.completions import without_thoughts

_FENCE = re.compile(r"^(?:```|~~~)[\w-]*\s*$", re.M)
_NUMBER = r"\d{1,3}(?:\.\d+)?"
_GRADE_LINE = re.compile(
    rf"""^\s*(?:[-*•|]\s+)?(?:\*\*)?(?:passage|text|document|段落|文本|文章)?\s*
    [\[(（【#]?\s*(?P<place>\d{{1,3}})\s*[\])）】]?\s*(?:\*\*)?\s*
    (?:[:：=|,，]|[.–—-]\s|->|→|\s)\s*(?:\*\*)?(?:grade|score|分数|评分|得分)?\s*[:：=]?\s*
    (?P<grade>-?{_NUMBER})\s*(?:/\s*100|分)?(?:\*\*)?\s*[.;,，。；|]?\s*$""",
    re.I | re.X,
)
_RANKING_SIGNS = re.compile(r"[\[\]()（）【】>＞»→,，;；\s]|->")
_PLACE = re.compile(r"\d{1,3}")
_PLACE_NAMES = ("passage", "place", "id", "number", "index", "text", "document")
_GRADE_NAMES = ("grade", "score", "relevance", "rating")
_LISTS = ("grades", "scores", "ranking", "passages", "results", "answer", "answers")


def read_grades(answer: str, num_passages: int) -> dict[int, float]:
    """The grades, 0 to 100, by the passage's number in the list, from 1 to ``num_passages``.

    Read are, in JSON, a list of as many numbers as there are passages, an object of number and grade, or a list of such
    objects; and lines such as ``[3] 85``, ``3: 85/100`` or ``Passage 3 - 85``. A passage has no grade if it occurs with
    two different ones, or with anything but a number from 0 to 100. An answer about passages that were not shown, or a
    plain list of another length, gives no grade at all: nobody knows then which number belongs to which passage.

    >>> read_grades('{"1": 90, "2": "none", "3": 5}', 3)
    {1: 90.0, 3: 5.0}
    """
    text = _plain(answer)
    found = _grades_in_json(text, num_passages)
    if found is None:
        matches = (_GRADE_LINE.match(line) for line in text.splitlines())
        found = [(int(match["place"]), match["grade"]) for match in matches if match]
    grades: dict[int, float] = {}
    doubtful: set[int] = set()
    for position, value in found:
        if not 1 <= position <= num_passages:
            return {}
        grade = _grade(value)
        if grade is None or grades.get(position, grade) != grade:
            doubtful.add(position)
        else:
            grades[position] = grade
    return {position: grades[position] for position in sorted(grades.keys() - doubtful)}


def read_ranking(answer: str, num_passages: int) -> list[int]:
    """The passages' numbers, from 1 to ``num_passages``, best first; empty if the answer is no ranking.

    Read are ``[2] > [3] > [1]``, numbers with commas or on lines of their own, and a list in JSON. Of several lines
    with rankings, the longest counts, and of these the last: models think first. A number that occurs twice, or was not
    shown, makes the answer none; numbers may be missing.

    >>> read_ranking("The order is: [2] > [3] > [1]", 3)
    [2, 3, 1]
    """
    text = _plain(answer)
    value = _json(text)
    if isinstance(value, dict):
        value = _first_of(cast("dict[str, Any]", value), _LISTS)
    if isinstance(value, list):
        items: list[Any] = [
            _first_of(cast("dict[str, Any]", item), _PLACE_NAMES) if isinstance(item, dict) else item
            for item in cast("list[Any]", value)
        ]
        ranking = [_rank(item) for item in items]
        return (
            _distinct([position for position in ranking if position is not None], num_passages)
            if None not in ranking
            else []
        )
    lines = [line for line in text.splitlines() if line.strip()]
    candidates = [line.partition(":")[2] if ":" in line else line for line in lines]
    of_lines = [[int(digits) for digits in _PLACE.findall(line)] for line in candidates if _is_ranking(line)]
    longest = max(map(len, of_lines), default=0)
    if longest > 1:
        return _distinct([numbers for numbers in of_lines if len(numbers) == longest][-1], num_passages)
    return _distinct([position for numbers in of_lines for position in numbers], num_passages)


def _plain(answer: str) -> str:
    return _FENCE.sub("", without_thoughts(answer) or "").strip()


def _grades_in_json(text: str, num_passages: int) -> list[tuple[int, Any]] | None:
    """Pairs of place and grade, None if the text is not JSON."""
    value = _json(text)
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        inner = _first_of(named, _LISTS)
        if isinstance(inner, (dict, list)):
            value = inner
    if isinstance(value, dict):
        found = [(_rank(name), grade) for name, grade in cast("dict[str, Any]", value).items()]
        return [(position, grade) for position, grade in found if position is not None]
    if not isinstance(value, list):
        return None
    items = cast("list[Any]", value)
    if items and all(isinstance(item, dict) for item in items):
        found = [(_rank(_first_of(item, _PLACE_NAMES)), _first_of(item, _GRADE_NAMES)) for item in items]
        return [(position, grade) for position, grade in found if position is not None]
    return list(enumerate(items, start=1)) if len(items) == num_passages else []


def _json(text: str) -> Any:
    """The value if the text is JSON, or has one list or object in JSON with words around it; else None."""
    for start, end in (("", ""), ("{", "}"), ("[", "]")):
        first, last = (text.find(start), text.rfind(end) + 1) if start else (0, len(text))
        if 0 <= first < last:
            try:
                value = parse_json(text[first:last])
            except ValueError:
                continue
            if isinstance(value, (dict, list)) and (not start or not _is_one_rank(cast("Any", value))):
                return cast("Any", value)
    return None


def _is_one_rank(value: Any) -> bool:
    return isinstance(value, list) and len(cast("list[Any]", value)) == 1


def _first_of(values: dict[str, Any], names: Sequence[str]) -> Any:
    lower = {name.lower(): value for name, value in values.items()}
    return next((lower[name] for name in names if name in lower), None)


def _rank(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    numbers = _PLACE.findall(value) if isinstance(value, str) else []
    return int(numbers[0]) if len(numbers) == 1 else None


def _grade(value: Any) -> float | None:
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(?:/\s*100|分)?\s*", value)
        value = float(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= 100 else None


def _is_ranking(line: str) -> bool:
    rest = _PLACE.sub("", _RANKING_SIGNS.sub("", line))
    return not rest.strip(".*`") and bool(_PLACE.search(line))


def _distinct(numbers: Iterable[int], num_passages: int) -> list[int]:
    found = list(numbers)
    is_ranking = len(set(found)) == len(found) and all(1 <= position <= num_passages for position in found)
    return found if is_ranking else []


_FOLDER = Path(__file__).parent / "prompts"


@dataclass(frozen=True, slots=True)
class ListPrompt:
    """A template cut at its two slots: ``head`` query ``middle`` passages ``tail``."""

    head: str
    middle: str
    tail: str

    @property
    def fingerprint(self) -> str:
        """Identity of the question, since another text gives other labels."""
        return fingerprint_json([self.head, self.middle, self.tail])

    def fill(self, query: str, passages: Sequence[str]) -> str:
        """The whole text. Each passage is one line, so that none can pass for another's beginning."""
        lines = [f"[{index}] {' '.join(text.split())}" for index, text in enumerate(passages, start=1)]
        return f"{self.head}{' '.join(query.split())}{self.middle}{chr(10).join(lines)}{self.tail}"


def load_list_prompt(kind: str, name: str, task: Task) -> ListPrompt:
    """The prompt set ``name`` of a kind of teacher (``graded``, ``listwise``) for ``task``.

    Args:
        kind: whose prompts.
        name: a set shipped with d2llm, or a TOML file with a section per task.
        task: the section.

    Raises:
        InputError: no such set, or a template without ``{query}`` before ``{passages}``.
    """
    section, where = read_prompt_section(name, task, folder=_FOLDER / kind, keys=("template",))
    head, query_slot, rest = section["template"].partition("{query}")
    middle, passages_slot, tail = rest.partition("{passages}")
    if not query_slot or not passages_slot or not tail.strip():
        raise InputError(f"{where}: the template needs {{query}}, then {{passages}}, then what to answer")
    return ListPrompt(head.lstrip("\n"), middle, tail)

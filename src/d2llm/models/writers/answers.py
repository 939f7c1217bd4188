"""Reads a language model's answer as queries, whatever it says: lines that are no query are dropped and counted.

An answer may obey an instruction that was hidden in a passage. Nothing in it is carried out, so the worst that it can
hold is a useless query, which later filters remove.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any, cast

from d2llm.core.json_values import parse_json
from d2llm.models.remote.completions import without_thoughts
from d2llm.models.remote.endpoint import quoted

_LONGEST = 300  # characters: longer lines are copied passages or explanations
_SHORTEST_ECHO = 12  # letters and digits: a shorter line may be a part of the prompt by chance
_QUOTED = 100  # characters of an answer to quote in a problem

_FENCE = re.compile(r"^(?:```|~~~)")
_TAG = re.compile(r"^</?[\w-]+>$|<\|")
_LABEL = (
    r"(?:(?:search|keyword|stand-?alone|rewritten)\s+)*(?:questions?|quer(?:y|ies)|keywords?|statements?|q)(?:\s+that\s+fits\s+it)?\s*\d*"
    r"|问题|問題|查询|查詢|关键词|關鍵詞|陈述|陳述|提问"
)
_LEADING = (
    re.compile(r"^(?:[-*•·▪◦‣–—+]|#{1,6})\s+"),
    re.compile(r"^[(（]?(?:\d{1,2}|[a-z]|[ivx]{1,4})[)）]\s*", re.I),
    re.compile(r"^\d{1,2}[.:](?=\s|[^\W\d_a-zA-Z])\s*"),
    re.compile(r"^(?:\d{1,2}|[一二三四五六七八九十]{1,2})[、．]\s*"),
    re.compile(r"^[①-⑳]\s*"),
    re.compile(rf"^(?:{_LABEL})\s*\d*\s*[:：]\s*", re.I),
)
_ENCLOSING = (
    *((marks[0], marks[1]) for marks in ('""', "''", "“”", "‘’", "„“", "«»", "「」", "『』", "``", "[]")),
    *(("**", "**"), ("__", "__"), ("*", "*")),
)
_SUBJECT = (
    r"(?:questions?|quer(?:y|ies)|keywords?|statements?|passages?|texts?|instructions?|requests?"
    r"|问题|問題|查询|查詢|关键词|關鍵詞|陈述|陳述|段落|文本|请求)"
)
_REMARK = re.compile(
    rf"^(?:sure|certainly|of course|okay|here\s+(?:is|are)|here's|below\b|the\s+following|as\s+requested"
    rf"|based\s+on|according\s+to|these\s+|好的|当然|當然|以下|下面|这里是|這裡是|根据|根據).*{_SUBJECT}"
    r"|^(?:i['’]m\s+sorry|i\s+am\s+sorry|sorry,|i\s+can(?:no|['’])t\b|i\s+cannot\b|as\s+an\s+ai\b|let\s+me\s+know\b"
    r"|i\s+hope\b|(?:sure|certainly|of\s+course|okay)(?:[!.,]|$)|抱歉|对不起|對不起|作为一个|作為一個|我无法|我無法)"
    r"|^(?:answers?|a|explanation|passage|title|note|text|答案|回答|段落|标题|標題)\s*\d*\s*[:：]",
    re.I,
)
_PASSAGE_LABEL = re.compile(
    r"^[*_]{0,2}(?:answers?|a|passage|paragraph|text|答案|回答|段落|文本)\s*[:：][*_]{0,2}\s*", re.I
)


_TASK = re.compile(r"(task:\s*\S.*?\|\s*query:\s*)(\S.*)", re.I)


def split_task(query: str) -> tuple[str | None, str]:
    """The instruction of a written query, if the writer was asked for a task too, and the query without it.

    The instruction is all that is before the query in Gecko's format, "task: ... | query: ...".
    """
    match = _TASK.fullmatch(query)
    return (None, query) if match is None else (match[1], match[2])


def parse_answer(
    answer: str, *, prompt: str = "", num_queries: int, is_complete: bool = True, is_passage: bool = False
) -> tuple[tuple[str, ...], int]:
    """The queries in an answer, or the passage that it is, and how many of its lines were dropped.

    A query is one line without its number, bullet, label, quotes and emphasis. What a model thinks before it answers
    is not counted. A list of strings in JSON is read too.

    Args:
        answer: the whole text that the model wrote.
        prompt: what it was asked, without the passage; lines that repeat a part of this are no queries.
        num_queries: keep at most this many.
        is_complete: False if the answer ended at a length limit; its last line is then dropped, if it is a query.
        is_passage: the usable lines of the answer together are the one text in it; its label is removed.
    """
    text = without_thoughts(unicodedata.normalize("NFC", answer))
    if text is None:
        return (), 1
    lines = [line for line in (line.strip() for line in text.splitlines()) if line]
    if is_passage:
        return _join_passage(lines, _letters(prompt))
    listed = _json_list([line for line in lines if not _FENCE.match(line)])
    num_dropped = 0
    if listed is not None:
        lines = listed
    elif not is_complete and lines:
        num_dropped, lines = 1, lines[:-1]
    echo = _letters(prompt)
    queries: dict[str, str] = {}
    for line in lines:
        query = _clean(line)
        letters = _letters(query)
        is_echo = len(letters) >= _SHORTEST_ECHO and letters in echo
        if is_echo or letters in queries or len(queries) == num_queries or not is_query(query):
            num_dropped += 1
        else:
            queries[letters] = query
    return tuple(queries.values()), num_dropped


def _join_passage(lines: list[str], echo: str) -> tuple[tuple[str, ...], int]:
    kept: list[str] = []
    for line in lines:
        text = _PASSAGE_LABEL.sub("", _clean(line), count=1)
        letters = _letters(text)
        is_echo = len(letters) >= _SHORTEST_ECHO and letters in echo
        if is_usable(text) and not is_echo:
            kept.append(text)
    return ((" ".join(kept),) if kept else ()), len(lines) - len(kept)


def describe_problem(answer: str, *, is_complete: bool = True, is_passage: bool = False) -> str:
    """Why an answer without queries, or without a passage, is of no use, with its beginning."""
    if not answer.strip():
        return "the answer is empty"
    noun = "passage" if is_passage else "query"
    return f"no {noun} in the answer {quoted(answer, _QUOTED)}" + (
        "" if is_complete else ", which ended at the length limit"
    )


def is_query(text: str) -> bool:
    """Whether a cleaned line can be a query at all: ``is_usable``, and not too long."""
    return len(text) <= _LONGEST and is_usable(text)


def is_usable(text: str) -> bool:
    """Whether a cleaned line is not a remark, a heading, markup, or a text without words."""
    if len(_letters(text)) < 2:
        return False
    if text.endswith((":", "：")) or (text.startswith("{") and text.endswith("}")):
        return False
    return not (_FENCE.match(text) or _TAG.search(text) or _REMARK.match(text))


def _clean(line: str) -> str:
    """A line without number, bullet, label, quotes, emphasis, and the comma of a list."""
    if _FENCE.match(line):
        return line
    before = ""
    while line != before:
        before = line
        for leading in _LEADING:
            line = leading.sub("", line, count=1)
        without_comma = line.rstrip(",，")
        for start, end in _ENCLOSING:
            inner = without_comma[len(start) : -len(end)]
            is_enclosed = without_comma.startswith(start) and without_comma.endswith(end)
            if is_enclosed and inner.strip() and start not in inner and end not in inner:
                line = inner.strip()
    return " ".join(line.split())


def _json_list(lines: list[str]) -> list[str] | None:
    """The items of an answer that is one list in JSON, "" for one that is no string; None if it is anything else."""
    text = "\n".join(lines)
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        value: Any = parse_json(text)
    except ValueError:
        return None
    if not isinstance(value, list):
        return None
    return [item if isinstance(item, str) else "" for item in cast("list[Any]", value)]


def _letters(text: str) -> str:
    """A text's letters and digits in lower case, for comparison."""
    return "".join(character for character in unicodedata.normalize("NFKC", text).casefold() if character.isalnum())

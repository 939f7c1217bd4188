"""Filters on a real table, compared with their evaluation in Python."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.errors import FilterError
from d2llm.core.types import Passage
from d2llm.store.blocks import record_of
from d2llm.store.filters import parse_filter
from d2llm.store.passage_table import PassageTable
from d2llm.store.schema import MetadataSchema
from examples import examples

UTC = timezone.utc
SCHEMA = MetadataSchema(
    {"language": "string", "Year": "integer", "price": "number", "draft": "boolean", "seen": "timestamp"}
)
TYPES = {"id": "string", "title": "string", "document_id": "string", "position": "integer", **SCHEMA.fields}

TEXTS = [
    *("", "a", "A", "ab", "a%b", "a_b", "a\\b", "\\", "O'Brien", "''", "日本語", "é", "e\u0301", "a\0b"),
    *("x\r\ny", "\n"),
]
TEXTS += [
    *('"q"', "`id`", "--", "100%", "😀", " a", "a ", "null", "TRUE", "1", "' OR '1'='1", "/*", "$1", "?"),
    *("{a}", "\u202e"),
]
INTEGERS = [0, 1, -1, 7, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**63 - 2, -(2**63) + 1]
NUMBERS = [0.0, -0.0, 1.0, -1.5, 0.1, 1e300, -1e300, 5e-324, 1.7976931348623157e308, float(2**53), 1e-5, 2**63 * 1.0]
TIMES = [datetime(1, 1, 1), datetime(1600, 2, 29, 1), datetime(1969, 12, 31, 23, 59, 59, 999999), datetime(1970, 1, 1)]
TIMES += [
    datetime(2024, 5, 31),
    datetime(2024, 5, 31, 0, 0, 0, 1),
    datetime(2500, 1, 1),
    datetime(9999, 12, 31, 23, 59),
]
TIMES = [moment.replace(tzinfo=UTC) for moment in TIMES]
POSITIONS = [0, 1, 2, 2**31 - 1, -(2**31)]
VALUES = {"string": TEXTS, "integer": INTEGERS, "number": NUMBERS, "boolean": [True, False], "timestamp": TIMES}


def make_passages() -> list[Passage]:
    draw = random.Random(5)
    ids = [*TEXTS[1:], *(f"p{number}" for number in range(70))]
    return [
        Passage(
            passage_id,
            "",
            title=draw.choice(TEXTS),
            document_id=draw.choice(TEXTS),
            position=draw.choice(POSITIONS),
            metadata={name: draw.choice(VALUES[kind]) for name, kind in SCHEMA.fields.items() if draw.random() < 0.8},
        )
        for passage_id in ids
    ]


PASSAGES = make_passages()
ROWS = [
    {"id": p.id, "title": p.title, "document_id": p.document_id, "position": p.position, **p.metadata} for p in PASSAGES
]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> PassageTable:
    return make_table(tmp_path_factory.mktemp("table"))


def make_table(folder: Path, passages: list[Passage] = PASSAGES) -> PassageTable:
    table = PassageTable.create(folder, SCHEMA)
    kept = {"d2_truncated": False, "d2_words": "", "d2_vector": None}
    table.put(record_of(passage, SCHEMA, row, kept) for row, passage in enumerate(passages))
    return table


def matching_ids(table: PassageTable, text: str) -> list[str]:
    written = parse_filter(text, SCHEMA)
    rows = table.matching(written.sql, written.values).tolist()
    return sorted(record["id"] for record in table.by_rows(rows, ["id"]))


# Conditions, their text and their value -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    field: str
    operator: str
    values: tuple[Any, ...]
    swapped: bool = False
    zone: int = 0
    lower: bool = False

    def write(self, level: int) -> str:
        words = self.operator.lower() if self.lower else self.operator
        values = [self.write_value(value) for value in self.values]
        if self.operator.endswith("IN"):
            return f"{self.field} {words} ({','.join(values)})"
        if self.operator.endswith("BETWEEN"):
            return f"{self.field} {words} {values[0]} AND {values[1]}"
        if self.swapped and self.operator in SWAPPED:
            return f"{values[0]} {SWAPPED[self.operator]} {self.field}"
        return f"{self.field} {words} {''.join(values)}"

    def write_value(self, value: Any) -> str:
        if isinstance(value, bool):
            return str(value).upper()
        if isinstance(value, datetime):
            zone = timezone(timedelta(hours=self.zone)) if 2 <= value.year <= 9998 else UTC
            value = value.astimezone(zone).isoformat()
        if isinstance(value, str):
            return "'" + value.replace("'", "''") + "'"
        return repr(value)

    def truth(self, row: dict[str, Any]) -> bool | None:
        value, operator = row.get(self.field), self.operator
        if operator in ("IS NULL", "IS NOT NULL"):
            return (value is None) == (operator == "IS NULL")
        if operator.startswith("IS "):
            expected = operator.endswith("TRUE")
            return (value is expected) != ("NOT" in operator)
        if value is None:
            return None
        return TRUTHS[operator](value, *self.values)


@dataclass(frozen=True)
class Joined:
    word: str
    parts: tuple[Any, ...]
    explicit: bool

    def write(self, level: int) -> str:
        own_level = {"OR": 1, "AND": 2, "NOT": 3}[self.word]
        parts = [part.write(own_level + (self.word != "NOT")) for part in self.parts]
        text = f"NOT {parts[0]}" if self.word == "NOT" else f" {self.word} ".join(parts)
        return f"({text})" if self.explicit or own_level < level else text

    def truth(self, row: dict[str, Any]) -> bool | None:
        truths = [part.truth(row) for part in self.parts]
        if self.word == "NOT":
            return None if truths[0] is None else not truths[0]
        decisive = self.word == "OR"
        return decisive if decisive in truths else None if None in truths else not decisive


def is_like(value: str, pattern: str) -> bool:
    parts = {"%": ".*", "_": "."}
    pieces = re.findall(r"\\.|.", pattern, re.DOTALL)
    expression = "".join(parts.get(piece) or re.escape(piece[-1]) for piece in pieces)
    return re.fullmatch(expression, value, re.DOTALL) is not None


TRUTHS: dict[str, Any] = {
    "": lambda value: value,
    "=": lambda value, other: value == other,
    "==": lambda value, other: value == other,
    "<>": lambda value, other: value != other,
    "!=": lambda value, other: value != other,
    "<": lambda value, other: value < other,
    "<=": lambda value, other: value <= other,
    ">": lambda value, other: value > other,
    ">=": lambda value, other: value >= other,
    "IN": lambda value, *others: value in others,
    "NOT IN": lambda value, *others: value not in others,
    "BETWEEN": lambda value, low, high: low <= value <= high,
    "NOT BETWEEN": lambda value, low, high: not low <= value <= high,
    "LIKE": is_like,
    "NOT LIKE": lambda value, pattern: not is_like(value, pattern),
}
SWAPPED = {"=": "=", "==": "==", "<>": "<>", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
COUNTS = {"IN": 3, "NOT IN": 3, "BETWEEN": 2, "NOT BETWEEN": 2}

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
literals = {
    "string": st.sampled_from(TEXTS) | any_text,
    "integer": st.sampled_from(INTEGERS) | st.integers(-(2**63), 2**63 - 1),
    "number": st.sampled_from(NUMBERS) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9),
    "boolean": st.booleans(),
    "timestamp": st.sampled_from(TIMES) | st.datetimes(timezones=st.just(UTC)),
}
patterns = st.lists(st.sampled_from(["%", "_", r"\%", r"\_", r"\\", "a", "b", "'", "é", "\n", "日", "😀"]), max_size=5)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    name = draw(st.sampled_from(list(TYPES)))
    kind = TYPES[name]
    operators = ["=", "==", "<>", "!=", "IN", "NOT IN", "IS NULL", "IS NOT NULL"]
    if kind == "boolean":
        operators += ["IS TRUE", "IS FALSE", "IS NOT TRUE", "IS NOT FALSE", ""]
    else:
        operators += ["<", "<=", ">", ">=", "BETWEEN", "NOT BETWEEN"]
    if kind == "string":
        operators += ["LIKE", "NOT LIKE"]
    operator = draw(st.sampled_from(operators))
    if operator.startswith("IS") or not operator:
        values = []
    elif operator.endswith("LIKE"):
        values = ["".join(draw(patterns))]
    else:
        value = st.sampled_from(POSITIONS) | st.integers(-(2**31), 2**31 - 1) if name == "position" else literals[kind]
        max_values = COUNTS.get(operator, 1)
        values = draw(st.lists(value, min_size=1 if operator.endswith("IN") else max_values, max_size=max_values))
    return Comparison(
        name, operator, tuple(values), draw(st.booleans()), draw(st.integers(-11, 11)), draw(st.booleans())
    )


def join(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.builds(
        Joined, st.sampled_from(["AND", "OR"]), st.lists(parts, min_size=2, max_size=4).map(tuple), st.booleans()
    )
    return several | st.builds(Joined, st.just("NOT"), st.tuples(parts), st.booleans())


conditions = st.recursive(comparisons(), join, max_leaves=8)


@settings(max_examples=examples(120))
@given(condition=conditions)
def test_filters_match_their_evaluation_in_python(table: PassageTable, condition: Any) -> None:
    expected = sorted(row["id"] for row in ROWS if condition.truth(row) is True)
    assert matching_ids(table, condition.write(0)) == expected


@given(condition=comparisons())
def test_comparisons_match_their_evaluation_in_python(table: PassageTable, condition: Any) -> None:
    test_filters_match_their_evaluation_in_python.hypothesis.inner_test(table, condition)


@settings(max_examples=10)
@given(ids=st.lists(any_text.filter(bool), min_size=1, max_size=40, unique=True))
def test_every_id_matches_only_itself(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    table = make_table(tmp_path_factory.mktemp("ids"), [Passage(passage_id, "") for passage_id in ids])
    quoted = ["'" + passage_id.replace("'", "''") + "'" for passage_id in ids]
    for passage_id, literal in zip(ids[:5], quoted[:5], strict=True):
        assert matching_ids(table, f"id = {literal}") == [passage_id]
    half = len(ids) // 2 + 1
    assert matching_ids(table, f"id IN ({', '.join(quoted[:half])})") == sorted(ids[:half])


PIECES = """
    'a' '' 1 - 1.5 ( ) , = < >= AND OR NOT IN BETWEEN LIKE IS NULL TRUE FALSE ; -- /* */ select case cast x " ` . ::
    || @ $ ? : { [ interval date exists any \\ \0 e'x'
"""


@settings(max_examples=examples(200))
@given(text=st.text(max_size=40) | st.lists(st.sampled_from([*TYPES, *PIECES.split()]), max_size=14).map(" ".join))
def test_any_text_is_a_filter_or_a_filter_error(text: str) -> None:
    try:
        sql = parse_filter(text, SCHEMA).sql
    except FilterError:
        return
    # Values are parameters: only fields, operators and keywords of the filter language are left.
    words = r"AND|OR|NOT|IN|BETWEEN|LIKE|IS|NULL|TRUE|FALSE"
    assert re.fullmatch(rf"(?:`[A-Za-z_]+`|:p[0-9]+|[(),=<>]| |\b(?:{words})\b| ESCAPE '\\')+", sql)
    assert set(re.findall("`(.*?)`", sql)) <= set(TYPES)


HOSTILE = [
    "'; DROP TABLE passages; --",
    "' OR '1'='1",
    "' OR 1=1 --",
    "x' OR id IS NOT NULL OR id = 'x",
    "\\' OR 1=1 --",
    "\\'' OR ''='",
    "'' OR ''=''",
    "' UNION SELECT * FROM passages --",
    "'/**/OR/**/1=1",
    "' || (SELECT id FROM passages LIMIT 1) || '",
    "'||pg_sleep(10)||'",
    "%' OR id LIKE '%",
    "' AND _rowid >= 0 OR '' = '",
    "' ESCAPE '\\' OR 1=1 --",
    "\0' OR 1=1 --",
    "'\0",
    "\u2019 OR 1=1 --",
    "\uff07 OR 1=1 --",
    "\u02bc; DELETE FROM passages",
    "`id` = `id`",
    "`; DROP TABLE passages",
    "${id}",
    "{{ id }}",
    "{% raw %}",
    "$$ OR 1=1 $$",
    "E'\\x27 OR 1=1'",
    "U&'\\0027'",
    "\r\n' OR 1=1\r\n--",
    "'" * 99,
    "\\" * 99,
    "<script>alert('x')</script>",
    "CAST(id AS BIGINT)",
    "'; SELECT read_csv('/etc/passwd'); --",
    "') OR ('' = '",
    "')) OR TRUE OR (('",
]


def test_hostile_text_is_matched_by_value_only(tmp_path: Path) -> None:
    passages = [*(Passage(text, "") for text in HOSTILE), Passage("other", "")]
    table = make_table(tmp_path, passages)
    version = table.version
    for text in HOSTILE:
        literal = "'" + text.replace("'", "''") + "'"
        assert matching_ids(table, f"id = {literal}") == [text]
        assert matching_ids(table, f"id <> {literal} AND id IN ({literal}, 'other')") == ["other"]
        assert matching_ids(table, f"language = {literal}") == []
    assert (table.version, len(table)) == (version, len(passages))


HOSTILE_FILTERS = [
    "1=1",
    "TRUE",
    "id = id",
    "id = title",
    "'a' = 'a'",
    "id = 'a'; DELETE FROM passages",
    "id = 'a' UNION SELECT * FROM passages",
    "id IN (SELECT id FROM passages)",
    "EXISTS (SELECT 1)",
    "(SELECT TRUE)",
    "id = (SELECT 'a')",
    "id = 'a' -- ",
    "id = 'a' /* x */",
    "/*+ hint */ id = 'a'",
    "_rowid >= 0",
    "d2_row >= 0",
    "text = 'a'",
    "passages.id = 'a'",
    "CASE WHEN TRUE THEN TRUE END",
    "CAST(id AS BIGINT) = 1",
    "Year::text = '1'",
    "lower(id) = 'a'",
    "regexp_match(id, '(a+)+$')",
    "id ~ '(a+)+$'",
    "id SIMILAR TO 'a'",
    "id || 'b' = 'ab'",
    "Year + 1 = 2",
    "Year / 0 = 1",
    "Year = 1 % 0",
    "price = 'NaN'",
    "price < NaN",
    "seen > now()",
    "seen > CURRENT_TIMESTAMP",
    "seen > INTERVAL '1' DAY",
    "id = $1",
    "id = ?",
    "id = :id",
    "id = @id",
    "{{ id }} = 'a'",
    "id = X'61'",
    "id = E'a'",
    "id = $$a$$",
    "`id` = 'a'",
    '"id"" = 1 OR ""id" = 1',
    "id LIKE 'a' ESCAPE 'a'",
    "id = 'a' LIMIT 1",
    "id = 'a' ORDER BY id",
    "ROW(id) = ROW('a')",
    "(id, title) = ('a', 'b')",
    "id = ANY (ARRAY['a'])",
    "id COLLATE \"C\" = 'a'",
    "id := 'a'",
    "Year = 1_000",
    "Year = 0x10",
    "id = 'a",
    "id = 'a' OR 'b'",
    "\u2019 = 1",
    "Year = \uff11",
    "NULL",
    "id = NULL",
    "NOT NULL",
    "draft = NULL IS NULL",
]


@pytest.mark.parametrize("text", HOSTILE_FILTERS)
def test_hostile_filters_are_rejected(text: str) -> None:
    with pytest.raises(FilterError):
        parse_filter(text, SCHEMA)


def test_the_python_evaluation_on_known_examples() -> None:
    assert is_like("a%b", r"a\%b")
    assert not is_like("axb", r"a\%b")
    assert is_like("a\nb", "a_b")
    assert not is_like("a", "")
    null = Comparison("language", "=", ("a",))
    assert Joined("NOT", (null,), False).truth({}) is None
    assert Joined("OR", (null, Comparison("id", "=", ("x",))), False).truth({"id": "x"}) is True
    assert all(math.isfinite(number) for number in NUMBERS)

"""The filter language: the SQL it is translated to, its error messages, and its limits."""

from __future__ import annotations

import re
import sys
import time
from datetime import datetime, timezone
from typing import Any

import pytest

from d2llm.core.errors import FilterError, InputError
from d2llm.core.types import Passage
from d2llm.store.blocks import record_of
from d2llm.store.filters import MAX_COMPARISONS, MAX_DEPTH, MAX_LENGTH, MAX_PATTERN, MAX_VALUES, Filter, parse_filter
from d2llm.store.passage_table import PassageTable
from d2llm.store.schema import MetadataSchema

SCHEMA = MetadataSchema(
    {
        "language": "string",
        "Year": "integer",
        "price": "number",
        "draft": "boolean",
        "seen": "timestamp",
        "order": "integer",
    }
)


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("Year = 1", "`Year` = 1"),
        ("Year == 1", "`Year` = 1"),
        ("Year != 1", "`Year` <> 1"),
        ("Year <> 1", "`Year` <> 1"),
        ("Year<1", "`Year` < 1"),
        ("Year<=1", "`Year` <= 1"),
        ("Year>1", "`Year` > 1"),
        ("Year>=1", "`Year` >= 1"),
        ("1 < Year", "`Year` > 1"),
        ("1 >= Year", "`Year` <= 1"),
        ("'de' = language", "`language` = 'de'"),
        ('"order" = 1', "`order` = 1"),
        ("order = 1", "`order` = 1"),
        ("language in ('a', 'b')", "`language` IN ('a', 'b')"),
        ("language NOT IN ('a')", "`language` NOT IN ('a')"),
        ("Year BETWEEN 1 AND 2 AND draft", "(`Year` BETWEEN 1 AND 2 AND `draft` = TRUE)"),
        ("Year not between 1 and 2", "`Year` NOT BETWEEN 1 AND 2"),
        (r"title LIKE '%\%\_\\_'", r"`title` LIKE '%\%\_\\_' ESCAPE '\'"),
        ("title NOT LIKE 'a%'", "`title` NOT LIKE 'a%' ESCAPE '\\'"),
        ("Year IS NULL", "`Year` IS NULL"),
        ("Year IS NOT NULL", "`Year` IS NOT NULL"),
        ("draft IS TRUE", "`draft` IS TRUE"),
        ("draft IS NOT FALSE", "`draft` IS NOT FALSE"),
        ("draft", "`draft` = TRUE"),
        ("draft <> TRUE", "`draft` <> 1"),
        ("draft IN (FALSE)", "`draft` IN (0)"),
        # Negations are pushed down to the comparisons.
        ("NOT draft", "`draft` = FALSE"),
        ("NOT NOT draft", "`draft` = TRUE"),
        ("NOT Year = 1", "`Year` <> 1"),
        ("NOT Year <> 1", "`Year` = 1"),
        ("NOT Year < 1", "`Year` >= 1"),
        ("NOT Year <= 1", "`Year` > 1"),
        ("NOT Year > 1", "`Year` <= 1"),
        ("NOT Year >= 1", "`Year` < 1"),
        ("NOT 1 < Year", "`Year` <= 1"),
        ("NOT Year IS NULL", "`Year` IS NOT NULL"),
        ("NOT draft IS NOT TRUE", "`draft` IS TRUE"),
        ("NOT title NOT LIKE 'a'", "`title` LIKE 'a' ESCAPE '\\'"),
        ("NOT Year NOT IN (1)", "`Year` IN (1)"),
        ("NOT Year NOT BETWEEN 1 AND 2", "`Year` BETWEEN 1 AND 2"),
        ("NOT (Year = 1 OR draft AND id = 'a')", "(`Year` <> 1 AND (`draft` = FALSE OR `id` <> 'a'))"),
        # AND binds tighter than OR, and NOT tighter than both.
        ("Year = 1 OR Year = 2 AND Year = 3", "(`Year` = 1 OR (`Year` = 2 AND `Year` = 3))"),
        ("(Year = 1 OR Year = 2) AND Year = 3", "((`Year` = 1 OR `Year` = 2) AND `Year` = 3)"),
        ("NOT Year = 1 AND Year = 2", "(`Year` <> 1 AND `Year` = 2)"),
        ("((Year = 1))", "`Year` = 1"),
        # Values.
        ("id = 'O''Brien'", "`id` = 'O''Brien'"),
        ("id = ''", "`id` = ''"),
        ("id = ''''", "`id` = ''''"),
        (r"id = 'a\'", r"`id` = 'a\'"),
        ("id = 'a\0b'", "`id` = 'a\0b'"),
        ("id = '日本\r\n😀'", "`id` = '日本\r\n😀'"),
        ("id = '-- /* */ ;'", "`id` = '-- /* */ ;'"),
        ("Year = -5", "`Year` = -5"),
        ("Year = - 5", "`Year` = -5"),
        ("Year = 2020.0", "`Year` = 2020"),
        ("Year = 2e3", "`Year` = 2000"),
        ("Year = 007", "`Year` = 7"),
        ("Year = -0", "`Year` = 0"),
        ("Year = 9223372036854775807", "`Year` = 9223372036854775807"),
        ("Year = -9223372036854775808", "`Year` = -9223372036854775808"),
        ("position = -2147483648", "`position` = -2147483648"),
        ("price = 2", "`price` = 2.0"),
        ("price < -1.5e-3", "`price` < -0.0015"),
        ("price = 5.", "`price` = 5.0"),
        ("price = 9007199254740993", "`price` = 9007199254740992.0"),  # the nearest 64-bit float
        ("seen >= '2024-05-31'", "`seen` >= 1717113600000000"),
        ("seen = '2024-05-31 01:30:00.5+02:00'", "`seen` = 1717111800500000"),
        ("seen IN ('0001-01-01')", "`seen` IN (-62135596800000000)"),
        ("\n Year\t=\u00a01 ", "`Year` = 1"),
    ],
)
def test_filters_are_translated_to_sql(text: str, sql: str) -> None:
    result = parse_filter(text, SCHEMA)
    assert with_values(result) == sql
    assert result.text == text


def with_values(written: Filter) -> str:
    """The SQL of a filter with its values in the places of the parameters."""

    def literal(match: re.Match[str]) -> str:
        value = written.values[match[1]]
        return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)

    return re.sub(r":(p[0-9]+)", literal, written.sql)


def test_fields_used_by_a_filter() -> None:
    assert parse_filter("Year = 1 AND (NOT draft OR Year = 2) AND id = 'seen'", SCHEMA).fields == {
        "Year",
        "draft",
        "id",
    }
    text = "id = 'a' OR title = 'a' OR document_id = 'a' OR position = 1"
    assert parse_filter(text, MetadataSchema()).fields == {"id", "title", "document_id", "position"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("yeer = 1", "there is no field 'yeer'; did you mean 'Year'? the fields are Year, document_id, draft, id, "),
        ("year = 1", "did you mean 'Year'?"),
        ("xyz = 1", "there is no field 'xyz'; the fields are"),
        ("text = 'a'", "there is no field 'text'"),
        ("Year = 'x'", "field 'Year' is integer, and \"'x'\" does not fit; write a whole number"),
        ("Year = 1.5", "field 'Year' is integer, and '1.5' does not fit"),
        ("Year = TRUE", "field 'Year' is integer"),
        ("Year = 9223372036854775808", "a whole number of 64 bits"),
        ("Year = -9223372036854775809", "a whole number of 64 bits"),
        ("Year = 1e400", "does not fit"),
        ("Year = 1e-400", "does not fit"),
        ("Year = 1e999999999", "does not fit"),
        ("Year = 1e99999999999999999999", "does not fit"),
        ("position = 2147483648", "field 'position' is integer, and '2147483648' does not fit"),
        ("price = 1e400", "field 'price' is number, and '1e400' does not fit"),
        ("price = '1'", "field 'price' is number"),
        ("language = 1", "field 'language' is string, and '1' does not fit; write text in single quotes"),
        ("draft = 1", "field 'draft' is boolean, and '1' does not fit; write TRUE or FALSE"),
        ("draft = 'true'", "write TRUE or FALSE"),
        ("draft < TRUE", "boolean and has no order"),
        ("draft BETWEEN FALSE AND TRUE", "boolean and has no order"),
        ("seen > 2024", "field 'seen' is timestamp, and '2024' does not fit; write a time in single quotes"),
        ("seen > '2024'", "write a time in single quotes, as '2024-05-31'"),
        ("Year IN (1, 'x')", "field 'Year' is integer, and \"'x'\" does not fit"),
        ("Year BETWEEN 1 AND 'x'", "field 'Year' is integer"),
        ("Year LIKE '2%'", "field 'Year' is integer, but a string is needed here"),
        ("Year IS TRUE", "field 'Year' is integer, but a boolean is needed here"),
        ("NOT Year", "a boolean is needed here"),
        ('language = "de"', "text in single quotes"),
        ("language = title", "compared with one value"),
        ("language = 'a' 'b'", "compared with one value"),
        ("Year = 5 - 3", "compared with one value"),
        ("Year = NULL", "write Year IS NULL or Year IS NOT NULL"),
        ("Year IN (1, NULL)", "write Year IS NULL"),
        ("Year IN ()", "the list after IN is empty"),
        ("Year IN (SELECT 1)", "filter, at"),
        ("Year IS Year", "after IS comes"),
        ("1 = 1", "one side must be the name of a field"),
        ("TRUE", "this is not a condition"),
        ("1 < Year < 3", "one side must be"),
        ("lower(language) = 'a'", "character 1, 'lower': a filter has no functions"),
        ("Year = 1 -- x", "no comments"),
        ("Year /* x */ = 1", "no comments"),
        ("Year = 1; Year = 2", "character 9, ';': this character"),
        ("Year = +1", "character 8, '+': this character"),
        ("Year - 1 = 2", "one side must be"),
        ("Year = -'1'", "a minus sign is allowed only before a number"),
        ("Year = --1", "no comments"),
        ("price = .5", "character 9, '.'"),
        ("language = 'a", "a quote is opened but not closed"),
        ("language = 'O'Brien'", "a quote is opened but not closed"),
        ('"language = 1', "a quote is opened but not closed"),
        ("(Year = 1", "this cannot be read"),
        ("Year = 1)", "this cannot be read"),
        ("Year = 1 AND", "filter, at 'AND': this cannot be read"),
        ("Year = 1 Year = 2", "filter, at 'Year': this cannot be read"),
        ("Year ILIKE 'a'", "at 'ILIKE': this cannot be read"),
        ("", "the filter is empty"),
        (" \n", "the filter is empty"),
        ("-- x", "the filter is empty"),
        ("id = '\ud800'", "half of a surrogate pair"),
        (r"title LIKE 'a\b'", "a backslash is allowed only before"),
        ("title LIKE 'a\\'", "a backslash is allowed only before"),
        ("title LIKE 'a' ESCAPE '!'", "at 'ESCAPE'"),
    ],
)
def test_errors_say_what_where_and_what_to_do(text: str, problem: str) -> None:
    with pytest.raises(FilterError) as error:
        parse_filter(text, SCHEMA)
    assert problem in str(error.value)
    assert isinstance(error.value, InputError)
    assert len(str(error.value)) < 400
    str(error.value).encode()


def test_errors_give_the_character_number_and_the_faulty_part() -> None:
    with pytest.raises(FilterError) as error:
        parse_filter("id = '😀' AND  (Year = 'x' OR draft)", SCHEMA)
    assert str(error.value).startswith("filter, character 16, \"Year = 'x'\": field 'Year' is integer")


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("(" * (MAX_DEPTH + 1) + "draft" + ")" * (MAX_DEPTH + 1), "parentheses and NOTs"),
        ("NOT " * (MAX_DEPTH + 1) + "draft", "parentheses and NOTs"),
        ("NOT (" * (MAX_DEPTH + 1) + "draft" + ")" * (MAX_DEPTH + 1), "parentheses and NOTs"),
        ("(" * (MAX_LENGTH - 10), "parentheses and NOTs"),
        ("NOT " * (MAX_LENGTH // 4), "parentheses and NOTs"),
        ("- " * (MAX_LENGTH // 2), "minus sign"),
        ("x" * MAX_LENGTH, "there is no field"),
        (" OR ".join(["draft"] * (MAX_COMPARISONS + 1)), f"at most {MAX_COMPARISONS} comparisons"),
        (f"Year IN ({','.join(['1'] * (MAX_VALUES + 1))})", f"at most {MAX_VALUES} values"),
        (f"title LIKE '{'a' * (MAX_PATTERN + 1)}'", f"at most {MAX_PATTERN} characters"),
        ("id = '" + "x" * MAX_LENGTH + "'", f"at most {MAX_LENGTH} characters, this one has {MAX_LENGTH + 7}"),
    ],
    ids=range(11),
)
def test_filters_beyond_the_limits_are_rejected_quickly(text: str, problem: str) -> None:
    start = time.process_time()  # CPU time, so other load on the machine does not matter
    with pytest.raises(FilterError) as error:
        parse_filter(text, SCHEMA)
    assert problem in str(error.value)
    assert len(str(error.value)) < 400
    assert time.process_time() - start < 5


def nested(depth: int, width: int) -> str:
    """Alternating AND and OR: ``depth`` nested pairs of parentheses, each with ``width`` operands."""
    text = "draft"
    for level in range(depth):
        word = (" AND ", " OR ")[level % 2]
        text = f"({word.join([text] + ['draft'] * (width - 1))})"
    return text


def test_filters_that_are_too_deep_are_rejected() -> None:
    with pytest.raises(FilterError, match="nested too deeply; use fewer parentheses"):
        parse_filter(nested(MAX_DEPTH, 32), SCHEMA)


def test_negations_add_no_depth_to_the_sql() -> None:
    assert parse_filter("NOT (" * MAX_DEPTH + "draft" + ")" * MAX_DEPTH, SCHEMA).sql == "`draft` = TRUE"
    assert parse_filter(("NOT " * 3 + "(") * 5 + "draft" + ")" * 5, SCHEMA).sql == "`draft` = FALSE"


@pytest.mark.parametrize("frames_left", range(20, 200, 20))
def test_a_nearly_full_stack_causes_at_most_a_filter_error(frames_left: int) -> None:
    depth = 0
    frame: Any = sys._getframe()
    while frame:
        frame, depth = frame.f_back, depth + 1

    def descend(frames: int) -> str:
        if frames:
            return descend(frames - 1)
        try:
            return parse_filter(nested(4, 2), SCHEMA).sql
        except FilterError as error:
            return str(error)

    result = descend(sys.getrecursionlimit() - depth - frames_left)
    assert "nested too deeply" in result or result == parse_filter(nested(4, 2), SCHEMA).sql


# In SQLite ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> PassageTable:
    timestamp = datetime(2024, 5, 31, 12, tzinfo=timezone.utc)
    passages = [
        Passage(
            "a", "", metadata={"language": "de", "Year": 2020, "price": 2, "draft": True, "seen": timestamp, "order": 1}
        ),
        Passage("b", "", metadata={"language": "50%", "Year": -(2**63), "price": 0.1, "draft": False}),
        Passage("c", "", metadata={}),
        Passage("O'Brien", "", metadata={"Year": 2**63 - 1}),
        Passage("a\0b", "", metadata={}),
    ]
    table = PassageTable.create(tmp_path_factory.mktemp("table"), SCHEMA)
    kept = {"d2_truncated": False, "d2_words": "", "d2_vector": None}
    table.put(record_of(passage, SCHEMA, row, kept) for row, passage in enumerate(passages))
    return table


def matching_ids(table: PassageTable, text: str) -> list[str]:
    written = parse_filter(text, SCHEMA)
    rows = sorted(table.matching(written.sql, written.values).tolist())
    return [record["id"] for record in table.by_rows(rows, ["id"])]


def test_the_largest_filters_work_in_sqlite(table: PassageTable) -> None:
    numbers = range(2_000, 2_000 + MAX_COMPARISONS)
    assert matching_ids(table, " AND ".join(f"Year <> {number}" for number in numbers)) == ["b", "O'Brien"]
    assert matching_ids(table, " OR ".join(f"Year = {number}" for number in numbers)) == ["a"]
    assert matching_ids(table, f"order IN ({','.join(['1'] * MAX_VALUES)})") == ["a"]
    assert matching_ids(table, f"language LIKE '{'%' * MAX_PATTERN}'") == ["a", "b"]
    assert matching_ids(table, f"language LIKE '{'%é' * (MAX_PATTERN // 2)}'") == []
    deep = nested(MAX_DEPTH, 4)  # each joined as a balanced tree of two levels
    assert max_depth(parse_filter(deep, SCHEMA).sql) == 2 * MAX_DEPTH
    assert matching_ids(table, deep) == ["a"]


def max_depth(sql: str) -> int:
    depth = deepest = 0
    for character in sql:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest

from __future__ import annotations

import dataclasses
from datetime import date, datetime, timedelta, timezone
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2llm.core.errors import InputError
from d2llm.core.types import Passage
from d2llm.store.schema import MetadataSchema, microseconds_of, moment_of, parse_timestamp

UTC = timezone.utc
NOON = datetime(2024, 5, 31, 12, tzinfo=UTC)


def passages(*metadata: dict[str, Any]) -> list[Passage]:
    return [Passage(f"p{number}", "text", metadata=fields) for number, fields in enumerate(metadata)]


def test_types_are_inferred_from_values() -> None:
    schema = MetadataSchema.infer(
        passages(
            {"year": 2020, "price": 3, "draft": False, "day": "2024-05-31", "seen": NOON, "late": None},
            {"year": None, "price": 2.5, "language": "de", "late": 1},
        )
    )
    assert schema.fields == {
        "year": "integer",
        "price": "number",  # integers and floats mixed
        "draft": "boolean",
        "day": "string",  # even if it looks like a date
        "seen": "timestamp",
        "late": "integer",
        "language": "string",
    }
    assert MetadataSchema.infer([]) == MetadataSchema() == MetadataSchema.infer(passages({}, {}))


@pytest.mark.parametrize(
    ("first", "second", "kinds"),
    [
        (1, "1", ("integer", "string")),
        (True, 1, ("boolean", "integer")),
        (1.5, True, ("number", "boolean")),
        (NOON, "2024-05-31", ("timestamp", "string")),
    ],
)
def test_conflicting_types_are_reported_with_both_passages(first: object, second: object, kinds: tuple[str, str]):
    with pytest.raises(InputError) as error:
        MetadataSchema.infer(passages({}, {"x": first}, {"x": first}, {"x": second}))
    assert f"'x' is {kinds[0]} in passage 'p1' but {kinds[1]} in passage 'p3'" in str(error.value)


def test_a_conflict_names_the_passage_that_set_the_type() -> None:
    with pytest.raises(InputError, match=r"number in passage 'p1' but string in passage 'p2'"):
        MetadataSchema.infer(passages({"x": 1}, {"x": 1.5}, {"x": "1"}))


def test_a_field_without_values_must_be_declared() -> None:
    empty = passages({"year": 1}, {"note": None}, {"note": None})
    with pytest.raises(InputError, match=r"'note' has no value in any passage \(the first is 'p1'\).*'note:string'"):
        MetadataSchema.infer(empty)
    schema = MetadataSchema.infer(empty, known=MetadataSchema({"note": "timestamp"}))
    assert schema.fields == {"note": "timestamp", "year": "integer"}


def test_known_fields_keep_their_type_and_new_ones_follow() -> None:
    known = MetadataSchema({"when": "timestamp", "price": "number"})
    schema = MetadataSchema.infer(passages({"new": "a", "price": 2, "when": "2024-05-31"}), known)
    assert list(schema.fields.items()) == [("when", "timestamp"), ("price", "number"), ("new", "string")]
    with pytest.raises(InputError, match=r"passage 'p0', metadata field 'price' \(number\): 'two' is not a number"):
        MetadataSchema.infer(passages({"price": "two"}), known)


def test_parsing_declarations() -> None:
    schema = MetadataSchema.parse(["year:integer", "seen : timestamp", "price:number"])
    assert schema.fields == {"year": "integer", "seen": "timestamp", "price": "number"}
    assert schema.fields == {"year": "integer", "seen": "timestamp", "price": "number"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        schema.fields = {}  # type: ignore[misc]


def test_a_schema_does_not_change_with_the_mapping_it_was_made_from() -> None:
    fields = {"year": "integer"}
    schema = MetadataSchema(fields)  # type: ignore[arg-type]
    fields["more"] = "string"
    assert schema.fields == {"year": "integer"}


@pytest.mark.parametrize(
    ("declaration", "problem"),
    [
        ("year", "write name:type"),
        ("year:int", "no type 'int'; use one of string, integer, number, boolean, timestamp"),
        ("year:", "no type ''"),
        (":integer", "begins with a letter"),
        ("my year:integer", "begins with a letter"),
        ("größe:number", "begins with a letter"),
        ("1st:string", "begins with a letter"),
        ("a-b:string", "begins with a letter"),
        ("a`b:string", "begins with a letter"),
        ("year\n:string", None),  # white space around a name is stripped
        ("a" * 65 + ":string", "at most 64"),
        ("a" * 64 + ":string", None),
        ("id:string", "columns of every passage"),
        ("Text:string", "columns of every passage"),
        ("position:integer", "columns of every passage"),
        ("d2_row:integer", "reserved for the index"),
        ("D2_x:integer", "reserved for the index"),
        ("_rowid:integer", "reserved for the index"),
        ("not:boolean", "words of the filter language"),
        ("Null:string", "words of the filter language"),
        ("select:string", None),
        ("order:integer", None),
    ],
)
def test_names_and_types_of_declarations(declaration: str, problem: str | None) -> None:
    if problem is None:
        assert len(MetadataSchema.parse([declaration]).fields) == 1
    else:
        with pytest.raises(InputError, match=problem):
            MetadataSchema.parse([declaration])


def test_conflicting_names_are_rejected() -> None:
    with pytest.raises(InputError, match="'year' is declared twice"):
        MetadataSchema.parse(["year:integer", "year:integer"])
    with pytest.raises(InputError, match="'year' and 'Year' differ only in case"):
        MetadataSchema.parse(["year:integer", "Year:integer"])
    with pytest.raises(InputError, match="'id' must be renamed"):
        MetadataSchema.infer(passages({"id": "x"}))


def test_fields_can_be_added_but_types_cannot_change() -> None:
    schema = MetadataSchema({"year": "integer", "price": "number"})
    extended = schema.extend(MetadataSchema({"price": "integer", "language": "string", "year": "integer"}))
    assert list(extended.fields.items()) == [("year", "integer"), ("price", "number"), ("language", "string")]
    assert schema.extend(MetadataSchema()) == schema == MetadataSchema().extend(schema)
    with pytest.raises(InputError, match="'year' is integer in this index and cannot become number"):
        schema.extend(MetadataSchema({"year": "number"}))
    with pytest.raises(InputError, match="'price' is number in this index and cannot become string"):
        schema.extend(MetadataSchema({"price": "string"}))


SCHEMA = MetadataSchema(
    {"language": "string", "year": "integer", "price": "number", "draft": "boolean", "seen": "timestamp"}
)


def stored(some: list[Passage]) -> dict[str, list[object]]:
    rows = [SCHEMA.values(passage) for passage in some]
    return {name: [row[name] for row in rows] for name in SCHEMA.fields}


def test_values_as_stored() -> None:
    columns = stored(
        passages(
            {"language": "", "year": -(2**63), "price": 3, "draft": False, "seen": NOON},
            {"language": "日本\0'", "year": 2**63 - 1, "price": -0.5, "draft": None, "seen": "2024-05-31T14:00+02:00"},
            {},
        )
    )
    assert columns == {
        "language": ["", "日本\0'", None],
        "year": [-(2**63), 2**63 - 1, None],
        "price": [3.0, -0.5, None],
        "draft": [False, None, None],
        "seen": [NOON, NOON, None],
    }
    assert [type(column[0]) for column in columns.values()] == [str, int, float, bool, datetime]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("language", 3, "3 is not a string"),
        ("language", b"de", "b'de' is not a string"),
        ("language", "\ud800", "half of a surrogate pair"),
        ("language", ["de"], "is not a string"),
        ("year", "2020", "'2020' is not a whole number"),
        ("year", 2020.5, "2020.5 is not a whole number"),
        ("year", True, "True is not a whole number"),
        ("year", 2**63, "not a whole number of 64 bits"),
        ("year", -(2**63) - 1, "not a whole number of 64 bits"),
        ("price", float("-inf"), "-inf is not a finite number"),
        ("price", 2**53 + 1, "64-bit float holds exactly"),
        ("price", 10**400, "64 bits can hold"),
        ("price", False, "False is not a number"),
        ("price", "3.5", "'3.5' is not a number"),
        ("draft", 1, "1 is not true or false"),
        ("draft", "true", "'true' is not true or false"),
        ("seen", 1717156800, "is not a date, a datetime"),
        ("seen", np.datetime64("2024-05-31T12:00:00.000000001", "ns"), "is not a date, a datetime"),
        ("seen", "yesterday", "'yesterday' is not a time"),
        ("seen", datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))), "outside the years"),
        ("seen", {"a": "x" * 500}, r"x\.\.\. is not a date"),
        ("colour", "red", r"no such field \(it has: language, year, price, draft, seen\)"),
    ],
)
def test_invalid_values_are_reported_with_passage_and_field(name: str, value: object, problem: str) -> None:
    [passage] = passages({name: value})
    with pytest.raises(InputError, match=problem) as error:
        SCHEMA.check(passage)
    assert str(error.value).startswith(f"passage 'p0', metadata field '{name}'")
    with pytest.raises(InputError, match=problem):
        SCHEMA.values(passage)


def test_numpys_and_pandas_values_are_stored_as_plain_ones() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "year": [2020, None],
            "price": [1.5, None],
            "language": ["de", None],
            "draft": [True, None],
            "seen": [pandas.Timestamp(NOON), None],
        }
    )
    expected = {"year": [2020, None], "price": [1.5, None], "language": ["de", None], "draft": [True, None]}
    for rows in (frame, frame.convert_dtypes()):
        some = passages(*rows.to_dict("records"))
        assert stored(some) == {**expected, "seen": [NOON, None]}
        assert SCHEMA.leave_out_misfits(some)[1] == {}
    typed = MetadataSchema.infer(passages(*frame.convert_dtypes().to_dict("records")))
    assert typed == MetadataSchema(
        {"year": "integer", "price": "number", "language": "string", "draft": "boolean", "seen": "timestamp"}
    )
    scalars = {"year": np.int32(1), "price": np.float32(0.5), "language": np.str_("de"), "draft": np.bool_(False)}
    assert MetadataSchema.infer(passages(scalars)).fields == {
        "year": "integer",
        "price": "number",
        "language": "string",
        "draft": "boolean",
    }


def test_a_date_is_its_midnight() -> None:
    days = passages({"seen": date(2024, 5, 31)}, {"seen": np.datetime64("2024-05-31")})
    midnight = datetime(2024, 5, 31, tzinfo=UTC)
    assert MetadataSchema.infer(days) == MetadataSchema({"seen": "timestamp"})
    assert stored(days)["seen"] == [midnight, midnight]


def test_a_time_finer_than_a_microsecond_is_rejected() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(InputError, match="is not a time in whole microseconds"):
        SCHEMA.check(*passages({"seen": pandas.Timestamp("2024-05-31T12:00:00.000000001")}))


@pytest.mark.parametrize("value", [["a"], {"a": 1}, ("a",), b"a", 1j, np.array([1, 2])])
def test_values_of_unsupported_types_are_rejected(value: object) -> None:
    with pytest.raises(InputError, match=f"p0.*'x': a value of type {type(value).__name__} cannot be stored"):
        MetadataSchema.infer(passages({"x": value}))


@pytest.mark.parametrize("value", [float("inf"), 2**63, "\ud800"])
def test_unstorable_values_are_rejected_during_inference(value: object) -> None:
    with pytest.raises(InputError, match="passage 'p0', metadata field 'x'"):
        MetadataSchema.infer(passages({"x": value}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-05-31", datetime(2024, 5, 31, tzinfo=UTC)),
        ("2024-05-31T12:30", datetime(2024, 5, 31, 12, 30, tzinfo=UTC)),
        ("2024-05-31 12:30:15", datetime(2024, 5, 31, 12, 30, 15, tzinfo=UTC)),
        ("2024-05-31T12:30:15.5Z", datetime(2024, 5, 31, 12, 30, 15, 500_000, tzinfo=UTC)),
        ("2024-05-31T12:30:15.000001z", datetime(2024, 5, 31, 12, 30, 15, 1, tzinfo=UTC)),
        ("2024-05-31T00:30:00+0100", datetime(2024, 5, 30, 23, 30, tzinfo=UTC)),
        ("2024-05-31T00:30-05:30", datetime(2024, 5, 31, 6, 0, tzinfo=UTC)),
        ("0001-01-01", datetime(1, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
    ],
)
def test_parsing_timestamps(text: str, expected: datetime) -> None:
    assert parse_timestamp(text) == expected
    assert parse_timestamp(text).utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "text",
    [
        *("", "2024", "2024-5-31", "2024-02-30", "2024-05-31T", "2024-05-31T25:00", "2024-05-31Z"),
        *("2024-05-31T12:30:15.", "2024-05-31T12:30:15.1234567", "2024-05-31T12:30:00 Z", " 2024-05-31"),
        *("2024-05-31\n", "２０２４-05-31", "0001-01-01T00:00+01:00", "9999-12-31T23:00-02:00"),
        *("2024-05-31T12:30+99:99", "0000-01-01"),
    ],
)
def test_invalid_timestamps_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"time|day|month|hour|year"):
        parse_timestamp(text)


@given(st.datetimes(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=-11, minutes=-30))])))
def test_every_isoformat_string_is_parsed(moment: datetime) -> None:
    if not 2 <= moment.year <= 9998:
        return
    expected = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    assert parse_timestamp(moment.isoformat()) == expected
    assert stored(passages({"seen": moment}))["seen"] == [expected]
    assert moment_of(microseconds_of(expected)) == expected


@pytest.mark.parametrize(
    ("values", "kind", "num_left_out"),
    [
        ([1, "a", "b"], "string", 1),
        ([1, "a"], "integer", 1),
        ([1, 2, "a"], "integer", 1),
        ([1, 0.5, "a"], "number", 1),
        ([1, True, True, None], "boolean", 1),
    ],
)
def test_of_mixed_values_the_most_frequent_type_counts_in_any_order(values, kind, num_left_out) -> None:
    for mixed in permutations(values):
        kept, left_out = MetadataSchema().leave_out_misfits(passages(*({"x": value} for value in mixed)))
        assert MetadataSchema.infer(kept).fields == {"x": kind}
        assert left_out == {"x": num_left_out}
        with pytest.raises(InputError, match="metadata field 'x' is"):
            MetadataSchema.infer(passages(*({"x": value} for value in mixed)))

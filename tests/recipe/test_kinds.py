"""Sections of which there are several kinds."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from d2llm.core.errors import RecipeError
from d2llm.core.problems import describe_errors
from d2llm.core.registry import Registry
from d2llm.recipe.sections import SectionOfKind


class Tuning(SectionOfKind):
    kinds = Registry("tuning", {}, "d2llm.test_tunings")
    default_kind = "lora"


class Lora(Tuning, kind="lora"):
    """Adapters."""

    rank: int = Field(default=8, ge=1)
    """Of each adapter."""


class Frozen(Tuning, kind="frozen"):
    pass


class Nested(Tuning, kind="nested"):
    inner: Tuning


class Backbone(BaseModel):
    tuning: Tuning = Lora()
    other: Tuning | None = None


def backbone(**values: Any) -> Backbone:
    return Backbone.model_validate(values)


def problem(**values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        backbone(**values)
    return describe_errors(caught.value, Backbone)


def test_a_section_is_a_table_a_name_or_an_instance():
    assert backbone(tuning={"kind": "lora", "rank": 16}).tuning == Lora(rank=16)
    assert backbone(tuning={"rank": 16}).tuning == Lora(rank=16)
    assert backbone(tuning="frozen").tuning == Frozen()
    assert backbone(tuning=Frozen()).tuning == Frozen()
    assert backbone(other="frozen").other == Frozen()
    assert backbone().other is None
    assert backbone(tuning={"kind": "nested", "inner": "frozen"}).tuning == Nested(inner=Frozen())


@pytest.mark.parametrize("value", [Lora(rank=3), Frozen(), Nested(inner=Lora(rank=2))])
def test_what_was_written_is_read_again(value):
    before = Backbone(tuning=value, other=value)
    assert Backbone.model_validate(before.model_dump(mode="json")) == before
    assert Backbone.model_validate_json(before.model_dump_json()) == before
    assert before.model_dump(exclude_unset=True)["tuning"]["kind"] == value.kind
    assert TypeAdapter(Tuning).validate_python(value.model_dump()) == value


def test_the_base_makes_the_kind_that_is_named():
    assert Tuning(kind="lora", rank=16) == Lora(rank=16) == Lora.model_validate(Lora(rank=16).model_dump())
    assert type(Tuning()) is Lora
    assert type(Tuning.model_validate({"kind": "frozen"})) is Frozen
    assert Lora(rank=3).model_copy(update={"rank": 4}) == Lora(rank=4) != Lora(rank=3)
    assert pickle.loads(pickle.dumps(Lora(rank=3))) == Lora(rank=3)
    with pytest.raises(RecipeError, match="no tuning 'lroa'; did you mean 'lora'"):
        Tuning(kind="lroa")
    with pytest.raises(ValidationError, match="kind"):
        Lora.model_validate({"kind": "frozen"})


def test_a_kind_before_a_colon():
    assert Tuning.split_kind("frozen:a:b") == ("frozen", "a:b")
    assert Tuning.split_kind("C:a") == ("lora", "C:a")
    assert Tuning.split_kind("frozen") == ("lora", "frozen")
    with pytest.raises(RecipeError, match="no tuning 'else'; there are: lora"):
        Tuning.split_kind("else:a")


def test_problems_name_the_path():
    assert problem(tuning="full") == "tuning: no tuning 'full'; there are: lora, frozen, nested"
    assert problem(tuning={"kind": "lroa"}) == "tuning: no tuning 'lroa'; did you mean 'lora'?"
    assert problem(tuning={"kind": "frozen", "rank": 2}) == (
        "unknown key 'tuning.rank' of kind frozen; it is a setting of kind lora"
    )
    assert problem(tuning={"kind": "frozen", "zzz": 2}) == "unknown key 'tuning.zzz'; known keys here: kind"
    assert problem(tuning={"rnak": 2}) == "unknown key 'tuning.rnak'; did you mean 'rank'?"
    assert problem(tuning={"rank": 0}) == "tuning.rank is 0, but must be at least 1"
    assert problem(tuning=5) == "tuning is 5 (int), but must be a kind, or a table: write [tuning]"
    assert problem(tuning={"kind": 5}).startswith("tuning.kind is missing")
    assert problem(other={"kind": "nested", "inner": {"rank": 0}}).startswith("other.inner.rank is 0, but must")


def test_in_python_the_message_is_readable():
    with pytest.raises(ValidationError, match=r"this section: no tuning 'full'; there are: lora"):
        backbone(tuning="full")
    with pytest.raises(RecipeError, match="Lora: unknown key 'rnak'; did you mean 'rank'"):
        Lora(rnak=1)  # pyright: ignore[reportCallIssue]


def test_an_editor_knows_the_kinds():
    schema = Backbone.model_json_schema()
    (names, *tables) = schema["properties"]["tuning"]["anyOf"]
    assert names["enum"] == ["lora", "frozen", "nested"]
    found = [schema["$defs"][table["$ref"].rsplit("/", 1)[1]] if "$ref" in table else table for table in tables]
    assert [table["properties"]["kind"]["const"] for table in found] == ["lora", "frozen", "nested"]
    assert found[0]["properties"]["rank"]["description"] == "Of each adapter."
    assert "required" not in found[0]
    assert found[1]["required"] == ["kind"]

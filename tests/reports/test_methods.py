"""What kinds of methods say of themselves, in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from d2llm.core.registry import Registry
from d2llm.recipe.sections import LoraConfig, SectionOfKind
from d2llm.reports import methods
from d2llm.reports.methods import SECTIONS, describe_methods, facts_table, methods_table, plain
from installed_package import install

SHIPPED = [(section, kind) for section, registry in SECTIONS.items() for kind in registry.shipped]


@pytest.mark.parametrize(("section", "kind"), SHIPPED)
def test_a_kind_says_what_it_is_and_where_it_was_measured(section: str, kind: str) -> None:
    cls = SECTIONS[section].find(kind)
    assert cls.kind == kind
    facts = methods._facts(section, cls)
    assert facts.what
    assert facts.what.endswith(".")
    assert re.match(r"not measured\b.{9}", facts.measured) or re.search(r"\]\([\w./-]+\.md#[\w-]+\)", facts.measured)
    assert "``" not in facts.what + facts.needs + facts.measured


class Bread(SectionOfKind):
    kinds: ClassVar[Registry[Bread]] = Registry("bread", {}, "")


class Rye(Bread, kind="rye"):
    """Of rye,
    with ``salt``.

    More of it.
    """

    paper = "Baker 2020, arXiv 2001.00001"
    needs = frozenset({"live_teacher", "labels"})
    costs = "an ``oven``"
    measured = "+.1 on oats ([one seed](log/2026-11.md#a-b))"
    salt: float = Field(default=0.5, gt=0, le=1)
    """How much
    ``salt``."""
    shape: Literal["long", "round"] | None = None
    slices: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2)
    lora: LoraConfig = LoraConfig(rank=4)
    inside: Bread | None = None
    name: str


def test_a_kind_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "SECTIONS", {"bread": Bread.kinds})
    described = describe_methods()
    facts = described["bread"]["rye"]
    assert (facts.what, facts.paper) == ("Of rye, with `salt`.", "Baker 2020, arXiv 2001.00001")
    assert facts.needs == "labels, live teacher; an `oven`"
    shown = {name: (setting.type, setting.default) for name, setting in facts.settings.items()}
    assert shown == {
        "salt": ("number > 0 ≤ 1", "0.5"),
        "shape": ("long | round", "none"),
        "slices": ("list of whole number", "(1, 2)"),
        "lora": ("table", ""),
        "lora.rank": ("whole number ≥ 1", "4"),
        "lora.alpha": ("number > 0", "8.0"),
        "lora.dropout": ("number ≥ 0 < 1", "0.05"),
        "inside": ("bread", "none"),
        "name": ("text", "must be given"),
    }
    assert facts.settings["salt"].help == "How much `salt`."
    (row,) = methods_table("bread", described["bread"]).texts()
    assert row == [
        "rye Baker 2020, arXiv 2001.00001",
        "Of rye, with salt. needs: labels, live teacher; an oven",
        "+.1 on oats (one seed)",
    ]
    assert ["measured in", "docs/log/2026-11.md#a-b"] in facts_table("bread", "rye", facts).texts()


def test_a_broken_package_hides_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "import nothing_of_this_name", SECTIONS["losses"], {"theirs": "Theirs"}, monkeypatch)
    losses = describe_methods()["losses"]
    assert "'theirs' of their-package cannot be imported" in losses["theirs"].what
    assert losses["margin_mse"].paper


def test_ablations_train_with_a_kind_or_without_it() -> None:
    described = describe_methods()
    losses, pretraining = described["losses"], described["training.pretraining"]
    assert losses["margin_mse"].ablations == ("margin-mse",)
    assert losses["contrastive_imitation"].ablations == ("without-ci",)
    assert {"list-imitation", "without-li"} <= {*losses["list_imitation"].ablations}
    assert pretraining["masked_next_token"].ablations == ("bidirectional",)
    assert "two-adapters" in described["student.backbone.tuning"]["lora"].ablations


def test_markdown_as_plain_text() -> None:
    assert plain("see [the `log`](log/a.md#b-c), `x`") == "see the log, x"


@pytest.mark.parametrize("section", [*SECTIONS])
def test_an_unknown_kind_is_answered_with_the_nearest(section: str) -> None:
    *_, known = SECTIONS[section].shipped
    with pytest.raises(ValueError, match=rf"no .* '{known[:-1]}x{known[-1]}'; did you mean '{known}'\?"):
        SECTIONS[section].find(f"{known[:-1]}x{known[-1]}")

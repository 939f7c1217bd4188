"""The checks of ``d2llm doctor``, and what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from d2llm.core.errors import D2LLMError
from d2llm.core.table import Cell, Style, Table

Level = Literal["ok", "note", "problem"]
_REPORT = "report it with the output of d2llm doctor --json; the other checks were made all the same"
_STYLES: dict[Level, Style] = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what was found, and what to do where that is not as it should be.

    A ``problem`` keeps something from working; a ``note`` is slower, missing or unusual, and may be meant.
    """

    area: str
    what: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at. Whatever goes wrong while looking is a finding too, so that the other checks are made."""

    area: str
    what: str
    look: Callable[[], Finding | Iterable[Finding]]

    def findings(self) -> Iterator[Finding]:
        """What was found, and a problem where the check itself failed."""
        try:
            found = self.look()
            yield from [found] if isinstance(found, Finding) else found
        except D2LLMError as error:
            yield problem_of(self.area, self.what, error, otherwise=_REPORT)
        except Exception as error:  # noqa: BLE001 - a doctor looks at what is broken in ways that nobody foresaw
            reason = " ".join(str(error).split()) or "without a message"
            yield Finding(
                self.area, self.what, "problem", f"this check failed: {type(error).__name__}: {reason}", _REPORT
            )


def problem_of(area: str, what: str, error: D2LLMError, *, otherwise: str) -> Finding:
    """An error of d2llm as a finding; most of its messages end with what to do, ``otherwise`` stands for the others."""
    found, _, advice = str(error).rpartition("; ")
    return Finding(area, what, "problem", found, advice) if found else Finding(area, what, "problem", advice, otherwise)


def findings_table(findings: Sequence[Finding]) -> Table:
    """All findings, the areas in their order."""
    table = Table("", "", "", "found", "what to do", framed=False)
    area = ""
    for finding in findings:
        table.add_row(
            Cell("" if finding.area == area else finding.area, "bold"),
            finding.what,
            Cell(finding.level, _STYLES[finding.level]),
            finding.found,
            finding.advice,
        )
        area = finding.area
    return table

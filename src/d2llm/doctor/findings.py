"""The checks of ``d2llm doctor`` and their findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from d2llm.core.errors import D2LLMError
from d2llm.core.table import Cell, Style, Table

Level = Literal["ok", "note", "problem"]
_REPORT = "report it with the output of d2llm doctor --json; the other checks still ran"
_STYLES: dict[Level, Style] = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and what to do if something is wrong.

    A ``problem`` stops something from working; a ``note`` reports something slow, missing or unusual, which may be
    intended.
    """

    area: str
    subject: str
    level: Level
    result: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to check. An error of the check itself is a finding too, so that the other checks still run."""

    area: str
    subject: str
    run: Callable[[], Finding | Iterable[Finding]]

    def findings(self) -> Iterator[Finding]:
        """The results, and a problem if the check itself failed."""
        try:
            result = self.run()
            yield from [result] if isinstance(result, Finding) else result
        except D2LLMError as error:
            yield finding_of(self.area, self.subject, error, otherwise=_REPORT)
        except Exception as error:  # noqa: BLE001 - a broken installation may raise anything
            reason = " ".join(str(error).split()) or "without a message"
            yield Finding(
                self.area, self.subject, "problem", f"this check failed: {type(error).__name__}: {reason}", _REPORT
            )


def finding_of(area: str, subject: str, error: D2LLMError, *, otherwise: str) -> Finding:
    """Turn an error of d2llm into a finding; the advice is the end of its message, or ``otherwise`` if it has none."""
    message, _, advice = str(error).rpartition("; ")
    if not message:
        return Finding(area, subject, "problem", advice, otherwise)
    return Finding(area, subject, "problem", message, advice)


def findings_table(findings: Sequence[Finding]) -> Table:
    """A table of the findings, with each area named once."""
    table = Table("", "", "", "result", "what to do", framed=False)
    area = ""
    for finding in findings:
        table.add_row(
            Cell("" if finding.area == area else finding.area, "bold"),
            finding.subject,
            Cell(finding.level, _STYLES[finding.level]),
            finding.result,
            finding.advice,
        )
        area = finding.area
    return table

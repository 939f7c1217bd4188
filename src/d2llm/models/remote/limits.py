"""What asking a model may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of time, of tokens read and written, and of their cost in the currency of the prices; None: no limit."""

    minutes: float | None = None
    tokens: int | None = None
    cost: float | None = None

    def reached(self, minutes: float, tokens: int, cost: float | None) -> tuple[str, int | float] | None:
        """Name and value of the first limit that this much reaches, if it reaches one."""
        for name, spent in (("minutes", minutes), ("tokens", tokens), ("cost", cost or 0.0)):
            limit = getattr(self, name)
            if limit is not None and spent >= limit:
                return name, limit
        return None

"""Simulates a CPU without bfloat16 products."""

from __future__ import annotations

import pytest


def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make d2llm believe that this CPU has no bfloat16 products, fast or fused."""
    monkeypatch.setattr("d2llm.models.device.cpu_has_fast_bfloat16", lambda: False)
    for module in ("d2llm.models.scorer", "d2llm.doctor.machine"):
        monkeypatch.setattr(f"{module}.can_fuse_bfloat16_layers", lambda: False)

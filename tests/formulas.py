"""The formulas of all losses under their kinds: those of the core and those in methods/losses."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import d2llm.methods.losses
from d2llm.ops.losses import *  # noqa: F403

for _module in iter_modules(d2llm.methods.losses.__path__):
    _formula = getattr(import_module(f"d2llm.methods.losses.{_module.name}"), _module.name, None)
    if _formula is not None:
        globals()[_module.name] = _formula

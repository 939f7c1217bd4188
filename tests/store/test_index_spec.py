"""What an index is to be is declared once."""

from __future__ import annotations

from edited_source import run_edited

SPEC = "d2llm.store.index_spec"
FIELD = """    note_length: int = setting(7, "For a new index: how long a note may be.", Shown(metavar="N"), ge=1)

    def shape("""
CODE = """
import sys
from pathlib import Path
from d2llm import D2LLMError, Index, IndexSpec
from d2llm.retrieval.shard import shard
from d2llm.cli.main import app
from d2llm.core.types import Passage
from fake_models import FakeStudent
from typer.testing import CliRunner

folder = Path(sys.argv[1])
index = Index.create(folder / "index", FakeStudent(), note_length=3)
index.upsert([Passage("a", "one"), Passage("b", "two")])
shard(folder / "index", folder / "sharded", 2)
encoded = Index.create(folder / "several", FakeStudent(), IndexSpec(note_length=4, num_shards=2))
for name in ("index", "sharded", "several"):
    opened = Index.open(folder / name, FakeStudent())
    print(name, opened.spec.note_length, [store.manifest["note_length"] for store in opened.storage.stores])
print(Index.create(folder / "plain", FakeStudent()).spec.note_length)
try:
    Index.create(folder / "index", FakeStudent(), exist_ok=True)
except D2LLMError as error:
    print(error)
run = CliRunner(env={"COLUMNS": "100"}).invoke
print(run(app, ["encode", "--help"]).output)
corpus = folder / "x.txt"
corpus.write_text("text")
print(run(app, ["index", str(folder / "index"), "upsert", str(corpus), "--note-length", "5"]).output)
"""


def test_a_setting_of_an_index_is_one_field(tmp_path):
    """With the field alone it is an option, an argument, and in the manifests of the index and of its shards."""
    shown = run_edited({SPEC: [("    def shape(", FIELD)]}, CODE, tmp_path)
    assert "index 3 [3]\nsharded 3 [3, 3]\nseveral 4 [4, 4]\n7\n" in shown
    assert "already exists with note_length=3, not 7" in shown
    panel = shown[shown.index("A new index") :]
    assert "--note-length" in panel[: panel.index("╰")]
    assert "exists already with 3, and --note-length (5) is for a new index" in " ".join(shown.split())

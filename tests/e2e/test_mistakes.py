"""Common user mistakes: each exits with code 2 and a message saying what is wrong, where, and how to fix it.

No existing file is changed, no new file is left behind, and no traceback is printed. The whole text of a message is
tested where it is raised; here a few of its words show that it reached the user.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest

from d2llm.retrieval.index import Index
from e2e.command_line import d2llm, succeed, write_data, write_recipe
from tiny_models import write_tiny_model
from tiny_server import write_tiny_index, write_tiny_student

LINE = '{"_id": "a", "text": "the cat"}\n'

UPSERTS = {  # a corpus, what is in it, options, and words of the message
    "empty.jsonl": ("", "", "empty.jsonl: holds no passages; each line must be"),
    "half.jsonl": (LINE + '{"_id": "b", ', "", "half.jsonl:2: not valid JSON"),
    "cut.jsonl.gz": (gzip.compress(LINE.encode())[:-9], "", "fetch or write the file again"),
    "packed.jsonl": (gzip.compress(LINE.encode()), "", "name it .gz, or unpack it"),
    "empty.pdf": ("", "", "empty.pdf: it is empty"),
    "nested.jsonl": ("[" * 100_000, "", "nested.jsonl:1: not valid JSON (it is nested too deeply"),
    "deep.jsonl": (LINE[:-2] + ', "metadata": {"a": {"b": 1}}}', "", "passage 'a', metadata field 'a'"),
    "year.jsonl": (LINE[:-2] + ', "year": "soon"}', "--field year:integer", "'year'"),
    "third.jsonl": (LINE[:-2] + ', "position": "third"}', "", "position"),
    "one.jsonl": (LINE, "--vectors int5", "vector format 'int5' is unknown"),
    "two.jsonl": (LINE, "--chunk-tokens 9999", "give 8 to 64"),
    "three.jsonl": (LINE, "--chunk-tokens -5", "'--chunk-tokens'"),
    "four.jsonl": (LINE, "--field year:century", "century"),
}

FILES = {  # other files in the folder "wrong"
    "folder/notes.x": "",
    "last.jsonl": LINE[:-2] + ', "year": "last"}',
    "present.jsonl": LINE.replace('"a"', '"p0"'),
    "pairs.jsonl": '{"a": 1}',
    "bare/manifest.json": '{"kind": "teacher", "format_version": 1}',
    "x.gguf": "xxxx",
    "served.toml": 'indx = "x"',
    "twice.jsonl": LINE + LINE,
    "report.html": '{"verb": "evaluate"}',
    "utf16.html": b"\xff\xfe",
    "report.json": "{}",
}

RECIPES = {  # changes of the recipe
    "key.toml": ("learning_rate", "learing_rate"),
    "elsewhere.toml": ("/data", "/gone"),
}

EVALUATE = "evaluate data --student student-0 --no-teacher"
JUDGE = "judge a b --teacher"
SEARCH = "search index cat --student"
JUDGED = EVALUATE.replace("data", "{}") + " --split test"

DAMAGED = [  # a file of a folder, what a copy has in its place, a command on the copy, and words of the message
    ("index/manifest.json", "{", "search {} cat", "restore or rebuild the folder"),
    ("student-0/head.safetensors", None, SEARCH + " {}", "restore the student's folder"),
    ("decoder/config.json", "{", JUDGE + " {}", "config.json: cannot be read as JSON"),
    ("decoder/model.safetensors", "xx", JUDGE + " {}", "Give a local folder with config.json and safetensors weights"),
    ("decoder/model.safetensors", None, JUDGE + " {}", "no safetensors weights in this model folder"),
    ("data/corpus.jsonl", None, JUDGED, "looked for corpus.jsonl or corpus.jsonl.gz"),
    ("data/queries.jsonl", "\n", JUDGED, "queries.jsonl: holds no queries"),
    ("data/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq16\tgone\t1\n", JUDGED, "none of its 1 queries has a relev"),
]

COMMANDS = {
    # corpora and indexes
    "index new upsert gone.jsonl": "gone.jsonl: no such file; check the path",
    "index new sync gone": "there is no such file or folder",
    "index index upsert wrong/last.jsonl": "'year'",
    "index index add wrong/present.jsonl": "already exist",
    "index data upsert data/corpus.jsonl --student student-0": "holds files that d2llm did not make",
    "index tiny.toml/new upsert data/corpus.jsonl --student student-0": "tiny.toml is a file, not a folder; give",
    "encode data/corpus.jsonl --out tiny.toml/new --student student-0": "tiny.toml is a file, not a folder; give",
    "encode data/corpus.jsonl --out index --student student-0": "--overwrite",
    "index none stats": "not found",
    "index index delete": "there is no id",
    "index index restore gone": "no snapshot 'gone'",
    # searches
    "search gone cat": "gone is not a d2llm index folder; check the path",
    "search index": "there is no query",
    "search index '   '": "query '1' has no text",
    "search index caf\udce9": "is not valid Unicode text",
    "search index cat --top-k -1": "'--top-k': '-1' must be at least 1",
    "search index cat --task assymetric": "'symmetric', 'asymmetric'",
    "search index cat --filtre x": "--filter",
    "search index cat --filter 'yaer > 3'": "did you mean 'year'?",
    "search index cat --filter 'year >'": "filter, at '>'",
    "search index --queries wrong/twice.jsonl": "twice.jsonl:2: id 'a'",
    "search index cat --budget-ms 5": "exact",
    "search index cat --reranker-set max_ms=3": "--reranker-set is for --reranker",
    "search index cat --json no/such/r.json": "no folder no/such to write it in; make it first, or correct the path",
    "search index cat --json data": "is a directory",
    # models
    "search index cat --student d2lm-minilm": "one of the shipped students: d2llm-minilm,",
    "search index cat --student owner/name": "HF_HUB_OFFLINE is set, so the Hub was not contacted",
    "judge a b --teacher wrong/bare": "manifest.json: has no readable teacher configuration",
    "judge a b --teacher wrong/x.gguf": "cannot be read as a GGUF model",
    "judge ' ' b --teacher {root}/decoder": "' ' has no text",
    "export student-0 --to onxn --out x": "'onnx', 'openvino', 'numpy'",
    "export student-0 --to numpy --out data": "holds files that d2llm did not make, and they would be lost",
    "push student-0 nonsense --license mit": "give owner/name",
    "demo --out tiny.toml": "tiny.toml: is a file, but the demo keeps",
    # recipes
    "run {root}/data": "cannot be read (Is a directory)",
    "run d2llm-smal": "; did you mean 'd2llm-small'?",
    "recipe check d2llm wrong/key.toml": "key.toml: unknown key",
    "run wrong/elsewhere.toml": "Give each with --data gone=FOLDER",
    "mine tiny.toml --out data/corpus.jsonl": "'--out'",
    "run tiny.toml --again minne": "'mine', 'tune-teacher'",
    "label tiny.toml --out run": "no training plan yet; run `d2llm mine`",
    "distill tiny.toml --variant cosin --out run": "mean 'cosine'?",
    "gate tiny.toml --teacher nobody --out run": "model 'nobody'",
    "mine tiny.toml --out run --json run/no/r.json": "there is no folder run/no to write it in",
    "ensemble tiny.toml --member {root}/decoder --out run --html no/s.html": "there is no folder no to write it in",
    "ablate tiny.toml --out run --markdown no/t.md": "there is no folder no to write it in",
    "ablate --list --json no/t.json": "there is no folder no to write",
    "ablate": "RECIPE is missing",
    "ablate tiny.toml --variants cosin": "did you mean 'cosine'",
    "init data --out no/r.toml": "there is no folder no to write it in",
    "init data --out tiny.toml": "already exists and is not replaced",
    "init gone": "gone: no such file or folder; give a folder in BEIR layout",
    "methods margin_mze": "no method or section 'margin_mze'; did you mean 'margin_mse'?",
    # measures of data
    "evaluate wrong/folder": "and no corpus.jsonl either",
    f"{EVALUATE} --run gone.run": "gone.run: no such file; check the path",
    f"{EVALUATE} --baseline best": "cosine_tuned",
    f"{EVALUATE} --tuned-cosine nowhere": "no student at 'nowhere'",
    f"{EVALUATE} --labels none": "none: holds no teacher labels",
    f"{EVALUATE} --index none": "none",
    "leaderboard wrong/report.json": "not the report of an evaluation",
    "data check wrong/pairs.jsonl": "pairs.jsonl:1: no two texts",
    # fits
    "fit data --max-cost 2": "--max-cost needs",
    "fit data --hours 1 --minutes 5": "--hours and --minutes",
    "fit data --minutes 0": "--minutes is 0",
    "fit data --prices 1 2": "--prices are about an endpoint",
    "fit data --endpoint http://127.0.0.1:1/v1": "--endpoint needs --writer",
    "fit data --student nobody": "no student at 'nobody'",
    "fit data --output .": "holds something else than a fit",
    # the server
    "serve": "there is nothing to serve; give the folder of an index, or --student",
    "serve index faq=data --port 0": "index 'faq': ",
    "serve index --set max_txts=3": "did you mean 'max_texts'?",
    "serve --config wrong/served.toml": "served.toml: unknown setting 'indx'; did you mean 'index'?",
    "serve index --host 0.0.0.0": "d2llm keys FILE add NAME",
    "serve index --port 99999": "'--port'",
    "serve index --keys-file none.json --port 0": "none.json",
    "serve index --report gone.html --port 0": "No such file",
    "serve index --report wrong --port 0": "Is a directory",
    "serve index --report wrong/report.html --port 0": "not an HTML",
    "serve index --report wrong/utf16.html --port 0": "UTF-8",
    "keys data/corpus.jsonl add me": "corpus.jsonl: is not a file of API keys",
    "keys data add me": "data: cannot be read (Is a directory)",
    "keys gone.json list": "make it with: d2llm keys gone.json add NAME",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of valid inputs, and of invalid ones in "wrong"."""
    root = tmp_path_factory.mktemp("mistakes")
    write_tiny_student(root)
    write_tiny_index(root, 20)
    write_tiny_model(root / "encoder", "bert")
    write_tiny_model(root / "decoder", "llama")
    write_data(root / "data")
    recipe = write_recipe(root / "tiny.toml", root, root / "data").read_text()
    assert all(old in recipe for old, _ in RECIPES.values())
    recipes = {name: recipe.replace(old, new) for name, (old, new) in RECIPES.items()}
    corpora = {name: content for name, (content, *_) in UPSERTS.items()}
    for name, content in (corpora | FILES | recipes).items():
        write(root / "wrong" / name, content)
    return root


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture(autouse=True)
def offline(root, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(root)


def _contents(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
        if not path.name.startswith("passages.db-")  # SQLite's own, as long as this process has the index open
    }


def _assert_refused(*arguments, fragments):
    result = d2llm(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    unwrapped = " ".join(result.stderr.replace("│", " ").split())  # usage errors are wrapped and drawn in a box
    for part in fragments:
        assert part in unwrapped, f"{part!r} is not in: {unwrapped}"


CORPORA = {
    f"index new upsert wrong/{name} --student student-0 {options}": words
    for name, (_, options, words) in UPSERTS.items()
}


@pytest.mark.parametrize(("command", "words"), (CORPORA | COMMANDS).items())
def test_mistakes_get_a_clear_error_and_leave_no_files(root, command, words):
    before = _contents(root)
    _assert_refused(*shlex.split(command.replace("{root}", str(root))), fragments=[words])
    assert _contents(root) == before


@pytest.mark.parametrize(("file", "content", "command", "words"), [(*case[:3], case[3:]) for case in DAMAGED])
def test_damaged_folders_get_a_clear_error(root, tmp_path, file, content, command, words):
    folder, _, name = file.partition("/")
    copy = shutil.copytree(root / folder, tmp_path / folder)
    if content is None:
        (copy / name).unlink()
    else:
        write(copy / name, content)
    before = _contents(root), _contents(tmp_path)
    _assert_refused(*command.replace("{}", str(copy)).split(), fragments=words)
    assert (_contents(root), _contents(tmp_path)) == before


@pytest.mark.parametrize("name", ["data/corpus.jsonl", "tiny.toml"])
def test_an_unreadable_file_is_reported(root, monkeypatch, name):
    """The permission error is simulated, because root may read any file."""
    path, open_file = root / name, Path.open

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return open_file(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    is_corpus = name.startswith("data")
    arguments = ("index", "new", "upsert", path, "--student", "student-0") if is_corpus else ("run", path)
    _assert_refused(*arguments, fragments=[f"{path}: cannot be read (Permission denied); check"])
    assert not (root / "new").exists()


@pytest.mark.parametrize("name", ["/secret/file", b"/secret/file"])  # bytes: tensorboard's
def test_any_permission_error_names_the_file(monkeypatch, name):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr("d2llm.retrieval.search.Searcher", refuse)
    _assert_refused("search", "index", "cat", fragments=["error: /secret/file: Permission denied; check the path"])


def test_an_unwritable_report_folder_is_reported(monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode, **_: False)
    arguments = ("search", "index", "cat", "--json", "r.json")
    _assert_refused(*arguments, fragments=["r.json: the folder . cannot be written to"])


@pytest.mark.parametrize("kind", ["corpus", "queries", "recipe"])
def test_a_utf8_byte_order_mark_is_accepted(root, tmp_path, kind):
    """Windows editors write one."""
    if kind == "recipe":
        recipe = write(tmp_path / "r.toml", b"\xef\xbb\xbf" + (root / "tiny.toml").read_bytes())
        # This message shows that the recipe itself was read.
        _assert_refused("label", recipe, "--out", "run", fragments=["there is no training plan yet"])
        return
    file = write(tmp_path / "c.jsonl", b"\xef\xbb\xbf" + LINE.encode())
    if kind == "queries":
        assert "the cat" in succeed("search", "index", "--queries", file).stdout
    else:
        succeed("index", tmp_path / "new", "upsert", file, "--student", "student-0")


def test_ctrl_c_keeps_committed_work_and_a_rerun_continues(tmp_path, monkeypatch):
    lines = [json.dumps({"_id": f"p{n}", "text": f"the cat and the number {n}"}) for n in range(60)]
    folder, corpus = tmp_path / "new", write(tmp_path / "c.jsonl", "\n".join(lines))
    command = ("index", folder, "upsert", corpus, "--student", "student-0")
    monkeypatch.setattr("d2llm.retrieval.upserting.BLOCK_PASSAGES", 20)

    from d2llm.models.student import Student

    encode, calls = Student.encode_passages, []

    def interrupted(self, texts, **options):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, texts, **options)

    monkeypatch.setattr(Student, "encode_passages", interrupted)
    result = d2llm(*command)
    assert (result.exit_code, calls) == (130, [20, 20, 20])
    assert "run the same command again to continue; finished parts are kept" in result.stderr
    assert "Traceback" not in result.stderr
    with Index.open(folder) as index:
        assert len(index) == 40
    monkeypatch.setattr(Student, "encode_passages", encode)
    assert "20 added" in succeed(*command).stderr
    with Index.open(folder) as index:
        assert len(index) == 60

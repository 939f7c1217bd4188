"""Common user mistakes: each exits with code 2 and a message saying what is wrong, where, and how to fix it.

No existing file is changed, no new file is left behind, and no traceback is printed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from d2llm.retrieval.index import Index
from e2e.command_line import d2llm, succeed, write_data, write_recipe
from tiny_models import write_tiny_model
from tiny_server import write_tiny_index, write_tiny_student

LINE = '{"_id": "a", "text": "the cat"}\n'


@dataclass(frozen=True)
class World:
    """Valid inputs, and helpers that make invalid ones from them."""

    root: Path

    @property
    def index(self):
        return self.root / "index"

    @property
    def student(self):
        return self.root / "student-0"

    @property
    def other_student(self):
        return self.root / "student-1"

    @property
    def teacher(self):
        return self.root / "decoder"

    @property
    def data(self):
        return self.root / "data"

    @property
    def recipe(self):
        return self.root / "tiny.toml"

    @property
    def corpus(self):
        return self.data / "corpus.jsonl"

    def file(self, name, content):
        path = self.root / "wrong" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def upsert(self, name, content, *options):
        return ("index", self.root / "new", "upsert", self.file(name, content), "--student", self.student, *options)

    def damaged(self, folder, name, content):
        """A copy of a folder in which one file has other content, or is missing if ``content`` is None."""
        copy = self.root / "wrong" / folder.name
        shutil.copytree(folder, copy)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        return copy

    def changed_recipe(self, old, new):
        text = self.recipe.read_text()
        assert old in text
        return self.file("changed.toml", text.replace(old, new))

    def evaluate(self, *options):
        return ("evaluate", self.data, "--student", self.student, "--no-teacher", *options)

    def judgements(self, content):
        copy = self.root / "wrong" / "data"
        shutil.copytree(self.data, copy)
        (copy / "qrels" / "test.tsv").write_bytes(content.encode() if isinstance(content, str) else content)
        return ("evaluate", copy, "--student", self.student, "--no-teacher", "--split", "test")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("mistakes")
    for seed in (0, 1):
        write_tiny_student(root, seed=seed)
    write_tiny_index(root, 20)
    write_tiny_model(root / "encoder", "bert")
    write_tiny_model(root / "decoder", "llama")
    write_data(root / "data")
    write_recipe(root / "tiny.toml", root, root / "data")
    return World(root)


@pytest.fixture(autouse=True)
def offline_and_tidy(world, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(world.root)
    yield
    shutil.rmtree(world.root / "wrong", ignore_errors=True)


CORPUS = {
    "no such file": (lambda w: ("index", "new", "upsert", "gone.jsonl"), "gone.jsonl: no such file; check the path"),
    "empty": (lambda w: w.upsert("c.jsonl", ""), "c.jsonl: holds no passages; each line must be"),
    "half a line": (lambda w: w.upsert("c.jsonl", LINE + '{"_id": "b", '), "c.jsonl:2: not valid JSON"),
    "one JSON array": (lambda w: w.upsert("c.jsonl", f"[\n{LINE}]"), "c.jsonl:1: not valid JSON"),
    "a list a line": (lambda w: w.upsert("c.jsonl", '["a"]'), "c.jsonl:1: must be a JSON object, found a list"),
    "nested without end": (lambda w: w.upsert("c.jsonl", "[" * 100_000), "c.jsonl:1: nested too deeply"),
    "a damaged table": (lambda w: w.upsert("c.parquet", "PAR1"), "none of the 1 files", "c.parquet: it cannot be"),
    "an empty PDF": (lambda w: w.upsert("c.pdf", ""), "none of the 1 files could be read", "c.pdf: it is empty"),
    "misspelt field": (
        lambda w: w.upsert("corpus.jsonl", '{"_idd": "a", "text": "x"}'),
        "corpus.jsonl:1: field '_id' is missing; fields found: '_idd', 'text'",
    ),
    "no text": (
        lambda w: w.upsert("c.jsonl", '{"_id": "a", "text": null}'),
        "field 'text' must be a string, found null",
    ),
    "a fraction as id": (lambda w: w.upsert("c.jsonl", '{"_id": 1.5, "text": "x"}'), "field '_id' must be a string"),
    "an id twice": (lambda w: w.upsert("c.jsonl", LINE + LINE), "c.jsonl:2: id 'a' was already used in line 1"),
    "an unpaired surrogate": (
        lambda w: w.upsert("c.jsonl", LINE.replace("cat", "\\ud800")),
        "has an unpaired surrogate",
    ),
    "UTF-16": (lambda w: w.upsert("c.jsonl", LINE.encode("utf-16")), "c.jsonl:1: not valid UTF-8", "save the file as"),
    "Latin-1": (
        lambda w: w.upsert("c.jsonl", LINE.replace("cat", "caf\xe9").encode("latin-1")),
        "save the file as UTF-8",
    ),
    "no gzip": (lambda w: w.upsert("c.jsonl.gz", LINE), "c.jsonl.gz:1: damaged or truncated gzip"),
    "gzip cut short": (
        lambda w: w.upsert("c.jsonl.gz", gzip.compress(LINE.encode())[:-9]),
        "damaged or truncated gzip",
        "fetch or write the file again",
    ),
    "gzip without its name": (lambda w: w.upsert("c.jsonl", gzip.compress(LINE.encode())), "name it .gz, or unpack it"),
    "a folder without a corpus": (
        lambda w: ("index", "new", "upsert", w.file("x", "").parent),
        "there are no documents",
        "1 files have other suffixes than",
    ),
    "nested metadata": (
        lambda w: w.upsert("c.jsonl", '{"_id": "a", "text": "x", "metadata": {"a": {"b": 1}}}'),
        "passage 'a', metadata field 'a'",
    ),
    "metadata that do not fit": (
        lambda w: ("index", w.index, "upsert", w.file("c.jsonl", LINE[:-2] + ', "year": "last"}')),
        "'year'",
    ),
}

INDEX = {
    "no such index": (lambda w: ("search", "gone", "cat"), "gone is not a d2llm index folder; check the path"),
    "a file for an index": (lambda w: ("search", w.corpus, "cat"), "is not a d2llm index folder"),
    "other files in its place": (
        lambda w: ("index", w.data, "upsert", w.corpus, "--student", w.student),
        "holds files that d2llm did not make",
    ),
    "a file in its place": (
        lambda w: ("index", w.recipe, "upsert", w.corpus, "--student", w.student),
        "tiny.toml: is a file, but a folder",
    ),
    "a file for its folder": (
        lambda w: ("index", w.recipe / "new", "upsert", w.corpus, "--student", w.student),
        "tiny.toml is a file, not a folder; give another path",
    ),
    "encode into a file": (
        lambda w: ("encode", w.corpus, "--out", w.recipe / "new", "--student", w.student),
        "tiny.toml is a file, not a folder; give another path",
    ),
    "an index in the way": (lambda w: ("encode", w.corpus, "--out", w.index, "--student", w.student), "--overwrite"),
    "unknown vectors": (lambda w: w.upsert("c.jsonl", LINE, "--vectors", "int5"), "vector format 'int5' is unknown"),
    "passages too long": (lambda w: w.upsert("c.jsonl", LINE, "--chunk-tokens", 9999), "give 8 to 64"),
    "negative passages": (
        lambda w: w.upsert("c.jsonl", LINE, "--chunk-tokens", -5),
        "'--chunk-tokens'",
        "greater than",
    ),
    "no such snapshot": (lambda w: ("index", w.index, "restore", "gone"), "no snapshot 'gone'"),
    "a snapshot elsewhere": (lambda w: ("index", w.index, "snapshot", "../x"), "cannot name a snapshot"),
    "its manifest damaged": (
        lambda w: ("search", w.damaged(w.index, "manifest.json", b"{"), "cat"),
        "manifest.json: not valid JSON",
        "restore or rebuild the folder",
    ),
    "nothing to approximate": (lambda w: ("index", w.index, "ann", "--recall", 2), "'--recall'"),
}

SEARCH = {
    "no query": (lambda w: ("search", w.index), "there is no query"),
    "a query of spaces": (lambda w: ("search", w.index, "   "), "query '1' has no text"),
    "a query of another encoding": (lambda w: ("search", w.index, "caf\udce9"), "is not valid Unicode text"),
    "a negative number": (lambda w: ("search", w.index, "cat", "--top-k", -1), "'--top-k'", "greater than"),
    "no number": (lambda w: ("search", w.index, "cat", "--top-k", "few"), "'--top-k'", "valid integer"),
    "an unknown task": (lambda w: ("search", w.index, "cat", "--task", "assymetric"), "'symmetric', 'asymmetric'"),
    "a misspelt option": (lambda w: ("search", w.index, "cat", "--filtre", "x"), "--filter"),
    "a misspelt verb": (lambda w: ("serach", w.index, "cat"), "Did you mean 'search'?"),
    "a misspelt field": (lambda w: ("search", w.index, "cat", "--filter", "yaer > 3"), "did you mean 'year'?"),
    "half a filter": (lambda w: ("search", w.index, "cat", "--filter", "year >"), "filter, at '>'", "write conditions"),
    "no file of queries": (lambda w: ("search", w.index, "--queries", "gone.jsonl"), "gone.jsonl: no such file"),
    "a query twice": (lambda w: ("search", w.index, "--queries", w.file("q.jsonl", LINE * 2)), "q.jsonl:2: id 'a'"),
    "a budget without proof": (lambda w: ("search", w.index, "cat", "--budget-ms", 5), "exact"),
    "an unknown device": (lambda w: ("search", w.index, "cat", "--device", "gpu0"), "device 'gpu0'", "use one of cpu"),
    "a report into no folder": (
        lambda w: ("search", w.index, "cat", "--json", "no/such/r.json"),
        "there is no folder no/such to write it in; make it first, or correct the path",
    ),
    "a report over a folder": (lambda w: ("search", w.index, "cat", "--json", w.data), "'--json'", "is a directory"),
}

MODELS = {
    "a misspelt student": (
        lambda w: ("search", w.index, "cat", "--student", "d2lm-minilm"),
        "no student at 'd2lm-minilm'",
        "one of the shipped students: d2llm-minilm,",
    ),
    "another student": (lambda w: ("search", w.index, "cat", "--student", w.other_student), "made by student"),
    "a student of the Hub, offline": (
        lambda w: ("search", w.index, "cat", "--student", "owner/name"),
        "HF_HUB_OFFLINE is set, so the Hub was not contacted",
    ),
    "a model for a student": (lambda w: ("search", w.index, "cat", "--student", "encoder"), "no student at 'encoder'"),
    "a student's weights cut short": (
        lambda w: ("search", w.index, "cat", "--student", w.damaged(w.student, "head.safetensors", b"\x08")),
        "head.safetensors cannot be read",
        "restore the student's folder",
    ),
    "a student's weights gone": (
        lambda w: ("search", w.index, "cat", "--student", w.damaged(w.student, "head.safetensors", None)),
        "head.safetensors cannot be read",
    ),
    "a student's manifest emptied": (
        lambda w: ("search", w.index, "cat", "--student", w.damaged(w.student, "manifest.json", b"{}")),
        "is not a d2llm manifest",
    ),
    "an unknown teacher": (
        lambda w: ("judge", "a", "b", "--teacher", "gpt9"),
        "model 'gpt9'",
        "one of minilm, smollm2, e5",
    ),
    "a teacher's manifest cut short": (
        lambda w: ("judge", "a", "b", "--teacher", w.file("manifest.json", "{").parent),
        "manifest.json: not valid JSON",
        "restore or rebuild the folder",
    ),
    "a teacher's manifest without a configuration": (
        lambda w: (
            "judge",
            "a",
            "b",
            "--teacher",
            w.file("manifest.json", '{"kind": "teacher", "format_version": 1}').parent,
        ),
        "manifest.json: has no readable teacher configuration",
        "restore the folder",
    ),
    "a model's configuration cut short": (
        lambda w: ("judge", "a", "b", "--teacher", w.damaged(w.teacher, "config.json", b"{")),
        "config.json: is not a model's configuration",
        "fetch or restore it",
    ),
    "a model's configuration a list": (
        lambda w: ("judge", "a", "b", "--teacher", w.damaged(w.teacher, "config.json", b"[1]")),
        "config.json: is not a model's configuration",
    ),
    "a model's weights damaged": (
        lambda w: ("judge", "a", "b", "--teacher", w.damaged(w.teacher, "model.safetensors", b"xx")),
        "cannot be loaded",
        "Give a local folder with config.json and safetensors weights",
    ),
    "no GGUF": (lambda w: ("judge", "a", "b", "--teacher", w.file("x.gguf", "xxxx")), "cannot be read as a GGUF model"),
    "nothing to judge": (lambda w: ("judge", " ", "b", "--teacher", w.teacher), "' ' has no text"),
    "an unknown prompt": (
        lambda w: ("judge", "a", "b", "--teacher", w.teacher, "--prompt", "papre"),
        "use one of paper",
    ),
    "a prompt of another encoding": (
        lambda w: ("judge", "a", "b", "--teacher", w.teacher, "--prompt", w.file("p.toml", b"\xff\xfe")),
        "p.toml: not valid UTF-8",
    ),
    "an unknown form": (lambda w: ("export", w.student, "--to", "onxn", "--out", "x"), "'onnx', 'openvino', 'numpy'"),
    "an export over a file": (lambda w: ("export", w.student, "--to", "numpy", "--out", w.recipe), "is a file, but"),
    "an export over other files": (
        lambda w: ("export", w.student, "--to", "numpy", "--out", w.data),
        "data: holds files that d2llm did not make, and they would be lost",
    ),
    "no name on the Hub": (lambda w: ("push", w.student, "nonsense", "--license", "mit"), "give owner/name"),
    "a demo in a file": (lambda w: ("demo", "--out", w.recipe), "tiny.toml: is a file, but the demo keeps"),
}

RUNS = {
    "no recipe": (lambda w: ("run", "gone.toml"), "gone.toml: cannot be read", "check the path"),
    "a folder for a recipe": (lambda w: ("run", w.data), "cannot be read (Is a directory)"),
    "a misspelt recipe": (lambda w: ("run", "d2lm"), "no recipe 'd2lm'", "one of the shipped recipes: "),
    "a recipe of nothing": (
        lambda w: ("run", w.file("r.toml", "")),
        "r.toml: names no data sets; add a [[data]] section",
    ),
    "a recipe of another encoding": (lambda w: ("run", w.file("r.toml", b"\xff\xfex")), "r.toml: not valid UTF-8"),
    "a misspelt key": (lambda w: ("run", w.changed_recipe("learning_rate", "learing_rate")), "did you mean 'learning_"),
    "a negative epoch": (lambda w: ("run", w.changed_recipe("epochs = 1", "epochs = -1")), "training.epochs"),
    "data elsewhere": (lambda w: ("run", w.changed_recipe(str(w.data), "gone")), "Give each with --data gone=FOLDER"),
    "a run into a file": (lambda w: ("mine", w.recipe, "--out", w.corpus), "'--out'", "is a file"),
    "an unknown step": (lambda w: ("run", w.recipe, "--again", "minne"), "'mine', 'tune-teacher'"),
    "a step before its time": (
        lambda w: ("label", w.recipe, "--out", "run"),
        "no training plan yet; run `d2llm mine`",
    ),
    "an unknown variant": (lambda w: ("distill", w.recipe, "--variant", "cosin", "--out", "run"), "mean 'cosine'?"),
    "an unknown teacher at the gate": (
        lambda w: ("gate", w.recipe, "--teacher", "nobody", "--out", "run"),
        "model 'nobody'",
    ),
    "a run's report into no folder": (
        lambda w: ("mine", w.recipe, "--out", "run", "--json", "run/no/r.json"),
        "there is no folder run/no to write it in",
    ),
    "an ensemble's page into no folder": (
        lambda w: ("ensemble", w.recipe, "--member", w.teacher, "--out", "run", "--html", "no/s.html"),
        "there is no folder no to write it in",
    ),
    "an ablation's table into no folder": (
        lambda w: ("ablate", w.recipe, "--out", "run", "--markdown", "no/t.md"),
        "there is no folder no to write it in",
    ),
    "a list into no folder": (lambda w: ("ablate", "--list", "--json", "no/t.json"), "there is no folder no to write"),
    "a recipe into no folder": (
        lambda w: ("init", w.data, "--out", "no/r.toml"),
        "there is no folder no to write it in",
    ),
    "a recipe in the way": (lambda w: ("init", w.data, "--out", w.recipe), "already exists and is not replaced"),
    "a recipe for nothing": (lambda w: ("init", "gone"), "gone: no such file or folder; give a folder in BEIR layout"),
}

MEASURES = {
    "no data": (lambda w: ("evaluate", "gone"), "gone: no such file or folder; give a folder in BEIR layout"),
    "an empty folder": (lambda w: ("evaluate", w.file("x", "").parent), "and no corpus.jsonl either"),
    "an unknown split": (lambda w: w.evaluate("--split", "tset"), "split 'tset'", "dev, test"),
    "a page into no folder": (lambda w: ("evaluate", w.data, "--html", "no/r.html"), "there is no folder no to write"),
    "no run": (
        lambda w: w.evaluate("--run", "gone.run"),
        "gone.run: no such file; check the path",
    ),
    "judgements with commas": (
        lambda w: w.judgements("query-id,corpus-id,score\n"),
        "test.tsv:1: the first line must be",
    ),
    "judgements without a head": (lambda w: w.judgements("q16\ts16\t1\n"), "test.tsv:1: the first line must be"),
    "half a judgement": (
        lambda w: w.judgements("query-id\tcorpus-id\tscore\nq16\ts16\t0.5\n"),
        "test.tsv:2: the score must be a whole number, found '0.5'",
    ),
    "no judgements": (lambda w: w.judgements(""), "test.tsv: is empty", "it needs the header"),
    "pairs without texts": (lambda w: ("data", "check", w.file("p.jsonl", '{"a": 1}')), "p.jsonl:1: no two texts"),
}

SERVER = {
    "nothing to serve": (lambda w: ("serve",), "there is nothing to serve; give the folder of an index, or --student"),
    "a misspelt setting": (lambda w: ("serve", w.index, "--set", "max_txts=3"), "did you mean 'max_texts'?"),
    "a setting without a value": (lambda w: ("serve", w.index, "--set", "max_texts"), "write --set NAME=VALUE"),
    "a negative setting": (lambda w: ("serve", w.index, "--set", "max_texts=-3"), "max_texts", "greater than 0"),
    "a misspelt setting in a file": (
        lambda w: ("serve", "--config", w.file("s.toml", 'indx = "x"')),
        "s.toml: unknown setting 'indx'; did you mean 'index'?",
    ),
    "settings of another encoding": (
        lambda w: ("serve", "--config", w.file("s.toml", b"\xff\xfe")),
        "s.toml: not valid UTF-8 (byte 0); save the file as UTF-8",
    ),
    "open to all without keys": (lambda w: ("serve", w.index, "--host", "0.0.0.0"), "d2llm keys FILE add NAME"),
    "a port beyond all ports": (lambda w: ("serve", w.index, "--port", 99999), "'--port'"),
    "keys into no folder": (lambda w: ("keys", "no/keys.json", "add", "me"), "there is no folder no to write it in"),
    "keys into another file": (lambda w: ("keys", w.corpus, "add", "me"), "corpus.jsonl: is not a file of API keys"),
    "keys into a folder": (lambda w: ("keys", w.data, "add", "me"), "data: cannot be read (Is a directory)"),
    "keys of no file": (lambda w: ("keys", "gone.json", "list"), "make it with: d2llm keys gone.json add NAME"),
}

CASES = [
    pytest.param(arguments, fragments, id=f"{group}: {name}")
    for group, cases in (
        ("corpus", CORPUS),
        ("index", INDEX),
        ("search", SEARCH),
        ("models", MODELS),
        ("runs", RUNS),
        ("measures", MEASURES),
        ("server", SERVER),
    )
    for name, (arguments, *fragments) in cases.items()
]


def _contents(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
    }


def _assert_refused(*arguments, fragments):
    result = d2llm(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    unwrapped = " ".join(result.stderr.replace("│", " ").split())  # usage errors are wrapped and drawn in a box
    for part in fragments:
        assert part in unwrapped, f"{part!r} is not in: {unwrapped}"


@pytest.mark.parametrize(("make_arguments", "fragments"), CASES)
def test_mistakes_get_a_clear_error_and_leave_no_files(world, make_arguments, fragments):
    arguments = make_arguments(world)
    before = _contents(world.root)
    _assert_refused(*arguments, fragments=fragments)
    assert _contents(world.root) == before


def test_a_port_in_use_is_reported(world):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        _assert_refused("serve", world.index, "--port", port, fragments=[f"port {port} of 127.0.0.1 is in use"])


@pytest.mark.parametrize("name", ["corpus", "recipe"])
def test_an_unreadable_file_is_reported(world, monkeypatch, name):
    """The permission error is simulated, because root may read any file."""
    path, open_file = getattr(world, name), Path.open

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return open_file(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    arguments = ("index", "new", "upsert", path, "--student", world.student) if name == "corpus" else ("run", path)
    _assert_refused(*arguments, fragments=[f"{path}: cannot be read (Permission denied); check"])
    assert not (world.root / "new").exists()


def test_any_permission_error_names_the_file(world, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/secret/file")

    monkeypatch.setattr("d2llm.retrieval.search.search", refuse)
    _assert_refused(
        "search", world.index, "cat", fragments=["/secret/file: Permission denied; check the path, its permissions"]
    )


def test_an_unwritable_report_folder_is_reported(world, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode, **_: False)
    _assert_refused(
        "search", world.index, "cat", "--json", "r.json", fragments=["r.json: the folder . cannot be written to"]
    )


@pytest.mark.parametrize("kind", ["corpus", "queries", "recipe"])
def test_a_utf8_byte_order_mark_is_accepted(world, kind):
    """Windows editors write one."""
    if kind == "recipe":
        recipe = world.file("r.toml", b"\xef\xbb\xbf" + world.recipe.read_bytes())
        # This message shows that the recipe itself was read.
        _assert_refused("label", recipe, "--out", "run", fragments=["there is no training plan yet"])
        return
    file = world.file("c.jsonl", b"\xef\xbb\xbf" + LINE.encode())
    if kind == "queries":
        assert "the cat" in succeed("search", world.index, "--queries", file).stdout
    else:
        succeed("index", world.root / "wrong" / "new", "upsert", file, "--student", world.student)


def test_ctrl_c_keeps_committed_work_and_a_rerun_continues(world, monkeypatch):
    lines = [json.dumps({"_id": f"p{n}", "text": f"the cat and the number {n}"}) for n in range(60)]
    corpus = world.file("c.jsonl", "\n".join(lines))
    folder = corpus.parent / "new"
    command = ("index", folder, "upsert", corpus, "--student", world.student)
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

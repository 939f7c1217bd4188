from __future__ import annotations

import os
import subprocess
import sys
import sysconfig

import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import Passage
from d2llm.demo.corpus import MAX_TITLE, MAX_WORDS, MIN_PASSAGES, MIN_WORDS, build_corpus, choose_groups, cut, group_of
from d2llm.demo.report import QUESTIONS, without_piece

SCHED = '''
"""A scheduler of events."""
raise SystemExit("a source that is read must not be run")

class scheduler:
    def __init__(self, timefunc: float = 1.5, *, delay=None):
        """Never of interest."""

    def enter(self, delay, /, action, *args: int, priority: int = 0, **kwargs: str) -> None:
        """Put an event into
           the queue."""

    def _hidden(self):
        """Private, so nobody can call it."""

    def cancel(self):
        """Short one."""

    @property
    def queue(self):
        """An ordered list of upcoming events."""

    @staticmethod
    def now():
        """The time that it is now."""

    @classmethod
    def make(cls, size):
        """Build a scheduler of that size."""

class Event:
    """A thing that happens once."""

    def __init__(self, name):
        pass

    class Kind:
        """What sort of event it is."""

if True:
    async def wait(seconds=float("inf")):
        """Wait for the next event."""
else:
    def wait():
        """Some other way to wait."""
'''


@pytest.fixture
def stdlib(tmp_path):
    """A standard library of three modules."""
    files = {
        "sched.py": SCHED,
        "_private.py": '"""Private modules are not of interest."""',
        "not_in_the_stdlib.py": '"""Something that lies beside the library."""',
        "json/__init__.py": (
            '"""Reading and writing of data."""\n__all__ = ["dumps"]\n__all__ += ["Encoder"]\n'
            "try:\n    from ._impl import dumps, helper\nexcept ImportError:\n    from _native import dumps\n"
            "from json._more import Encoder\n"
        ),
        "json/_impl.py": (
            '"""The private half of it."""\ndef dumps(obj):\n    """Turn an object into text."""\n'
            'def helper():\n    """Of no use to others."""\n'
        ),
        "json/_more/__init__.py": 'class Encoder:\n    """Turns what it gets into text."""\n',
        "json/tool.py": 'def main(argv=()):\n    """Run the command line program."""\n',
        "json/tests/test_it.py": '"""Tests are not of interest."""',
        "heapq.py": (
            "from _heap import *\n"
            'def push(heap):\n    """Turn what is given into a heap."""\n'
            "class Heap:\n"
            '    def push(heap):\n        """Turn what is given into a heap."""\n'
            '    def pop(heap):\n        """Turn what is given into a heap."""\n'
        ),
        "_heap.py": (
            'def starred(a=1, *, b):\n    """Comes in with the star."""\n'
            'def _no():\n    """Not even with the star."""\n'
        ),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return tmp_path


@pytest.fixture
def without_c(monkeypatch):
    monkeypatch.setattr("d2llm.demo.corpus._WITH_C_PARTS", ())


def test_passages_are_read_from_sources(stdlib, without_c):
    corpus = build_corpus(stdlib)
    assert [(passage.id, passage.title, passage.text) for passage in corpus.passages] == [
        ("heapq.Heap.pop", "heapq.Heap.pop(heap)", "Turn what is given into a heap."),
        ("heapq.Heap.push", "heapq.Heap.push(heap)", "Turn what is given into a heap."),
        ("heapq.starred", "heapq.starred(a=1, *, b)", "Comes in with the star."),
        ("json", "module json", "Reading and writing of data."),
        ("json.Encoder", "json.Encoder()", "Turns what it gets into text."),
        ("json.dumps", "json.dumps(obj)", "Turn an object into text."),
        ("json.tool.main", "json.tool.main(argv=())", "Run the command line program."),
        ("sched", "module sched", "A scheduler of events."),
        ("sched.Event", "sched.Event(name)", "A thing that happens once."),
        ("sched.Event.Kind", "sched.Event.Kind()", "What sort of event it is."),
        (
            "sched.scheduler.enter",
            "sched.scheduler.enter(delay, /, action, *args, priority=0, **kwargs)",
            "Put an event into\nthe queue.",
        ),
        ("sched.scheduler.make", "sched.scheduler.make(size)", "Build a scheduler of that size."),
        ("sched.scheduler.now", "sched.scheduler.now()", "The time that it is now."),
        ("sched.scheduler.queue", "sched.scheduler.queue", "An ordered list of upcoming events."),
        ("sched.wait", "sched.wait(seconds=float('inf'))", "Wait for the next event."),
    ]
    # heapq.push repeats the name and text of heapq.Heap.push; "Short one." has only two words.
    assert (corpus.num_duplicates, corpus.num_tiny) == (1, 1)
    assert corpus.num_documented == 15
    assert corpus.num_modules == 4  # json and json.tool, heapq, sched
    assert corpus.python == sys.version.split()[0]


def test_long_documentation_is_cut_into_pieces(tmp_path, without_c):
    paragraphs = [" ".join(f"{letter}{n}" for n in range(50)) for letter in "abcde"]
    (tmp_path / "abc.py").write_text('"""' + "\n\n".join(paragraphs) + '"""')
    corpus = build_corpus(tmp_path)
    assert [(passage.id, passage.title, passage.text) for passage in corpus.passages] == [
        ("abc", "module abc", "\n\n".join(paragraphs[:2])),
        ("abc#2", "module abc", "\n\n".join(paragraphs[2:4])),
        ("abc#3", "module abc", paragraphs[4]),
    ]
    assert (corpus.num_documented, len(corpus.passages)) == (1, 3)
    assert [without_piece(passage.id) for passage in corpus.passages] == ["abc"] * 3


def test_cut_keeps_short_texts_as_they_are():
    assert cut("one two\n\nthree", 3) == ["one two\n\nthree"]


def test_cut_prefers_paragraphs_then_lines_then_words():
    assert cut("a b\n\nc d\n\ne", 3) == ["a b", "c d\n\ne"]
    assert cut("a b\nc d\ne\n\nf", 3) == ["a b", "c d\ne", "f"]
    assert cut("a b c d e f g", 3) == ["a b c", "d e f", "g"]


@pytest.mark.parametrize("max_words", [1, 2, 5, 17, 1000])
def test_cut_loses_and_repeats_nothing(max_words):
    text = "a b c\n\nd e f g h\ni j\n\n\nk l m n o p q r s t u v w x y z\n  1 2\n\n3"
    pieces = cut(text, max_words)
    assert " ".join(pieces).split() == text.split()
    assert max(len(piece.split()) for piece in pieces) <= max_words


def test_long_signatures_are_cut_between_parameters(tmp_path, without_c):
    parameters = [f"parameter_{n}=None" for n in range(30)]
    source = f'def function({", ".join(parameters)}):\n    """It takes far too much."""\n'
    (tmp_path / "abc.py").write_text(source)
    (passage,) = build_corpus(tmp_path).passages
    assert passage.title == f"abc.function({', '.join(parameters[:5])}, ...)"
    assert len(passage.title) <= MAX_TITLE < len(f"abc.function({', '.join(parameters[:6])}, ...)")


def test_lone_surrogates_are_replaced(tmp_path, without_c):
    (tmp_path / "abc.py").write_text(r'"""Half a character: \ud800 is one."""')
    (passage,) = build_corpus(tmp_path).passages
    assert passage.text == "Half a character: ? is one."


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match=r"installed without the sources of its standard library; run the demo with"):
        build_corpus()


@pytest.fixture(scope="module")
def corpus():
    return build_corpus()


def test_the_installed_library_gives_enough_passages(corpus):
    assert len(corpus.passages) >= MIN_PASSAGES
    ids = [passage.id for passage in corpus.passages]
    assert len(set(ids)) == len(ids)
    assert list(map(without_piece, ids)) == sorted(map(without_piece, ids))
    assert not [name for name in ids if any(part.startswith("_") for part in name.split("."))]
    lengths = [len(passage.text.split()) for passage in corpus.passages if "#" not in passage.id]
    assert min(lengths) >= 1
    assert max(lengths) <= MAX_WORDS
    assert min(len(p.text.split()) for p in corpus.passages if f"{p.id}#2" not in ids and "#" not in p.id) >= MIN_WORDS


@pytest.mark.parametrize(
    ("passage_id", "title", "words"),
    [
        (
            "threading.Timer",
            "threading.Timer(interval, function, args=None, kwargs=None)",
            "specified number of seconds",
        ),
        ("sorted", "sorted(iterable, /, *, key=None, reverse=False)", "new list containing all items"),
        ("str.upper", "str.upper()", "converted to uppercase"),
        ("math.sqrt", "math.sqrt(x, /)", "Return the square root of x."),
        ("collections.deque.appendleft", None, "left side of the deque"),
        ("datetime.date.isoformat", None, "according to ISO"),
        ("os.listdir", "os.listdir(path=None)", "names of the files in the directory"),
        ("time.sleep", None, "Delay execution"),
        ("sqlite3.Connection.commit", None, "Commit"),
        ("json.loads", None, "Deserialize"),
        ("collections.abc.Set.isdisjoint", "collections.abc.Set.isdisjoint(other)", "null intersection"),
    ],
)
def test_known_passages_are_in_the_corpus(corpus, passage_id, title, words):
    (passage,) = [passage for passage in corpus.passages if passage.id == passage_id]
    assert words in " ".join(passage.text.split())
    assert title is None or passage.title == title


def test_every_question_has_a_right_answer_in_the_corpus(corpus):
    ids = {without_piece(passage.id) for passage in corpus.passages}
    assert [question.text for question in QUESTIONS if not question.right_ids & ids] == []
    assert len({question.text for question in QUESTIONS}) == len(QUESTIONS) == 8


def test_the_corpus_is_reproducible_and_imports_nothing():
    # Both in new processes: in this one, libraries that other tests use may have replaced functions of Python.
    code = """
import dataclasses, hashlib, sys
from d2llm.demo.corpus import build_corpus
print(hashlib.sha256(repr([dataclasses.astuple(each) for each in build_corpus().passages]).encode()).hexdigest())
print(*sorted({"turtle", "tkinter", "antigravity", "idlelib", "cgi", "sched", "webbrowser"} & set(sys.modules)))
"""
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("7", "11")
    ]
    digest, modules = printed[0].split("\n")[:2]
    assert printed[1] == printed[0]
    assert len(digest) == 64
    assert modules == ""


@pytest.mark.parametrize(
    ("passage_id", "group"), [("dict", "dict"), ("copy#2", "copy"), ("os.path.join", "os"), ("sched.enter#2", "sched")]
)
def test_the_group_is_the_outermost_name(passage_id, group):
    assert group_of(passage_id) == group


def test_chosen_groups_are_whole_and_include_required_ones():
    passages = [Passage(f"m{n}.f{k}", "text") for n in range(20) for k in range(5)]
    few, more = (choose_groups(passages, number, {"m3", "m7", "gone"}) for number in (12, 31))
    assert {"m3", "m7"} < few < more
    assert (len(few), len(more)) == (3, 7)  # five passages each
    assert choose_groups(passages, 0, {"m3"}) == {"m3"}
    assert choose_groups(passages, 1000, set()) == {f"m{n}" for n in range(20)}

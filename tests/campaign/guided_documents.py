"""Parsers of documents, tables, data sets, queries and filters, as targets."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from campaign.guided_targets import Read, Target, json_of, lines_of, of_file, text_of
from file_cases.docx_cases import docx_cases
from file_cases.epub_cases import epub_cases
from file_cases.odt_cases import odt_cases
from file_cases.pptx_cases import pptx_cases
from file_cases.xlsx_cases import xlsx_cases

_FILES = Path(__file__).parents[1] / "data" / "files"
_MARKDOWN = (
    b"---\ntitle: A\ndate: 2024-01-01\ntags: [a, b]\n---\n# One\n\nText [link](b.md) `code` **b**\n\n"
    b"| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\na = 1\n```\n\n- x\n  - y\n"
    b"\n:::{note}\nText\n:::\n[[wiki|link]] {{tag}}\n"
)
_RST = (
    b"Title\n=====\n\n.. note:: Text\n\n:ref:`x` and *more* |a|\n\n.. |a| replace:: b\n\n.. code-block:: python\n\n"
    b"   a = 1\n\n.. py:function:: f(x)\n\n   Says x.\n\n=== ===\na   b\n=== ===\n1   2\n=== ===\n"
    b"\n.. csv-table:: T\n\n   1,2\n"
)
_HTML = (
    b'<!doctype html><html><head><title>T</title><meta charset="utf-8"></head><body><main><h1 id=a>A</h1><p>Text'
    b"<table><tr><th>x<td colspan=2 rowspan=3>1</td></tr></table><pre>x</pre><svg><text>y</text></svg><dl><dt>a<dd>b"
    b"<math><mi>x</mi></math><nav>n</nav></body></html>"
)
_CODE = {
    ".js": b"export function f(x) { return x }\nclass A { g() { return 1 } }\nconst h = (x) => x\n",
    ".ts": b"interface A { x: number }\nexport class B<T> implements A { x = 1; f(): T { return null } }\n",
    ".go": b"package a\n\n// F says.\nfunc (s *S) F(x int) int { return x }\ntype S struct{ a int }\n",
    ".rs": b"/// Says.\npub fn f(x: i32) -> i32 { x }\nimpl A for B { fn g(&self) {} }\n",
    ".c": b"#ifdef A\nint f(int x) { return x; }\n#endif\nstruct s { int a; };\n",
    ".cpp": b"namespace a { template <class T> class B { void f() {} }; }\n",
    ".java": b"package a;\n@A class B { int f() { return 1; } interface C { void g(); } }\n",
    ".rb": b"module A\n  class B\n    def f(x) = x\n    def g\n      1\n    end\n  end\nend\n",
    ".php": b"<?php\nnamespace A;\nclass B { function f($x) { return $x; } }\n",
    ".sh": b"f() {\n  echo a\n}\n",
    ".lua": b"local function f(x) return x end\nA.g = function() end\n",
    ".kt": b"class A { fun f(x: Int) = x; companion object { fun g() {} } }\n",
    ".swift": b"class A { init() {} func f(x: Int) -> Int { return x } }\n",
    ".scala": b"object A { def f(x: Int) = x; class B }\n",
    ".cs": b"namespace A { class B { int F() => 1; int P { get; set; } } }\n",
}
_CSV = (b"id,title,text,year\n1,A,the cat,2001\n2,B,the dog,2002\n", b'a;"b ""c""";d\n1;2;3\n', b"sep=;\na;b\n1;2\n")
_JSONL = (
    lines_of({"_id": "1", "title": "A", "text": "cat", "metadata": {"year": 1}}, {"_id": "2", "text": "dog"}),
    lines_of({"name": "x", "tags": ["a", {"b": 1.5}], "when": None}),
)
_FILTERS = (
    b"year >= 2020 AND language IN ('de', 'en')",
    b"NOT (title LIKE 'a%' ESCAPE '!') OR price BETWEEN 1 AND 2.5",
    b"published < TIMESTAMP '2024-01-01T00:00:00Z' AND is_new = TRUE",
    b'document_id IS NOT NULL AND "year" <> -1',
)
_CONDITIONS = lines_of(
    {
        "year": {"$gte": 2020, "$lt": 2024},
        "language": ["de", "en"],
        "$or": [{"a": {"$like": "x%"}}, {"$not": {"b": 1}}],
    },
    {"operator": "AND", "conditions": [{"field": "meta.year", "operator": ">=", "value": 2020}]},
).splitlines()
_QRELS = b"query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t2.0\n"
_PAIRS = lines_of(
    {"sentence1": "a cat", "sentence2": "a dog", "label": 1}, {"sentence1": "b", "sentence2": "c", "label": "0"}
)
_GRADED = lines_of({"query": "cat", "passages": ["a", "b"], "grades": [90, 5.5], "task": "asymmetric"})


def _contents(name: str) -> Callable[[Path], Read]:
    from d2llm.data.file_contents import read_contents

    return of_file(name, read_contents)


def contents(name: str, *seeds: bytes, json: bool = False) -> Target:
    """A file of one type, read as a document."""
    return Target(lambda folder: _contents(name)(folder), seeds, json=json)


def _code(folder: Path) -> Read:
    from d2llm.data.file_contents import read_contents

    suffixes = sorted(_CODE)

    def read(data: bytes) -> object:
        path = folder / f"a{suffixes[data[0] % len(suffixes)] if data else '.js'}"
        path.write_bytes(data[1:])
        return read_contents(path)

    return read


def archive(suffix: str, cases: Sequence[Any]) -> Target:
    """An archive of which one part has other bytes: the first byte says which."""
    whole = max(cases, key=lambda case: len(case.has)).data if hasattr(cases[0], "has") else cases[0].data
    with zipfile.ZipFile(io.BytesIO(whole)) as archived:
        parts = {name: archived.read(name) for name in archived.namelist()}
    names = [name for name in parts if name.endswith((".xml", ".rels", ".opf", ".xhtml", ".html", ".ncx"))]

    def make(folder: Path) -> Read:
        from d2llm.data.file_contents import read_contents

        def read(data: bytes) -> object:
            changed = names[data[0] % len(names)] if data else names[0]
            path = folder / f"a{suffix}"
            with zipfile.ZipFile(path, "w") as written:
                for name, content in parts.items():
                    written.writestr(name, data[1:] if name == changed else content)
            return read_contents(path)

        return read

    seeds = [bytes([at]) + parts[name] for at, name in enumerate(names)]
    return Target(make, seeds)


def _encoding(folder: Path) -> Read:
    del folder
    from d2llm.data.file_contents import decoded_text

    return lambda data: decoded_text(data[1:], with_declaration=bool(data[:1] > b"\x7f"))


def _words(folder: Path) -> Read:
    del folder
    from d2llm.ops import words
    from d2llm.store.bm25 import WordIndex

    def read(data: bytes) -> object:
        text = text_of(data)
        folded, spans = words.placed_fold(text)
        assert len(folded) == len(spans), "a letter has no place"
        words.words(text)
        return WordIndex.from_texts([text, "the cat"])

    return read


def _pieces(folder: Path) -> Read:
    """Texts with tables, split into passages; every word is in one of them."""
    del folder
    from tokenizers import Tokenizer, models, pre_tokenizers

    from d2llm.retrieval.chunking import TableSplitter, TextSplitter

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def split(text: str, room: int) -> list[tuple[int, str]]:
        return TextSplitter(tokenizer, room).pieces(text)

    splitter = TableSplitter(12, split, lambda texts: [len(tokenizer.encode(text).ids) for text in texts])

    def read(data: bytes) -> object:
        text = text_of(data)
        pieces = splitter.split(text)
        assert bool(pieces) == bool(text.strip()), "a text without passages, or passages without a text"
        return pieces

    return read


def _filter(folder: Path) -> Read:
    del folder
    from d2llm.store.filters import parse_filter
    from d2llm.store.schema import MetadataSchema

    declared = ["year:integer", "language:string", "price:number", "published:timestamp", "is_new:boolean"]
    schema = MetadataSchema.parse(declared)
    return lambda data: parse_filter(text_of(data), schema)


def _conditions(folder: Path) -> Read:
    del folder
    from d2llm.integrations.filters import dictionary_condition, haystack_condition

    def read(data: bytes) -> object:
        value: Any = json_of(data)
        is_of_haystack = isinstance(value, dict) and "operator" in value
        return (haystack_condition if is_of_haystack else dictionary_condition)(value)

    return read


def _named(module: str, function: str) -> Callable[[Any], object]:
    from importlib import import_module

    return getattr(import_module(module), function)


def of_text(module: str, function: str, *seeds: bytes, expected: Sequence[str] = ()) -> Target:
    """A function of a text."""

    def make(folder: Path) -> Read:
        del folder
        call = _named(module, function)
        return lambda data: call(text_of(data))

    return Target(make, seeds, expected=expected)


def of_path(name: str, module: str, function: str, *seeds: bytes, json: bool = False) -> Target:
    """A function of a file; what it yields is read to its end."""

    def make(folder: Path) -> Read:
        call = _named(module, function)

        def read(path: Path) -> object:
            found = call(path)
            return list(found) if hasattr(found, "__next__") else found

        return of_file(name, read)(folder)

    return Target(make, seeds, json=json)


def _folder_of(name: str, others: dict[str, bytes], module: str, function: str) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        for other, content in others.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(content)
        call = _named(module, function)
        return of_file(name, lambda _: call(folder))(folder)

    return make


def _declarations(folder: Path) -> Read:
    del folder
    from d2llm.store.schema import MetadataSchema

    return lambda data: MetadataSchema.parse(text_of(data).split("\n"))


_BEIR = {"queries.jsonl": lines_of({"_id": "q1", "text": "cat"}), "qrels/dev.tsv": _QRELS}

DOCUMENTS: dict[str, Target] = {
    "markdown": contents("a.md", _MARKDOWN),
    "rst": contents("a.rst", _RST),
    "html": contents("a.html", _HTML, b'\x1f<meta charset="latin-1">\xe9<p>a'),
    "csv": contents("a.csv", *_CSV),
    "tsv": contents("a.tsv", b"a\tb\n1\t2\n"),
    "jsonl": contents("a.jsonl", *_JSONL, json=True),
    "python": contents(
        "a.py", b'@d\ndef f(x):\n    """Says x."""\n    return x\n\nclass A:\n    async def g(self): pass\n'
    ),
    "code": Target(_code, [bytes([at]) + _CODE[suffix] for at, suffix in enumerate(sorted(_CODE))]),
    "docx": archive(".docx", docx_cases()),
    "odt": archive(".odt", odt_cases()),
    "pptx": archive(".pptx", pptx_cases()),
    "xlsx": archive(".xlsx", xlsx_cases()),
    "epub": archive(".epub", epub_cases()),
    "encodings": Target(_encoding, [b"\0caf\xe9", "日本語".encode("euc-jp"), "\ufeffa".encode("utf-16")]),
    "words": Target(_words, ["The café's 日本語 ภาษาไทย e-mail a.b_c".encode()]),
    "pieces": Target(_pieces, [b"cat cat. Cat\n\n| a | b |\n|---|---|\n" + b"| 1 | 2 |\n" * 9 + b"\n" + b"cat " * 20]),
    "filter": Target(_filter, _FILTERS),
    "conditions": Target(_conditions, _CONDITIONS, json=True),
    "timestamps": of_text(
        "d2llm.store.schema", "parse_timestamp", b"2024-05-31T12:30:00.5+0100", b"2024-05-31", expected=["ValueError"]
    ),
    "declarations": Target(_declarations, [b"year:integer\nlanguage: string"]),
    "counts": of_text("d2llm.sizing.plan", "parse_count", b"1.5M", b"300_000", b"2e6"),
    "sizes": of_text("d2llm.sizing.plan", "parse_bytes", b"1.5 GiB", b"16MB"),
    "corpus": Target(
        _folder_of("corpus.jsonl", _BEIR, "d2llm.data.beir", "read_beir"),
        [lines_of({"_id": "d1", "title": "A", "text": "the cat"}, {"_id": "d2", "text": "dog", "metadata": {"a": 1}})],
        json=True,
    ),
    "queries": of_path("queries.jsonl", "d2llm.data.beir", "read_queries", _BEIR["queries.jsonl"], json=True),
    "qrels": of_path("dev.tsv", "d2llm.data.beir", "read_qrels", _QRELS),
    "pairs": Target(_folder_of("dev.jsonl", {}, "d2llm.data.pairs", "read_pairs"), [_PAIRS], json=True),
    "pair tables": Target(
        _folder_of("train.tsv", {}, "d2llm.data.pairs", "read_pairs"),
        [b"sentence1\tsentence2\tlabel\na\tb\t1\nc\td\t0\n", b"a||b||1\nc||d||0\n", b'"a",b,1.5\nc,d,2\n'],
    ),
    "runs": of_path("a.trec", "d2llm.data.trec", "read_run", b"q1 Q0 d1 1 2.5 tag\nq1 Q0 d2 2 1e-3 tag\n"),
    "judged": of_path("a.tsv", "d2llm.fitting.training_data", "read_judged", b"cat\td1\t2\ndog\td2\n"),
    "examples": of_path("a.tsv", "d2llm.fitting.training_data", "read_examples", b"the cat\tcat?\n"),
    "graded lists": of_path("a.jsonl", "d2llm.models.teachers.recorded", "read_graded_lists", _GRADED, json=True),
}

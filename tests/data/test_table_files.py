"""Tables whose rows are documents."""

from __future__ import annotations

import json
import time
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest

from d2llm.data.documents import find_documents
from d2llm.data.indexed_corpus import open_corpus
from d2llm.data.table_files import table_rows
from d2llm.store.schema import MetadataSchema


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path) -> list[str]:
    found = find_documents([path])
    documents = list(found)
    assert not found.skipped
    return [document.text for document in documents]


TABLES = [
    ("name,age\nAnn,3\nBob,4\n", ["name", "age"], ["Ann", "3"], []),
    ('"name, first";age\n"Ann, x";3\n', ["name, first", "age"], ["Ann, x", "3"], []),
    ('name,note\nAnn,"a;b;c;d"\nBob,"e;f;g;h"\n', ["name", "note"], ["Ann", "a;b;c;d"], []),
    ("sep=;\nname;age\nAnn;3\n", ["name", "age"], ["Ann", "3"], []),
    ('"sep=|"\nname|age\nAnn|3,5\n', ["name", "age"], ["Ann", "3,5"], []),
    ("Price list 2024\nname;price\nTea;2,50\nMilk;3,10\n", ["name", "price"], ["Tea", "2,50"], ["Price list 2024"]),
    (
        "Prices, in euros\n\nname;price;unit\nTea;2,50;kg\nMilk;3,10;kg\n",
        ["name", "price", "unit"],
        ["Tea", "2,50", "kg"],
        ["Prices, in euros"],
    ),
    ("Price list;;\n;;\nname;price;unit\nTea;2;kg\n", ["name", "price", "unit"], ["Tea", "2", "kg"], ["Price list"]),
    ("# made by x\nname,age\nAnn,3\n", ["name", "age"], ["Ann", "3"], ["# made by x"]),
    ("\n\n\nname,age\nAnn,3\n", ["name", "age"], ["Ann", "3"], []),
    ("Ann,3,1.5\nBob,4,2.5\nCid,5,1\n", [], ["Ann", "3", "1.5"], []),
    ("2024-01-01;12,5;x\n2024-01-02;13,5;y\n", [], ["2024-01-01", "12,5", "x"], []),
    ("country,2019,2020\nFR,1.2,1.3\nDE,2.2,2.3\n", ["country", "2019", "2020"], ["FR", "1.2", "1.3"], []),
    ('name,note\nAnn,"two\nlines, here"\nBob,x\n', ["name", "note"], ["Ann", "two\nlines, here"], []),
    ("a,b,c\n1\n1,2\n1,2,3,4\n1,2,3\n1,2,3\n", ["a", "b", "c"], ["1"], []),
    ("x;x;y\n1;2;3\n", ["x", "x", "y"], ["1", "2", "3"], []),
    ("name;price\nTea;1,50\nMilk;2,75\nOil;3,20\n", ["name", "price"], ["Tea", "1,50"], []),
    ("1,5;2,5\n3,5;4,5\n", [], ["1,5", "2,5"], []),
    ("name\tnote\nAnn\ta, b, c\nBob\td, e, f\n", ["name", "note"], ["Ann", "a, b, c"], []),
    ("name|note\nAnn|a, b\nBob|c; d\n", ["name", "note"], ["Ann", "a, b"], []),
    (
        "id;text\n1;Hello, world, and more\n2;Just one\n3;Two, parts\n",
        ["id", "text"],
        ["1", "Hello, world, and more"],
        [],
    ),
    ("id,text\n1,first; second\n2,third; fourth\n3,fifth\n", ["id", "text"], ["1", "first; second"], []),
    ('name, note\nAnn, "a, b"\nBob, c\n', ["name", "note"], ["Ann", "a, b"], []),
    ('name,note\nAnn,"say \\"hi\\", ok"\nBob,"x"\n', ["name", "note"], ["Ann", 'say "hi", ok'], []),
    ('name,note\nAnn,"say ""hi"", ok"\nBob,"x"\n', ["name", "note"], ["Ann", 'say "hi", ok'], []),
    ('part,size\npipe,5"\nrod,7" long\nbar,"3"" wide"\n', ["part", "size"], ["pipe", '5"'], []),
    ("name\nAnn\nBob\n", ["name"], ["Ann"], []),
    ('text\n"a, b"\n"c, d"\n', ["text"], ["a, b"], []),
    ('"a";"b";"c"\n"1,5";"x, y, z";"2,5"\n"3,5";"x";"4,5"\n', ["a", "b", "c"], ["1,5", "x, y, z", "2,5"], []),
    ("name,start\nAnn,12:30\nBob,13:45\n", ["name", "start"], ["Ann", "12:30"], []),
    ("name;url\nA;http://x/?a=1,2,3\nB;http://y/?a=1,2,3\n", ["name", "url"], ["A", "http://x/?a=1,2,3"], []),
]


@pytest.mark.parametrize(("text", "names", "first", "titles"), TABLES)
def test_how_values_are_separated(text, names, first, titles):
    found_titles, found_names, rows = table_rows(text)
    assert (found_titles, found_names, next(iter(rows))) == (titles, names, first)


class TestRows:
    def test_each_is_a_document(self, tmp_path):
        path = write(tmp_path, "prices.csv", 'Price list\nname;note;price\nTea;"green; mild";1,50\nMilk;;007\n')
        first, second = find_documents([path])
        assert (first.id, first.title, first.text) == (
            "prices.csv/1",
            "Price list",
            "name: Tea\nnote: green; mild\nprice: 1,50",
        )
        assert (second.id, second.text) == ("prices.csv/2", "name: Milk\nprice: 007")
        assert [second.metadata[name] for name in ("path", "row", "num_rows")] == ["prices.csv", 2, 2]

    def test_a_title_is_the_row_s(self, tmp_path):
        path = write(tmp_path, "a.csv", "title,year\nDune,1965\n,1970\n")
        assert [(row.title, row.text) for row in find_documents([path])] == [
            ("Dune", "year: 1965"),
            ("a.csv", "year: 1970"),
        ]

    def test_uneven_rows(self, tmp_path):
        path = write(tmp_path, "a.csv", 'town;code;"as ""is""";code\nBonn;053;NA;1.10;more\nUlm\n;;;\n')
        assert texts(path) == ['town: Bonn\ncode: 053\nas "is": NA\ncode: 1.10\nmore', "town: Ulm"]
        assert texts(write(tmp_path, "b.csv", "only,names\n,\n")) == ["only\nnames"]
        assert texts(write(tmp_path, "c.tsv", "name\tage\nOak, old\t300\n")) == ["name: Oak, old\nage: 300"]
        assert texts(write(tmp_path, "d.csv", "\ufeffname,age\nÖrn,3\n".encode())) == ["name: Örn\nage: 3"]
        assert texts(write(tmp_path, "e.csv", "Ann,3\nBob,4\n")) == ["Ann\n3", "Bob\n4"]

    def test_json_as_it_is_written(self, tmp_path):
        lines = (
            '{"a": 1.10, "b": true, "c": null, "d": 1e3, "e": 12345678901234567890, "f": "", "g": [1.0, {"h": "ü"}]}\n'
            "\n"
            '{"x": "one\\u2028line", "x": "again"}\n[1.50, "two"]\n"text"\n'
        )
        assert texts(write(tmp_path, "a.jsonl", lines)) == [
            'a: 1.10\nb: true\nc: null\nd: 1e3\ne: 12345678901234567890\ng: [1.0, {"h": "ü"}]',
            "x: one\u2028line\nx: again",
            '[1.50, "two"]',
            "text",
        ]
        half = write(tmp_path, "b.jsonl", '{"t": "half \\ud83d, whole \\ud83d\\ude00"}\n')
        assert texts(half) == ["t: half \N{REPLACEMENT CHARACTER}, whole \N{GRINNING FACE}"]

    def test_parquet(self, tmp_path):
        import pyarrow as pa
        from pyarrow import parquet

        moment = datetime(2024, 5, 1, 12, 30, tzinfo=timezone.utc)
        row = {
            "name": "Oak",
            "price": Decimal("1.10"),
            "day": date(2024, 5, 1),
            "at": moment,
            "took": timedelta(minutes=90),
            "tags": ["a", "b"],
            "raw": b"\x00\xff",
            "word": b"plain",
            "ok": True,
            "inner": {"n": 1, "d": date(2024, 5, 1)},
            "none": None,
        }
        parquet.write_table(pa.Table.from_pylist([row, {"name": "Elm", "ok": False}]), tmp_path / "t.parquet")
        assert texts(tmp_path / "t.parquet") == [
            (
                "name: Oak\nprice: 1.10\nday: 2024-05-01\nat: 2024-05-01 12:30:00+00:00\ntook: 1:30:00\n"
                'tags: ["a", "b"]\nraw: 00ff\nword: plain\nok: true\ninner: {"n": 1, "d": "2024-05-01"}'
            ),
            "name: Elm\nok: false",
        ]

    def test_nan_is_a_missing_value(self, tmp_path):
        import pyarrow as pa
        from pyarrow import parquet

        nan = float("nan")
        frame = pa.table({"title": [nan, nan], "name": ["Oak", "Elm"], "price": [1.5, nan], "note": ["a", None]})
        parquet.write_table(frame, tmp_path / "rows.parquet")
        rows = list(find_documents([tmp_path / "rows.parquet"]))
        assert [row.text for row in rows] == ["name: Oak\nprice: 1.5\nnote: a", "name: Elm"]
        assert {row.title for row in rows} == {"rows.parquet"}
        lines = '{"title": NaN, "name": "Oak"}\n{"title": null, "name": "Elm"}\n{"title": 1984, "name": "Ash"}\n'
        rows = list(find_documents([write(tmp_path, "a.jsonl", lines)]))
        assert [(row.title, row.text) for row in rows] == [
            ("a.jsonl", "name: Oak"),
            ("a.jsonl", "name: Elm"),
            ("1984", "name: Ash"),
        ]

    @pytest.mark.parametrize("kind", ["parquet", "corpus.jsonl", "polars"])
    def test_missing_values_of_a_corpus(self, tmp_path, kind):
        """As pandas writes them, with the whole numbers of a column with missing ones as floats."""
        nan = float("nan")
        columns = {
            "_id": ["a", "b"],
            "text": ["an oak", "an elm"],
            "title": ["Oak", None if kind == "parquet" else nan],
            "document_id": ["d", None if kind == "parquet" else nan],
            "position": [2.0, nan],
            "year": [2020.0, nan],
        }
        if kind == "parquet":
            pandas = pytest.importorskip("pandas")
            path = tmp_path / "a.parquet"
            pandas.DataFrame(columns).to_parquet(path)
        elif kind == "polars":
            polars = pytest.importorskip("polars")
            path = tmp_path / "a.parquet"
            polars.DataFrame({**columns, "title": [nan, nan], "document_id": [nan, nan]}).write_parquet(path)
        else:
            path = tmp_path / kind
            rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        first, second = open_corpus([path]).passages
        named = ("", "") if kind == "polars" else ("Oak", "d")
        assert (first.text, first.title, first.document_id, first.position) == ("an oak", *named, 2)
        assert (second.text, second.title, second.document_id, second.position) == ("an elm", "", "", 0)
        schema = MetadataSchema.infer([first, second], MetadataSchema({"year": "integer"}))
        assert [schema.values(each)["year"] for each in (first, second)] == [2020, None]

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("a.jsonl", '{"a": 1}\n{"b": \n', "line 2: it cannot be parsed"),
            ("a.jsonl", "[" * 100_000, "line 1: it cannot be parsed"),
            ("a.csv", "\n\n,,\n", "it has no text"),
            (
                "a.jsonl",
                '{"_id": "1", "text": "x"}\n{"_id": "1", "text": "y"}\n',
                "line 2: the id '1' is that of line 1",
            ),
            ("a.jsonl", '{"_id": "1", "text": "x"}\n{"_id": "2"}\n', "line 2: field 'text' is missing"),
            ("a.parquet", "PAR1", "it cannot be parsed"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, tmp_path, name, content, reason):
        found = find_documents([write(tmp_path, name, content), write(tmp_path, "b.txt", "fine")])
        assert [document.id for document in found] == ["b.txt"]
        assert found.skipped[0].reason.startswith(reason)


class TestCorpora:
    """Rows with an id and a text keep both, whatever the format and wherever they are read."""

    CSV = "id;title;text;year\nq1;Dune;A desert.;1965\nq2;;Two.;1970\n"

    @pytest.mark.parametrize(
        ("name", "content", "advice"),
        [
            ("a.jsonl", '{"_id": "a", "txt": "a cat"}', "no 'text'; if it is one of passages, rename 'txt' to 'text'"),
            ("a.jsonl", '{"id": "a", "Text": "a cat"}', "rename 'Text' to 'text'"),
            ("a.jsonl", '{"docid": "a", "text": "a cat"}', "no 'id'; if it is one of passages, rename 'docid' to 'id'"),
            ("a.csv", "ID,content\n1,a cat\n", "rename 'ID' to 'id' and 'content' to 'text'"),
            ("a.csv", "id,price\n1,3\n", None),
            ("a.csv", "name,text\nx,a cat\n", None),
            ("a.csv", "id,text\n1,a cat\n", None),
        ],
    )
    def test_a_misnamed_id_or_text_is_named(self, tmp_path, caplog, name, content, advice):
        (tmp_path / name).write_text(content)
        assert len([*find_documents([tmp_path])]) == 1
        assert [advice in message for message in caplog.messages] == ([] if advice is None else [True])

    def test_in_a_folder(self, tmp_path):
        first, second = find_documents([write(tmp_path, "a.csv", self.CSV)])
        assert (first.id, first.title, first.text, first.metadata["year"]) == ("q1", "Dune", "A desert.", "1965")
        assert (second.id, second.title, second.metadata["path"]) == ("q2", "", "a.csv")

    def test_json_lines_alone_and_in_a_folder(self, tmp_path):
        line = '{"_id": "x", "title": "T", "text": "one", "year": 1965, "score": 1.10, "metadata": {"ok": true}}\n'
        path = write(tmp_path, "a.jsonl", line)
        (alone,) = open_corpus([path]).passages
        (found,) = find_documents([path])
        assert (alone.id, alone.title, alone.text) == (found.id, found.title, found.text) == ("x", "T", "one")
        assert dict(alone.metadata) == {"year": 1965, "score": 1.1, "ok": True}
        assert {name: found.metadata[name] for name in alone.metadata} == alone.metadata

    def test_other_json_lines_are_a_table_alone_too(self, tmp_path):
        path = write(tmp_path, "a.jsonl", '{"question": "q", "answer": "a"}\n')
        assert [passage.id for passage in open_corpus([path]).passages] == ["a.jsonl/1"]

    def test_two_with_the_same_id(self, tmp_path):
        write(tmp_path, "a.csv", self.CSV)
        write(tmp_path, "b.csv", self.CSV)
        found = find_documents([tmp_path])
        assert [document.id for document in found] == ["q1", "q2"]
        assert [(each.id, each.reason) for each in found.skipped] == [
            ("b.csv", "its id 'q1' is one of a.csv, too; give its rows other ids, or leave the file out")
        ]


def test_300_000_columns_cost_little(tmp_path):
    """Each row is as long as what is written in it, not as the header."""
    names = ",".join(f"c{number}" for number in range(300_000))
    path = write(tmp_path, "a.csv", names + "\n" + "1,2\n" * 2_000)
    begin = time.process_time()
    assert texts(path) == ["c0: 1\nc1: 2"] * 2_000
    assert time.process_time() - begin < 5


def test_a_table_that_takes_too_long_is_skipped(tmp_path):
    path = write(tmp_path, "a.csv", "a,b\n" + "x,y\n" * 2_000_000)
    begin = time.monotonic()
    found = find_documents([path, write(tmp_path, "b.txt", "fine")], seconds_per_file=0.5)
    assert [document.id for document in found] == ["b.txt"]
    assert found.skipped[0].reason == "it takes more than 0.5 s to read"
    assert time.monotonic() - begin < 30

"""Counting, merging and exporting label stores, in Python and on the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.data.label_sets import LabelSet, MergedLabels, count_labels, export_labels, merge_labels
from d2llm.data.labels import LabelKey, LabelStore, QueryLabels, label_keys
from e2e.command_line import fail, succeed

GRAM = np.array([[1.0, 0.25], [0.25, 1.0]], dtype=np.float32)
KEYS = [LabelKey("T1", "P1", "D"), LabelKey("T1", "P1", "E"), LabelKey("T2", "P1", "D")]


def write(folder: Path, values: dict[str, dict[str, float]], key: LabelKey = KEYS[0], gram: bool = False) -> Path:
    """Add one shard: log-odds by query and passage, with a Gram matrix of the first two passages of each query."""
    labels = [
        QueryLabels(query, tuple(of), np.array(list(of.values()), np.float32), GRAM if gram else None)
        for query, of in values.items()
    ]
    LabelStore(folder, teacher=key.teacher, prompt=key.prompt, dataset=key.dataset).write(labels)
    return folder


def read(folder: Path, key: LabelKey = KEYS[0]) -> dict[str, dict[str, float]]:
    store = LabelStore(folder, teacher=key.teacher, prompt=key.prompt, dataset=key.dataset)
    return {query: store.log_odds(query) for query in store.query_ids}


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Path, Path]:
    """Two stores that share a set; the pair (q1, p2) is in both, the second has one more set."""
    first = write(tmp_path / "first", {"q1": {"p1": 1.0, "p2": -2.0}, "q2": {"p1": 3.0}}, gram=False)
    second = write(tmp_path / "second", {"q1": {"p2": -1.5, "p3": 0.5}, "q3": {"p9": 4.0, "p8": 1.0}}, gram=True)
    write(second, {"q1": {"p1": -7.0}}, KEYS[1])
    return first, second


def test_counts_of_each_set(stores: tuple[Path, Path]):
    first, second = stores
    write(first, {"q2": {"p1": -1.0, "p2": 0.0}})
    counts = count_labels(first)
    assert counts.num_shards == 2
    assert counts.num_bytes == sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    (one,) = counts.sets
    values = [1.0, -2.0, -1.0, 0.0]
    assert one == LabelSet("T1", "P1", "D", 2, 4, 1, 0, 0.25, float(np.mean(values)), float(np.std(values)))
    assert [(each.dataset, each.num_queries, each.num_grams) for each in count_labels(second).sets] == [
        ("D", 2, 2),
        ("E", 1, 0),
    ]


def test_a_merged_store_has_each_pair_once_and_the_last_label_of_it(stores: tuple[Path, Path], tmp_path: Path):
    report = merge_labels(stores, tmp_path / "all")
    assert report == MergedLabels(str(tmp_path / "all"), 2, 4, 7, 1, 0.5)
    assert read(tmp_path / "all") == {
        "q1": {"p2": -1.5, "p3": 0.5, "p1": 1.0},
        "q2": {"p1": 3.0},
        "q3": {"p9": 4.0, "p8": 1.0},
    }
    assert read(tmp_path / "all", KEYS[1]) == {"q1": {"p1": -7.0}}
    merged = LabelStore(tmp_path / "all", teacher="T1", prompt="P1", dataset="D")
    assert merged.num_duplicates == 0
    gram = merged.gram("q1")
    assert gram is not None
    assert gram[0] == ("p2", "p3")
    np.testing.assert_array_equal(gram[1], GRAM)
    assert merged.gram("q2") is None
    assert read(stores[0])["q1"]["p2"] == -2.0  # the old stores are unchanged


def test_the_order_of_the_stores_decides(stores: tuple[Path, Path], tmp_path: Path):
    merge_labels(stores[::-1], tmp_path / "all")
    assert read(tmp_path / "all")["q1"]["p2"] == -2.0


def test_merging_one_store_removes_what_was_labelled_again(stores: tuple[Path, Path], tmp_path: Path):
    for value in range(5):
        write(stores[0], {"q1": {"p1": float(value)}})
    assert count_labels(stores[0]).sets[0].num_repeated == 5
    report = merge_labels([stores[0]], tmp_path / "one")
    assert report.num_repeated == 5
    assert read(tmp_path / "one")["q1"] == {"p1": 4.0, "p2": -2.0}
    assert count_labels(tmp_path / "one").num_shards == 1


def test_labels_are_merged_block_by_block(stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("d2llm.data.label_sets._SHARD_QUERIES", 2)
    merge_labels(stores, tmp_path / "blocks")
    assert len(list((tmp_path / "blocks" / "labels").iterdir())) == 3  # two of D, one of E
    monkeypatch.undo()
    merge_labels(stores, tmp_path / "whole")
    for key in KEYS[:2]:
        assert read(tmp_path / "blocks", key) == read(tmp_path / "whole", key)


def test_what_exists_is_not_overwritten(stores: tuple[Path, Path]):
    before = read(stores[1])
    with pytest.raises(InputError, match="already exists; give a new folder"):
        merge_labels(stores, stores[1])
    assert read(stores[1]) == before
    with pytest.raises(InputError, match="no label stores were given"):
        merge_labels([], stores[0].parent / "none")


def test_a_damaged_store_leaves_no_half_of_a_merged_one(stores: tuple[Path, Path], tmp_path: Path):
    shard = max((stores[1] / "grams").iterdir())
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataFormatError, match="damaged label shard"):
        merge_labels(stores, tmp_path / "all")
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_a_folder_without_labels_is_refused(tmp_path: Path, folder: str):
    (tmp_path / "empty").mkdir()
    problem = r"holds no teacher labels|is not a d2llm labels folder"
    for work in (count_labels, label_keys):
        with pytest.raises(DataFormatError, match=problem):
            work(tmp_path / folder)
    with pytest.raises(DataFormatError, match=problem):
        merge_labels([tmp_path / folder], tmp_path / "out")


def test_exported_tables_have_a_row_for_each_pair(stores: tuple[Path, Path], tmp_path: Path):
    rows = [
        ("T1", "P1", "D", "q1", "p2", -1.5),
        ("T1", "P1", "D", "q1", "p3", 0.5),
        ("T1", "P1", "D", "q3", "p9", 4.0),
        ("T1", "P1", "D", "q3", "p8", 1.0),
        ("T1", "P1", "E", "q1", "p1", -7.0),
    ]
    names = ["teacher", "prompt", "dataset", "query_id", "passage_id", "log_odds", "grade"]
    records = [dict(zip(names, (*row, None), strict=True)) for row in rows]
    for ending in ("parquet", "jsonl", "csv"):
        assert export_labels(stores[1], tmp_path / f"out.{ending}") == 5
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == records
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    with (tmp_path / "out.csv").open(newline="") as file:
        header, *values = csv.reader(file)
    assert header == names
    assert [(*row[:5], float(row[5])) for row in values] == rows
    assert {row[6] for row in values} == {""}


def test_grades_survive_a_merge_and_an_export(tmp_path: Path):
    graded = QueryLabels(
        "q1", ("p1", "p2"), np.array([2.0, 0.0], np.float32), grades=np.array([94, np.nan], np.float32)
    )
    LabelStore(tmp_path / "one", teacher="T", prompt="P", dataset="D").write([graded])
    write(tmp_path / "two", {"q2": {"p1": 1.0}})
    merge_labels([tmp_path / "one", tmp_path / "two"], tmp_path / "all")
    export_labels(tmp_path / "all", tmp_path / "all.parquet")
    table = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert {(row["query_id"], row["passage_id"]): row["grade"] for row in table} == {
        ("q1", "p1"): 94.0,
        ("q1", "p2"): None,
        ("q2", "p1"): None,
    }


def test_sets_are_chosen_for_an_export(stores: tuple[Path, Path], tmp_path: Path):
    assert export_labels(stores[1], tmp_path / "e.jsonl", dataset="E") == 1
    assert export_labels(stores[1], tmp_path / "d.jsonl", teacher="T", prompt="P1", dataset="D") == 4
    with pytest.raises(InputError, match=r"no such labels; it has those of teacher T1, prompt P1, data set D; teacher"):
        export_labels(stores[1], tmp_path / "x.jsonl", teacher="T2")
    with pytest.raises(InputError, match=r"written as \.parquet, \.jsonl, \.csv"):
        export_labels(stores[1], tmp_path / "x.xlsx")
    assert not list(tmp_path.glob("x.*"))


def test_an_id_of_any_text_survives_an_export(tmp_path: Path):
    odd = 'a "quoted", id\nof two lines é'
    write(tmp_path / "labels", {odd: {odd: 1.0}})
    for ending in ("parquet", "jsonl", "csv"):
        export_labels(tmp_path / "labels", tmp_path / f"out.{ending}")
    assert pq.read_table(tmp_path / "out.parquet")["query_id"].to_pylist() == [odd]
    assert json.loads((tmp_path / "out.jsonl").read_text())["passage_id"] == odd
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(csv.reader(file))[1][3:5] == [odd, odd]


class TestOnTheCommandLine:
    """``d2llm labels``."""

    def test_stats_shows_every_set(self, stores: tuple[Path, Path], tmp_path: Path):
        result = succeed("labels", "stats", stores[1], "--json", tmp_path / "report.json")
        report = json.loads((tmp_path / "report.json").read_text())
        assert [each["dataset"] for each in report["result"]["sets"]] == ["D", "E"]
        for word in ("T1", "P1", "queries", "2 shards"):
            assert word in result.stdout

    def test_merge_and_export(self, stores: tuple[Path, Path], tmp_path: Path):
        result = succeed("labels", "merge", *stores, "--out", tmp_path / "all", "--json", tmp_path / "report.json")
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["result"]["num_pairs"] == 7
        assert "7 pairs of 4 queries; 1 was labelled more than once, with log-odds that differ by 0.5" in result.stderr
        result = succeed("labels", "export", tmp_path / "all", "--out", tmp_path / "all.csv", "--dataset", "E")
        assert "1 pair in" in result.stderr
        assert len((tmp_path / "all.csv").read_text().splitlines()) == 2

    def test_bad_input(self, stores: tuple[Path, Path], tmp_path: Path):
        fail("labels", "stats", tmp_path / "none", containing=["none"])
        fail("labels", "merge", *stores, "--out", stores[0], containing=["already exists"])
        fail("labels", "export", stores[0], "--out", tmp_path / "labels.txt", containing=[".parquet, .jsonl, .csv"])

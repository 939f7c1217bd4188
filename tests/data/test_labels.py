"""The label store: identity, resume, mismatch, damage, and being killed while writing."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2llm.core.errors import DataFormatError, LabelMismatchError, ModelError
from d2llm.data.labels import LabelStore, QueryLabels

GRAM = np.array([[1.0, 0.25], [0.25, 1.0]], dtype=np.float32)


def labels(query_id: str, values: dict[str, float], gram: np.ndarray | None = None) -> QueryLabels:
    return QueryLabels(query_id, tuple(values), np.array(list(values.values()), dtype=np.float32), gram)


def open_store(folder: Path, teacher: str = "T1", prompt: str = "P1", dataset: str = "D") -> LabelStore:
    return LabelStore(folder, teacher=teacher, prompt=prompt, dataset=dataset)


def test_written_labels_are_seen_at_once_and_after_reopening(tmp_path: Path) -> None:
    store = open_store(tmp_path / "labels")
    store.write([labels("q1", {"p1": 2.5, "p2": -1.0, "p3": 0.125}, GRAM), labels("q2", {"p1": -7.0})])
    for opened in (store, open_store(tmp_path / "labels")):
        assert len(opened) == 2
        assert opened.num_pairs == 4
        assert opened.query_ids == ("q1", "q2")
        assert opened.log_odds("q1") == {"p1": 2.5, "p2": -1.0, "p3": 0.125}
        assert opened.log_odds("q2") == {"p1": -7.0}
        assert opened.log_odds("q3") == {}
        stored = opened.gram("q1")
        assert stored is not None
        assert stored[0] == ("p1", "p2")
        np.testing.assert_array_equal(stored[1], GRAM)
        assert stored[1].dtype == np.float32
        assert opened.gram("q2") is None
        assert opened.num_duplicates == 0


def test_shards_have_the_documented_columns(tmp_path: Path) -> None:
    open_store(tmp_path).write([labels("q1", {"p1": 2.5, "p2": 1.5}, GRAM)])
    [label_file] = (tmp_path / "labels").iterdir()
    [gram_file] = (tmp_path / "grams").iterdir()
    assert label_file.name == gram_file.name
    assert pq.read_table(label_file).to_pylist() == [
        {
            "teacher": "T1",
            "prompt": "P1",
            "dataset": "D",
            "query_id": "q1",
            "passage_id": "p1",
            "log_odds": 2.5,
            "grade": None,
        },
        {
            "teacher": "T1",
            "prompt": "P1",
            "dataset": "D",
            "query_id": "q1",
            "passage_id": "p2",
            "log_odds": 1.5,
            "grade": None,
        },
    ]
    assert pq.read_table(gram_file).to_pylist() == [
        {
            "teacher": "T1",
            "prompt": "P1",
            "dataset": "D",
            "query_id": "q1",
            "passage_ids": ["p1", "p2"],
            "gram": [1.0, 0.25, 0.25, 1.0],
        }
    ]
    assert pq.ParquetFile(label_file).metadata.row_group(0).column(0).compression == "ZSTD"


def test_grades_are_kept_beside_log_odds(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    graded = QueryLabels(
        "q1", ("p1", "p2"), np.array([2.0, 0.0], np.float32), grades=np.array([94, np.nan], np.float32)
    )
    store.write([graded, labels("q2", {"p1": 1.0})])
    for each in (store, open_store(tmp_path)):
        assert each.grades("q1") == {"p1": 94.0}
        assert each.log_odds("q1") == {"p1": 2.0, "p2": 0.0}
        assert each.grades("q2") == {}
    [label_file] = (tmp_path / "labels").iterdir()
    assert pq.read_table(label_file)["grade"].to_pylist() == [94.0, None, None]


def test_missing_lists_only_the_new_pairs(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write([labels("q1", {"p1": 1.0, "p2": 2.0})])
    assert store.missing("q1", ["p2", "p9", "p1", "p8", "p9"]) == ["p9", "p8"]
    assert store.missing("q1", ("p1", "p2")) == []
    assert store.missing("q2", ["p1"]) == ["p1"]
    store.write([labels("q1", {"p9": 3.0})])
    assert open_store(tmp_path).log_odds("q1") == {"p1": 1.0, "p2": 2.0, "p9": 3.0}


def test_label_written_last_wins_and_is_counted(tmp_path: Path) -> None:
    for value in range(12):  # more than ten shards: names must sort by number
        open_store(tmp_path).write([labels("q1", {"p1": float(value)}, np.full((1, 1), value, np.float32))])
    store = open_store(tmp_path)
    assert store.log_odds("q1") == {"p1": 11.0}
    assert store.num_duplicates == 11
    stored = store.gram("q1")
    assert stored is not None
    assert stored[1].tolist() == [[11.0]]


def test_labels_without_gram_leave_the_gram_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write([labels("q1", {"p1": 1.0, "p2": 2.0}, GRAM)])
    store.write([labels("q1", {"p3": 1.0})])
    stored = open_store(tmp_path).gram("q1")
    assert stored is not None
    assert stored[0] == ("p1", "p2")


def test_labels_of_several_teachers_and_prompts_coexist(tmp_path: Path) -> None:
    keys = [("T1", "P1", "D"), ("T1", "P2", "D"), ("T2", "P1", "D"), ("T1", "P1", "E")]
    for value, (teacher, prompt, dataset) in enumerate(keys):
        open_store(tmp_path, teacher, prompt, dataset).write(
            [labels("q1", {"p1": float(value)}, np.full((1, 1), value, "f4"))]
        )
    for value, (teacher, prompt, dataset) in enumerate(keys):
        store = LabelStore.open_for_reading(tmp_path, teacher=teacher, prompt=prompt, dataset=dataset)
        assert store.log_odds("q1") == {"p1": float(value)}
        stored = store.gram("q1")
        assert stored is not None
        assert stored[1].tolist() == [[float(value)]]
        assert store.num_duplicates == 0


def test_reading_labels_of_another_teacher_names_both(tmp_path: Path) -> None:
    open_store(tmp_path, "T2", "P1").write([labels("q1", {"p1": 1.0})])
    open_store(tmp_path, "T1", "P7").write([labels("q1", {"p1": 1.0})])
    with pytest.raises(LabelMismatchError) as caught:
        LabelStore.open_for_reading(tmp_path, teacher="T1", prompt="P1", dataset="D")
    message = str(caught.value)
    assert "has no labels of teacher T1, prompt P1, data set D" in message
    assert "only of teacher T1, prompt P7, data set D; teacher T2, prompt P1, data set D" in message
    assert len(open_store(tmp_path)) == 0  # opened for writing, the store is just empty


def test_a_data_set_may_lack_labels_if_its_teacher_judged_others(tmp_path: Path) -> None:
    key = {"teacher": "T1", "prompt": "P1", "dataset": "D"}
    open_store(tmp_path, "T1", "P2", "E").write([labels("q1", {"p1": 1.0})])
    with pytest.raises(LabelMismatchError):
        LabelStore.open_for_reading(tmp_path, **key)
    assert len(LabelStore.open_for_reading(tmp_path, **key, other_sets_suffice=True)) == 0
    with pytest.raises(LabelMismatchError):
        LabelStore.open_for_reading(tmp_path, **(key | {"teacher": "T2"}), other_sets_suffice=True)
    open_store(tmp_path, "T1", "P7", "D").write([labels("q1", {"p1": 1.0})])
    with pytest.raises(LabelMismatchError, match="prompt P7, data set D"):  # labelled, but with another prompt
        LabelStore.open_for_reading(tmp_path, **key, other_sets_suffice=True)


def test_reading_a_folder_without_labels_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match="holds no teacher labels; make them first"):
        LabelStore.open_for_reading(tmp_path / "nothing", teacher="T1", prompt="P1", dataset="D")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_labels_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    store = open_store(tmp_path)
    with pytest.raises(ModelError, match="log-odds of query 'q2' and passage 'p7'"):
        store.write([labels("q1", {"p1": 1.0}), labels("q2", {"p6": 0.0, "p7": value})])
    with pytest.raises(ModelError, match="features for query 'q3'"):
        store.write([labels("q3", {"p1": 1.0}, np.full((1, 1), value, np.float32))])
    assert len(store) == 0
    assert list(tmp_path.rglob("*.parquet")) == []


@pytest.mark.parametrize(
    ("passage_ids", "num_log_odds", "gram_shape"),
    [(("p1", "p1"), 2, None), (("p1", "p2"), 3, None), (("p1",), 1, (2, 2)), (("p1", "p2"), 2, (1, 2))],
)
def test_labels_of_inconsistent_shapes_are_rejected(
    passage_ids: tuple[str, ...], num_log_odds: int, gram_shape: tuple[int, int] | None
):
    gram = None if gram_shape is None else np.zeros(gram_shape, np.float32)
    with pytest.raises(ValueError, match="query 'q1'"):
        QueryLabels("q1", passage_ids, np.zeros(num_log_odds, np.float32), gram)


def test_empty_write_makes_no_shard(tmp_path: Path) -> None:
    open_store(tmp_path).write([])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["labels", "grams"])
@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped"])
def test_damaged_shard_is_named_and_deleting_it_repairs(tmp_path: Path, kind: str, damage: str) -> None:
    store = open_store(tmp_path)
    store.write([labels("q1", {"p1": 1.0, "p2": 2.0}, GRAM)])
    store.write([labels("q2", {f"p{number}": float(number) for number in range(300)}, GRAM)])
    path = max((tmp_path / kind).iterdir())
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        # Inside the pages of the last column, past its page header, where the checksum or zstd notices it.
        column = pq.ParquetFile(path).metadata.row_group(0).column(4)
        content[column.data_page_offset + column.total_compressed_size // 2] ^= 0x10
    else:
        content = content[: len(content) // 2 if damage == "cut" else 0]
    path.write_bytes(content)
    with pytest.raises(DataFormatError, match="delete this file: its labels are then made again") as caught:
        open_store(tmp_path)
    assert caught.value.path == path
    path.unlink()
    healed = open_store(tmp_path)
    assert healed.query_ids == ("q1",)
    assert healed.missing("q2", ["p1", "p2"]) == ["p1", "p2"]


def test_parquet_file_with_other_columns_is_rejected(tmp_path: Path) -> None:
    open_store(tmp_path).write([labels("q1", {"p1": 1.0}, GRAM[:1, :1])])
    [label_file] = (tmp_path / "labels").iterdir()
    [gram_file] = (tmp_path / "grams").iterdir()
    shutil.copy(gram_file, label_file)
    with pytest.raises(DataFormatError, match=r"has the columns .*'gram'"):
        open_store(tmp_path)


@pytest.mark.parametrize("kind", ["labels", "grams"])
def test_a_shard_without_values_is_damaged(tmp_path: Path, kind: str) -> None:
    """What Parquet can hold and d2llm never writes: it would be a traceback later."""
    open_store(tmp_path).write([labels("q1", {"p1": 1.0}, GRAM[:1, :1])])
    [path] = (tmp_path / kind).iterdir()
    table = pq.read_table(path)
    [row] = table.to_pylist()
    for column in set(row) - {"grade"}:
        values = [[None], None] if isinstance(row[column], list) else [None]
        for value in values:
            pq.write_table(pa.Table.from_pylist([row | {column: value}], schema=table.schema), path)
            with pytest.raises(DataFormatError, match=f"lacks values of {column}"):
                open_store(tmp_path)


def test_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "index", "format_version": 1}')
    with pytest.raises(DataFormatError, match="describes a 'index', but a 'labels' is needed"):
        open_store(tmp_path)


def test_order_of_the_plan_does_not_change_the_labels(tmp_path: Path) -> None:
    rng = random.Random(5)
    plan = [
        labels(f"q{q}", {f"p{p}": q * 10.0 + p for p in range(q % 4 + 1)}, np.eye(1, dtype="f4")) for q in range(20)
    ]
    for name in ("as-given", "shuffled"):
        store = open_store(tmp_path / name)
        while remaining := [item for item in plan if store.missing(item.query_id, item.passage_ids)]:
            store.write(remaining[: rng.randint(1, 5)])
        rng.shuffle(plan)
    first, second = open_store(tmp_path / "as-given"), open_store(tmp_path / "shuffled")
    assert first.query_ids == second.query_ids == tuple(sorted(item.query_id for item in plan))
    assert [first.log_odds(query_id) for query_id in first.query_ids] == [
        second.log_odds(query_id) for query_id in second.query_ids
    ]
    assert first.num_duplicates == second.num_duplicates == 0


def test_shard_with_a_missing_file_counts_as_absent(tmp_path: Path) -> None:
    open_store(tmp_path).write([labels("q1", {"p1": 1.0}, GRAM[:1, :1])])
    open_store(tmp_path).write([labels("q2", {"p1": 1.0})])
    first, _ = sorted((tmp_path / "labels").iterdir())
    first.unlink()
    store = open_store(tmp_path)
    assert store.query_ids == ("q2",)
    assert store.gram("q1") is None
    store.write([labels("q1", {"p1": 4.0})])
    assert open_store(tmp_path).log_odds("q1") == {"p1": 4.0}


WRITER = """
import sys
from pathlib import Path
import numpy as np
from d2llm.data.labels import LabelStore, QueryLabels

store = LabelStore(Path(sys.argv[1]), teacher="T1", prompt="P1", dataset="D")
number = len(store)
sys.stdout.write(f"{number}\\n"); sys.stdout.flush()
while True:
    batch = []
    for query in range(number, number + 3):
        values = np.arange(40, dtype=np.float32) + query
        batch.append(QueryLabels(f"q{query}", tuple(f"p{p}" for p in range(40)), values, np.full((9, 9), query, "f4")))
    store.write(batch)
    number += 3
    sys.stdout.write(f"{number}\\n"); sys.stdout.flush()
"""


def test_killed_writer_leaves_whole_queries(tmp_path: Path) -> None:
    """After SIGKILL at random moments, all reported labels are there, and every stored query is complete."""
    rng = random.Random(11)
    for attempt in range(60):
        if attempt >= 6 and len(open_store(tmp_path)):
            break
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
        )
        assert writer.stdout is not None
        opened_with = int(writer.stdout.readline())  # the store is open and the writer begins to write
        time.sleep(rng.uniform(0.0, 0.15 * max(1, attempt - 5)))  # longer on a machine too busy to write by then
        writer.send_signal(signal.SIGKILL)
        reported = max((int(line) for line in writer.stdout.read().split()), default=opened_with)
        assert writer.wait() == -signal.SIGKILL
        store = open_store(tmp_path)
        assert reported <= len(store) <= reported + 3
        assert len(store) % 3 == 0
        assert store.query_ids == tuple(sorted(f"q{number}" for number in range(len(store))))
        assert store.num_duplicates == 0
        for number in range(len(store)):
            assert store.log_odds(f"q{number}") == {f"p{p}": float(p + number) for p in range(40)}
            stored = store.gram(f"q{number}")
            assert stored is not None
            assert stored[0] == tuple(f"p{p}" for p in range(9))
            assert stored[1].shape == (9, 9)
            assert (stored[1] == number).all()
    assert len(store) > 0


@pytest.mark.parametrize("stop_after", [0, 1])
def test_stopping_between_the_two_files_of_a_shard(tmp_path, monkeypatch, stop_after: int):
    """A moment that kills rarely hit: none of the shard's files, or only the first, has been renamed."""
    import d2llm.data.labels as module

    store = open_store(tmp_path)
    store.write([labels("q1", {"p1": 1.0}, GRAM[:1, :1])])
    written: list[Path] = []
    original = module.write_bytes

    def failing(path: Path, content: bytes) -> None:
        if len(written) >= stop_after:
            raise KeyboardInterrupt
        written.append(path)
        original(path, content)

    monkeypatch.setattr(module, "write_bytes", failing)
    with pytest.raises(KeyboardInterrupt):
        store.write([labels("q2", {"p1": 2.0}, GRAM[:1, :1])])
    monkeypatch.undo()
    for opened in (store, open_store(tmp_path)):
        assert opened.query_ids == ("q1",)
        assert opened.gram("q2") is None
    open_store(tmp_path).write([labels("q2", {"p1": 3.0})])
    assert open_store(tmp_path).log_odds("q2") == {"p1": 3.0}


def test_missing_cosines_are_those_outside_the_latest_gram(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write([labels("q1", {"p1": 2.5, "p2": -1.0, "p3": 0.125}, GRAM), labels("q2", {"p1": -7.0})])
    assert store.missing_cosines("q1", ["p3", "p2", "p3", "p1"]) == ["p3"]
    assert store.missing_cosines("q2", ["p1"]) == ["p1"]
    assert store.missing_cosines("q3", []) == []
    store.write([labels("q1", {"p3": 2.0, "p1": 2.5}, GRAM)])
    assert store.missing_cosines("q1", ["p1", "p2", "p3"]) == ["p2"]

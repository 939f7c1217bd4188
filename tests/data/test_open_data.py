"""open_data reads every layout: BEIR, Parquet, pairs, and what the datasets library loads."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError, MissingExtraError
from d2llm.core.types import Passage
from d2llm.data import lines
from d2llm.data.beir import Dataset, read_beir
from d2llm.data.open_data import open_data
from d2llm.data.pairs import PairDataset, read_pairs
from e2e.command_line import write_data, write_lines

PAIRS = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "label": [1, 0, 1]}
CORPUS = {"_id": ["p1", "p2"], "title": ["Cats", None], "text": ["Cats sleep.", "Dogs bark."]}
QUERIES = {"_id": ["q1", "q2"], "text": ["Who sleeps?", "Who barks?"]}
JUDGED = {"query-id": ["q1", "q2"], "corpus-id": ["p1", "p2"], "score": [2, 0]}


def write_table(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_retrieval(folder, **overrides):
    for name, columns in {"corpus": CORPUS, "queries": QUERIES, "qrels/test": JUDGED, **overrides}.items():
        write_table(folder / f"{name}.parquet", columns)
    return folder


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The datasets library, with its cache in the test's own folder."""
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


class TestFolders:
    def test_beir(self, tmp_path):
        folder = write_data(tmp_path / "data")
        assert open_data(folder) == read_beir(folder)
        assert list(open_data(str(folder), splits=["dev"]).qrels) == ["dev"]

    def test_a_beir_folder_without_corpus_is_not_taken_for_pairs(self, tmp_path):
        folder = write_data(tmp_path / "data")
        (folder / "corpus.jsonl").unlink()
        with pytest.raises(DataFormatError, match=r"looked for corpus\.jsonl or corpus\.jsonl\.gz"):
            open_data(folder)

    def test_pairs(self, tmp_path):
        write_lines(tmp_path / "train.jsonl", [{"query": "a", "document": "b", "label": 1}])
        assert open_data(tmp_path) == read_pairs(tmp_path)
        assert open_data(tmp_path / "train.jsonl").splits["train"] == open_data(tmp_path).splits["train"]

    def test_missing_folder_is_rejected(self, tmp_path):
        with pytest.raises(DataFormatError, match="no such file or folder; give a folder in BEIR layout"):
            open_data(tmp_path / "lost")


class TestParquet:
    def test_pairs_of_several_files(self, tmp_path):
        write_table(tmp_path / "train-00000-of-00002.parquet", PAIRS)
        write_table(tmp_path / "train-00001-of-00002.parquet", {**PAIRS, "sentence1": ["x", "y", "z"]})
        write_table(tmp_path / "validation.parquet", PAIRS)
        pairs = open_data(tmp_path)
        assert isinstance(pairs, PairDataset)
        assert [pair.query for pair in pairs.splits["train"]] == ["a", "b", "c", "x", "y", "z"]
        assert [pair.id for pair in pairs.splits["train"]][-1] == "train-6"
        assert pairs.positives("dev") == [True, False, True]

    def test_scores(self, tmp_path):
        write_table(tmp_path / "test.parquet", {"query": ["a"], "passage": ["b"], "score": [2.5]})
        assert open_data(tmp_path / "test.parquet").splits["test"][0].score == 2.5

    def test_more_rows_than_one_batch_are_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(lines, "_BATCH_ROWS", 2)
        write_table(tmp_path / "train.parquet", PAIRS)
        assert [pair.passage for pair in open_data(tmp_path).splits["train"]] == ["d", "e", "f"]

    def test_a_bad_row_is_reported_with_its_number(self, tmp_path):
        path = write_table(tmp_path / "train.parquet", {**PAIRS, "sentence2": ["d", None, "f"]})
        with pytest.raises(DataFormatError, match="field 'sentence2' must be a string, found null") as caught:
            open_data(tmp_path)
        assert (caught.value.path, caught.value.line) == (path, 2)

    def test_invalid_parquet_is_rejected(self, tmp_path):
        (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else")
        with pytest.raises(DataFormatError, match=r"train\.parquet: cannot be read as Parquet"):
            open_data(tmp_path)

    def test_retrieval(self, tmp_path):
        dataset = open_data(write_retrieval(tmp_path / "pets"))
        assert isinstance(dataset, Dataset)
        assert dataset.name == "pets"
        assert list(dataset.passages.values()) == [Passage("p1", "Cats sleep.", "Cats"), Passage("p2", "Dogs bark.")]
        assert dataset.queries["q2"].text == "Who barks?"
        assert dataset.qrels == {"test": {"q1": {"p1": 2}, "q2": {"p2": 0}}}

    def test_ids_may_be_numbers_and_qrels_a_tsv(self, tmp_path):
        numbered = {"id": [1, 2], "text": ["a", "b"]}
        folder = write_retrieval(tmp_path, corpus=numbered, **{"qrels/train": {**JUDGED, "corpus-id": [1, 2]}})
        (folder / "qrels" / "test.parquet").unlink()
        (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\t2\t1\n")
        dataset = open_data(folder)
        assert dataset.qrels == {"train": {"q1": {"1": 2}, "q2": {"2": 0}}, "dev": {"q1": {"2": 1}}}
        assert dataset.positives("train") == {"q1": ("1",), "q2": ()}
        assert list(open_data(folder, splits=["dev"]).qrels) == ["dev"]

    @pytest.mark.parametrize(
        ("overrides", "error", "problem"),
        [
            ({"corpus": {**CORPUS, "_id": ["p1", "p1"]}}, DuplicateIdError, "id 'p1' was already used"),
            ({"corpus": {**CORPUS, "text": ["x", None]}}, DataFormatError, "field 'text' must be a string"),
            ({"qrels/test": {"query-id": ["q1"], "score": [1]}}, DataFormatError, "columns missing: corpus-id"),
            ({"qrels/test": {**JUDGED, "score": [0.5, 1.0]}}, DataFormatError, "must be a whole number, found 0.5"),
            ({"qrels/test": {**JUDGED, "score": [float("nan"), 1.0]}}, DataFormatError, "must be a whole number"),
            ({"qrels/test": {**JUDGED, "query-id": ["q1", None]}}, DataFormatError, "an id is missing"),
            ({"qrels/test": {k: [v[0]] * 2 for k, v in JUDGED.items()}}, DuplicateIdError, "is judged twice"),
        ],
    )
    def test_bad_retrieval_tables_are_rejected(self, tmp_path, overrides, error, problem):
        with pytest.raises(error, match=problem):
            open_data(write_retrieval(tmp_path, **overrides))

    def test_missing_splits_and_files_are_rejected(self, tmp_path):
        folder = write_retrieval(tmp_path)
        with pytest.raises(DataFormatError, match="no split 'dev'; splits found: test"):
            open_data(folder, splits=["dev"])
        (folder / "queries.parquet").unlink()
        with pytest.raises(DataFormatError, match=r"looked for queries\.parquet"):
            open_data(folder)
        (folder / "qrels" / "test.parquet").unlink()
        (folder / "qrels").rmdir()
        write_table(folder / "queries.parquet", QUERIES)
        with pytest.raises(DataFormatError, match=r"looked for qrels/\*\.parquet or qrels/\*\.tsv"):
            open_data(folder)


class TestDatasetsLibrary:
    def test_a_saved_folder_with_class_names(self, library, tmp_path):
        names = library.ClassLabel(names=["entailment", "neutral", "contradiction"])
        text = library.Value("string")
        features = library.Features({"premise": text, "hypothesis": text, "label": names})
        rows = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [2, -1, 0]}
        table = library.Dataset.from_dict(rows, features=features)
        library.DatasetDict({"validation": table, "train": table}).save_to_disk(str(tmp_path / "nli"))
        pairs = open_data(tmp_path / "nli")
        assert list(pairs.splits) == ["train", "dev"]
        assert [pair.label for pair in pairs.splits["dev"]] == ["contradiction", "entailment"]
        assert pairs.issues == tuple(f"{split}: 1 pair without an agreed label, left out" for split in ("train", "dev"))

    def test_a_name_loads_a_local_copy(self, library, tmp_path):
        (tmp_path / "copy").mkdir()
        write_lines(tmp_path / "copy" / "train.jsonl", [{"query": "a", "document": "b", "score": 1.5}])
        write_table(tmp_path / "tables" / "test.parquet", PAIRS)
        assert open_data(f"hf://{tmp_path}/copy").splits["train"][0].score == 1.5
        pairs = open_data(f"hf://{tmp_path}/tables", splits=["test"])
        assert (pairs.name, pairs.kind) == ("tables", "binary")
        with pytest.raises(DataFormatError, match="no split 'dev'; splits found: test"):
            open_data(f"hf://{tmp_path}/tables", splits=["dev"])

    def test_configurations_of_a_retrieval_set(self, library, tmp_path):
        folder = tmp_path / "pets"
        for name, columns in {"corpus": CORPUS, "queries": QUERIES, "qrels/test": JUDGED}.items():
            write_table(folder / f"{name}.parquet", columns)
        configs = [
            {"config_name": name, "data_files": [{"split": split, "path": f"{path}.parquet"}]}
            for name, split, path in (
                ("corpus", "corpus", "corpus"),
                ("queries", "queries", "queries"),
                ("default", "test", "qrels/test"),
            )
        ]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        dataset = open_data(f"hf://{folder}")
        assert list(dataset.passages) == ["p1", "p2"]
        assert dataset.queries["q1"].text == "Who sleeps?"
        assert dataset.qrels == {"test": {"q1": {"p1": 2}, "q2": {"p2": 0}}}
        test_only = open_data(f"hf://{folder}", splits=["test"])
        assert test_only.qrels == dataset.qrels

    def test_code_in_a_data_set_is_never_run(self, library, tmp_path):
        folder = tmp_path / "script"
        folder.mkdir()
        (folder / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        with pytest.raises(DataFormatError, match="cannot be loaded"):
            open_data(f"hf://{folder}")
        assert not (tmp_path / "ran").exists()

    def test_unknown_names_and_broken_copies_are_rejected(self, library, tmp_path):
        with pytest.raises(DataFormatError, match=r"cannot be loaded: .*; check the name, the configuration"):
            open_data(f"hf://{tmp_path}/lost")
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "dataset_dict.json").write_text("{")
        with pytest.raises(DataFormatError, match="cannot be read by the datasets library"):
            open_data(tmp_path / "broken")

    def test_missing_library_gets_an_install_hint(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MissingExtraError, match=r"pip install .*d2llm\[datasets\]"):
            open_data("hf://owner/name")

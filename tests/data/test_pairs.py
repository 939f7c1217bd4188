"""Reading labelled pairs: contents, counted issues, and errors with their file and line."""

from __future__ import annotations

import gzip
import json
import logging

import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError, InputError
from d2llm.data.pairs import LabelledPair, as_retrieval, read_pairs

CATS = {"query": "Do cats sleep?", "document": "Cats sleep.", "label": 1}
DOGS = {"query": "Do dogs sing?", "document": "Dogs bark.", "label": 0}


def write(path, *records):
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def assert_rejected(path, *, line=None, kind=DataFormatError, containing, **options):
    with pytest.raises(kind) as caught:
        read_pairs(path, **options)
    assert caught.value.line == line
    assert containing in str(caught.value)


def test_splits_come_in_order_with_ids_from_split_and_line(tmp_path):
    write(tmp_path / "test.jsonl.gz", DOGS)
    write(tmp_path / "train.jsonl", CATS, DOGS)
    write(tmp_path / "validation.jsonl", CATS)
    pairs = read_pairs(tmp_path)
    assert list(pairs.splits) == ["train", "dev", "test"]
    assert pairs.splits["train"] == (
        LabelledPair("train-1", "Do cats sleep?", "Cats sleep.", "1", None),
        LabelledPair("train-2", "Do dogs sing?", "Dogs bark.", "0", None),
    )
    assert (pairs.kind, pairs.classes, pairs.issues) == ("binary", ("0", "1"), ())
    assert pairs.positives("train") == [True, False]
    assert pairs.positives("test") == [False]
    assert pairs.name == tmp_path.name


def test_only_requested_splits_are_read(tmp_path):
    write(tmp_path / "train.jsonl", CATS)
    (tmp_path / "test.jsonl").write_text("not JSON\n")
    assert list(read_pairs(tmp_path, splits=["train"]).splits) == ["train"]
    assert_rejected(tmp_path, splits=["dev"], containing="no split 'dev'; splits found: train, test")
    with pytest.raises(DataFormatError, match="split 'test' was not read; read: train"):
        read_pairs(tmp_path, splits=["train"]).positives("test")


def test_a_single_file_is_the_split_of_its_name_or_all(tmp_path):
    assert list(read_pairs(write(tmp_path / "my.dev.jsonl", CATS)).splits) == ["dev"]
    pairs = read_pairs(write(tmp_path / "mine.jsonl", CATS))
    assert [pair.id for pair in pairs.splits["all"]] == ["all-1"]
    assert pairs.name == "mine"


def test_blank_lines_count_in_ids(tmp_path):
    (tmp_path / "train.jsonl").write_text(f"\n{json.dumps(CATS)}\n\n{json.dumps(DOGS)}\n")
    assert [pair.id for pair in read_pairs(tmp_path).splits["train"]] == ["train-2", "train-4"]


def test_given_ids_are_kept_and_unique_within_a_split(tmp_path):
    write(tmp_path / "train.jsonl", CATS | {"id": 7}, DOGS | {"id": "b"})
    write(tmp_path / "test.jsonl", CATS | {"id": 7})
    pairs = read_pairs(tmp_path)
    assert [pair.id for split in pairs.splits.values() for pair in split] == ["7", "b", "7"]
    path = write(tmp_path / "train.jsonl", CATS | {"id": 7}, DOGS | {"id": "7"})
    assert_rejected(tmp_path, line=2, kind=DuplicateIdError, containing=f"{path}:2: id '7' is used twice in 'train'")
    write(tmp_path / "train.jsonl", CATS | {"id": 7}, DOGS)
    assert_rejected(tmp_path, line=2, containing="field 'id' must be a text or whole number, found None")


@pytest.mark.parametrize(
    ("labels", "kind", "classes", "positives"),
    [
        ([True, False], "binary", ("0", "1"), [True, False]),
        (["yes", "no"], "binary", ("no", "yes"), [True, False]),
        (["False", "True"], "binary", ("False", "True"), [False, True]),
        (["entailment", "not_entailment"], "binary", ("entailment", "not_entailment"), [True, False]),
        (["1", "1"], "binary", ("1",), [True, True]),
        ([0, 1, 2], "classes", ("0", "1", "2"), None),
        (["neutral", "entailment"], "classes", ("entailment", "neutral"), None),
    ],
)
def test_kind_follows_the_classes(tmp_path, labels, kind, classes, positives):
    write(tmp_path / "train.jsonl", *(CATS | {"label": label} for label in labels))
    pairs = read_pairs(tmp_path)
    assert (pairs.kind, pairs.classes) == (kind, classes)
    if positives is None:
        with pytest.raises(DataFormatError, match="has classes, not a yes or no"):
            pairs.positives("train")
    else:
        assert pairs.positives("train") == positives


@pytest.mark.parametrize("field", ["score", "similarity_score", "label"])
def test_scores(tmp_path, field):
    texts = {"sentence1": "a", "sentence2": "b"}
    write(tmp_path / "train.jsonl", texts | {field: 4.5}, texts | {field: -1.0})
    pairs = read_pairs(tmp_path)
    assert (pairs.kind, pairs.classes) == ("scores", ())
    assert [(pair.label, pair.score) for pair in pairs.splits["train"]] == [(None, 4.5), (None, -1.0)]
    (tmp_path / "table.tsv").write_text(f"sentence1\tsentence2\t{field}\na\tb\t4.5\nb\tc\t1.0\n")
    table = read_pairs(tmp_path / "table.tsv")
    assert (table.kind, [pair.score for pair in table.splits["all"]]) == ("scores", [4.5, 1.0])


def test_integers_are_scores_by_field_name_or_layout(tmp_path):
    write(tmp_path / "train.jsonl", {"query": "a", "passage": "b", "score": 5})
    assert read_pairs(tmp_path).splits["train"][0].score == 5.0
    write(tmp_path / "train.jsonl", {"query": "a", "passage": "b", "label": 5})
    assert read_pairs(tmp_path).kind == "classes"
    assert read_pairs(tmp_path, layout="stsb").splits["train"][0].score == 5.0
    message = "unknown layout 'sts'; known: ocnli, cmnli"
    with pytest.raises(InputError, match=message):
        read_pairs(tmp_path, layout="sts")


def test_pairs_without_agreed_label_are_counted_and_left_out(tmp_path, caplog):
    labels = ["neutral", "-", None, "", -1]
    write(tmp_path / "train.jsonl", *(CATS | {"label": label} for label in labels))
    with caplog.at_level(logging.WARNING):
        pairs = read_pairs(tmp_path)
    assert [pair.id for pair in pairs.splits["train"]] == ["train-1"]
    assert pairs.issues == ("train: 4 pairs without an agreed label, left out",)
    assert pairs.issues[0] in caplog.text


def test_a_split_without_labels_is_counted_and_left_out(tmp_path):
    write(tmp_path / "train.jsonl", CATS)
    path = write(tmp_path / "test.jsonl", {"query": "a", "document": "b"}, {"query": "c", "document": "d"})
    pairs = read_pairs(tmp_path)
    assert list(pairs.splits) == ["train"]
    assert pairs.issues == ("test: 2 pairs without an agreed label, left out",)
    assert_rejected(tmp_path, splits=["test"], containing="holds no labelled pairs")
    write(path, {"query": "a", "document": "b"}, CATS)
    assert_rejected(tmp_path, line=2, containing="has a 'label', but lines before it have none")


def test_empty_texts_and_unknown_classes_are_counted(tmp_path):
    write(tmp_path / "train.jsonl", CATS | {"label": "neutral"}, CATS | {"label": "neutral", "document": " "})
    write(tmp_path / "test.jsonl", CATS | {"label": "contradiction"})
    pairs = read_pairs(tmp_path)
    assert len(pairs.splits["train"]) == 2
    assert pairs.issues == ("train: 1 pair without text", "test: contradiction: no such class in train")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"query": "a", "document": "b"}, "field 'label' is missing; fields found: 'query', 'document'"),
        ({"query": "a", "label": 1}, "field 'document' is missing"),
        (CATS | {"query": None}, "field 'query' must be a string, found null"),
        (CATS | {"document": ["x"]}, "field 'document' must be a string, found a list"),
        (CATS | {"label": [1]}, "field 'label' must be a class or a number, found a list"),
        (CATS | {"label": 0.5}, "classes and scores are mixed (here 0.5)"),
        (CATS | {"label": float("nan")}, "field 'label' must be a finite number, found nan"),
        (CATS | {"query": "\ud800"}, "an unpaired surrogate"),
    ],
)
def test_a_malformed_line_is_reported_with_its_number(tmp_path, record, problem):
    path = write(tmp_path / "train.jsonl", CATS, record)
    assert_rejected(tmp_path, line=2, containing=f"{path}:2: ")
    assert_rejected(tmp_path, line=2, containing=problem)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "high", True, None])
def test_scores_that_are_not_finite_numbers_are_rejected(tmp_path, score):
    texts = {"query": "a", "document": "b"}
    write(tmp_path / "train.jsonl", texts | {"score": 1.0}, texts | {"score": score})
    if score is None:
        assert read_pairs(tmp_path).issues == ("train: 1 pair without an agreed label, left out",)
    else:
        assert_rejected(tmp_path, line=2, containing=f"field 'score' must be a finite number, found {score!r}")


def test_mixed_labels_and_scores_are_rejected(tmp_path):
    write(tmp_path / "train.jsonl", CATS | {"score": 3.0})
    assert_rejected(tmp_path, line=1, containing="has both 'label' and 'score'")
    assert read_pairs(tmp_path, layout="lcqmc").kind == "binary"
    assert read_pairs(tmp_path, layout="stsb").kind == "scores"
    write(tmp_path / "train.jsonl", CATS)
    write(tmp_path / "test.jsonl", {"query": "a", "document": "b", "score": 3.0})
    assert_rejected(tmp_path, containing="split 'test' has scores and others have classes")
    assert read_pairs(tmp_path, splits=["test"]).kind == "scores"


def test_too_many_classes_are_rejected(tmp_path):
    write(tmp_path / "train.jsonl", *(CATS | {"label": f"text {number}"} for number in range(60)))
    assert_rejected(tmp_path, line=51, containing="more than 50 classes")


def test_missing_and_empty_input_is_rejected(tmp_path):
    assert_rejected(tmp_path / "lost", containing="no such file or folder")
    assert_rejected(tmp_path, containing="looked for files of pairs named train, dev or test")
    (tmp_path / "train.jsonl").write_text("\n")
    assert_rejected(tmp_path, containing="holds no labelled pairs")
    (tmp_path / "train.jsonl").write_text('{"first": "a", "second": "b", "label": 1}\n')
    assert_rejected(tmp_path, line=1, containing="no two texts: looked for query/document, ")
    (tmp_path / "notes.md").write_text("x")
    assert_rejected(tmp_path / "notes.md", containing="unknown kind of file")


def test_unused_files_are_listed_and_mixed_formats_rejected(tmp_path):
    write(tmp_path / "train.jsonl", CATS)
    write(tmp_path / "extra.jsonl", DOGS)
    (tmp_path / "README").write_text("x")
    assert read_pairs(tmp_path).issues == ("files that were not read: extra.jsonl",)
    (tmp_path / "train.tsv").write_text("a\tb\t1\n")
    assert_rejected(tmp_path, containing="split 'train' has files of several formats (train.jsonl, train.tsv)")


@pytest.mark.parametrize(
    ("name", "kind", "classes", "counts"),
    [
        ("mrpc", "binary", ("0", "1"), (2693, 390, 931)),
        ("sick-nli", "classes", ("contradiction", "entailment", "neutral"), (4305, 485, 4825)),
        ("stsb-zh", "scores", (), (4887, 1411, 1351)),
    ],
)
def test_counts_of_real_data_sets(shared_data, name, kind, classes, counts):
    """Counts are from the table in the data sets' README."""
    pairs = read_pairs(shared_data / name)
    assert (pairs.kind, pairs.classes, pairs.issues) == (kind, classes, ())
    assert tuple(len(split) for split in pairs.splits.values()) == counts


def test_pairs_become_a_search_among_the_passages_of_all_splits(tmp_path):
    write(tmp_path / "train.jsonl", DOGS)
    write(
        tmp_path / "dev.jsonl",
        CATS,
        CATS | {"document": "Dogs bark.", "label": 0},
        CATS | {"document": "They do.", "label": 0},
        CATS | {"document": "They do.", "label": 1},
        DOGS,  # its query has no relevant passage
    )
    dataset = as_retrieval(read_pairs(tmp_path), "dev")
    assert [passage.text for passage in dataset.passages.values()] == ["Dogs bark.", "Cats sleep.", "They do."]
    assert [query.text for query in dataset.queries.values()] == ["Do cats sleep?"]
    (judged,) = dataset.qrels["dev"].values()
    assert {dataset.passages[key].text: grade for key, grade in judged.items()} == {
        "Cats sleep.": 1,
        "Dogs bark.": 0,
        "They do.": 1,
    }
    assert set(dataset.positives("dev")) == set(dataset.queries)


def test_pairs_with_scores_are_no_search(tmp_path):
    write(tmp_path / "dev.jsonl", {"query": "a", "document": "b", "score": 2.5})
    with pytest.raises(DataFormatError, match="has scores, not a yes or no"):
        as_retrieval(read_pairs(tmp_path), "dev")

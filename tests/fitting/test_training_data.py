"""The data sets of a fit: splits without leaks, and users' queries."""

from __future__ import annotations

from dataclasses import replace

import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.core.types import Passage
from d2llm.data.beir import read_beir
from d2llm.fitting.critic import KeptQuery, WrittenQuery
from d2llm.fitting.training_data import (
    FEW_DOCUMENTS,
    MIN_HELD_OUT,
    read_examples,
    read_judged,
    split_passages,
    write_users_data,
    write_written_data,
)
from d2llm.models.student import Student
from d2llm.retrieval.index import Index
from tiny_models import TEXTS, tiny_student_config, write_tiny_model


def corpus(num_documents, each):
    return [
        Passage(f"d{document}#{part}", f"part {part} of {document}", document_id=f"d{document}", position=part)
        for document in range(num_documents)
        for part in range(1, each + 1)
    ]


def queries_for(passages, extra=()):
    kept = [KeptQuery(WrittenQuery(f"query for {p.id}", "question", p.id), (p.id,), 1) for p in passages]
    return [*kept, *extra]


def ids(passages):
    return [passage.id for passage in passages]


def test_the_task_of_a_written_query_is_its_instruction(tmp_path):
    passages = corpus(2 * FEW_DOCUMENTS, 1)
    plain, *others = queries_for(passages)
    told = [replace(each, written=each.written._replace(instruction="task: a | query: ")) for each in others]
    write_written_data(tmp_path / "data", passages, [plain, *told], seed=0)
    queries = read_beir(tmp_path / "data").queries
    assert {queries[each.written.id].instruction for each in told} == {"task: a | query: "}
    assert queries[plain.written.id].instruction is None


def test_passages_of_a_document_share_a_split():
    passages = corpus(2 * FEW_DOCUMENTS, 3)
    splits = split_passages(passages, ids(passages), seed=0)
    by_document: dict[str, set[str]] = {}
    for passage in passages:
        by_document.setdefault(passage.document_id, set()).add(splits[passage.id])
    assert all(len(each) == 1 for each in by_document.values())
    assert set(splits.values()) == {"train", "dev", "test"}
    assert splits == split_passages(passages[::-1], ids(passages)[::-1], seed=0)


def test_a_single_long_document_is_split_in_parts():
    passages = corpus(1, 400)
    splits = split_passages(passages, 2 * ids(passages), seed=0)
    assert set(splits.values()) == {"train", "dev", "test"}
    changes = sum(splits[f"d0#{part}"] != splits[f"d0#{part + 1}"] for part in range(1, 400))
    assert changes < 50  # neighbours nearly always share a split


@pytest.mark.parametrize(("split", "large_shares"), [("test", (0.15, 0.15)), ("dev", (0.1, 0.05))])
def test_more_queries_make_smaller_held_out_shares(split, large_shares):
    passages = corpus(2_000, 10)
    fractions = [
        sum(each == split for each in split_passages(passages, ids(passages)[::every], 0).values()) / 20_000
        for every in (200, 10, 1)
    ]
    assert fractions[0] == pytest.approx(0.01, abs=0.002)  # a fifth of the 100 documents that have a query
    assert fractions[1:] == pytest.approx(large_shares, abs=0.002)


@pytest.mark.parametrize("seed", range(20))
def test_dev_and_test_have_several_documents_even_if_queries_are_many(seed):
    passages = corpus(60, 5)
    splits = split_passages(passages, 20 * ids(passages), seed)
    for split in ("dev", "test"):
        assert len({passage.document_id for passage in passages if splits[passage.id] == split}) == MIN_HELD_OUT


def test_written_data_can_be_read_and_training_shares_no_positive_with_dev_or_test(tmp_path):
    passages = corpus(60, 2)
    splits = split_passages(passages, [*ids(passages), "d0#1"], seed=0)
    first = {split: next(p.id for p in passages if splits[p.id] == split) for split in ("train", "test")}
    shared = KeptQuery(WrittenQuery("a shared query", "question", first["train"]), (first["train"], first["test"]), 1)
    report = write_written_data(tmp_path / "data", passages, queries_for(passages, [shared]), seed=0)
    dataset = read_beir(tmp_path / "data")
    assert report.num_shared == 1
    assert sum(report.queries.values()) == len(dataset.queries) == 120
    assert dataset.issues == ()
    positives = {split: {p for ids in dataset.positives(split).values() for p in ids} for split in report.queries}
    assert not positives["train"] & (positives["dev"] | positives["test"])


def test_a_passage_that_also_answers_a_test_query_trains_nothing(tmp_path):
    passages = corpus(60, 2)
    splits = split_passages(passages, [*ids(passages), "d0#1"], seed=0)
    first = {split: next(p.id for p in passages if splits[p.id] == split) for split in ("train", "test")}
    shared = KeptQuery(WrittenQuery("a shared query", "question", first["test"]), (first["test"], first["train"]), 1)
    report = write_written_data(tmp_path / "data", passages, queries_for(passages, [shared]), seed=0)
    positives = read_beir(tmp_path / "data").positives
    assert (first["test"], first["train"]) in [tuple(names) for names in positives("test").values()]
    assert not [names for names in positives("train").values() if first["train"] in names]
    assert report.num_shared == 1


def test_all_queries_to_train_on_may_share_a_passage_with_test(tmp_path):
    passages = corpus(60, 2)
    splits = split_passages(passages, ids(passages), seed=0)
    trained = tuple(name for name, split in splits.items() if split == "train")
    kept = queries_for(passages)
    index = next(n for n, query in enumerate(kept) if splits[query.written.passage_id] == "test")
    kept[index] = replace(kept[index], positives=(*kept[index].positives, *trained))
    report = write_written_data(tmp_path / "data", passages, kept, seed=0)
    assert report.queries["train"] == 0
    assert report.num_shared == len(trained)
    assert read_beir(tmp_path / "data", splits=["dev", "test"]).positives("test")


def test_passages_that_users_queries_train_on_are_not_held_out(tmp_path):
    passages = corpus(60, 2)
    splits = split_passages(passages, ids(passages), seed=0)
    held_out = next(p.id for p in passages if splits[p.id] == "test")
    trained_on = {held_out, next(p.id for p in passages if splits[p.id] == "train")}
    report = write_written_data(tmp_path / "data", passages, queries_for(passages), trained_on=trained_on, seed=0)
    positives = read_beir(tmp_path / "data").positives("test").values()
    assert report.num_shared == 1
    assert (held_out,) not in positives


def test_too_few_queries_are_an_error_that_counts_them(tmp_path):
    passages = corpus(2, 1)
    with pytest.raises(InputError, match="the 2 queries that the critic kept"):
        write_written_data(tmp_path / "data", passages, queries_for(passages), seed=0)
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("index")
    student = Student.create(tiny_student_config(write_tiny_model(root / "model", "bert")), device="cpu")
    index = Index.create(root / "index", student)
    index.add(documents())
    return index


def documents():
    return [
        Passage(f"d{number // 2}.md#{number % 2 + 1}", text, document_id=f"d{number // 2}.md", position=number % 2 + 1)
        for number, text in enumerate(TEXTS)
    ]


def test_users_queries_name_passages_or_documents(tmp_path, index):
    judged = [(f"query {number} about a cat", "d0.md#2", 1) for number in range(20)]
    judged += [("the dog runs", "d0.md", 2), ("nothing", "missing.md", 1)]
    report = write_users_data(tmp_path / "users", documents(), judged, index, task="asymmetric", seed=0)
    dataset = read_beir(tmp_path / "users")
    grades = {query: by_id for split in dataset.qrels.values() for query, by_id in split.items()}
    [of_document] = [by_id for query, by_id in grades.items() if dataset.queries[query].text == "the dog runs"]
    ranking = index.search(["the dog runs"])[0].passages
    best = next(entry.passage.id for entry in ranking if entry.passage.document_id == "d0.md")
    assert of_document == {best: 2}
    assert report.num_unknown == 1
    assert sum(report.queries.values()) == 21
    assert "nothing" not in {query.text for query in dataset.queries.values()}


def test_judgements_of_other_documents_are_an_error(tmp_path, index):
    with pytest.raises(InputError, match=r"none of the 1 judged ids .* 'other\.md'"):
        write_users_data(tmp_path / "users", documents(), [("q", "other.md", 1)], index, task="asymmetric", seed=0)


def test_judged_files(tmp_path):
    path = tmp_path / "clicks.tsv"
    path.write_text("how to clean\tmanual.md\n\nhow to store\tmanual.md#3\t2.0\n")
    assert read_judged(path) == [("how to clean", "manual.md", 1), ("how to store", "manual.md#3", 2)]
    for content, problem in [
        ("only a query\n", "clicks.tsv:1: must be"),
        ("q\tp\thigh\n", "clicks.tsv:1: the grade must be a whole number, found 'high'"),
        ("\n", "holds no queries"),
    ]:
        path.write_text(content)
        with pytest.raises(DataFormatError, match=problem):
            read_judged(path)


def test_examples(tmp_path):
    path = tmp_path / "examples.tsv"
    path.write_text("A passage on tea.\thow hot should tea be\n")
    assert read_examples(path) == (("A passage on tea.", "how hot should tea be"),)
    path.write_text("no query\n")
    with pytest.raises(DataFormatError, match=r"examples\.tsv:1: must be 'passage<TAB>query'"):
        read_examples(path)

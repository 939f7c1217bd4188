from __future__ import annotations

import json
import random
import socket
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from d2llm.core.errors import DuplicateIdError, InputError, ModelError, ModelNotFoundError
from d2llm.core.types import Passage, Query
from d2llm.data.beir import read_beir
from d2llm.models.student import Student
from d2llm.ops.measures import per_query_measures
from d2llm.recipe import InteractionConfig
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from late_import import late_import
from searching import search
from tiny_models import TEXTS, tiny_student_config, write_tiny_model, write_trained_student

mteb = late_import("mteb", reason="needs mteb: pip install 'd2llm[mteb]' (Python 3.11 or newer)")
datasets = late_import("datasets")
stats = late_import("scipy.stats")
integration = late_import("d2llm.integrations.mteb")

WORDS = " ".join(TEXTS).replace(",", "").split()
_RANDOM = random.Random(7)


def random_text(num_words: int) -> str:
    return " ".join(_RANDOM.choices(WORDS, k=num_words))


PASSAGES = [Passage(f"p{n:02}", random_text(8), random_text(2) if n % 3 else "") for n in range(40)]
# Two passages per query have the same text: their scores tie, and only the first is relevant.
PASSAGES += [Passage(f"same{n}{copy}", f"twice {TEXTS[n]}") for n in range(8) for copy in "ab"]
QUERIES = [Query(f"q{n}", f"twice {TEXTS[n]}" if n < 4 else random_text(12)) for n in range(8)]
QRELS = {f"q{n}": {f"same{n}a": 2, f"p{n:02}": 1, f"p{n + 9:02}": 1, f"p{n + 20:02}": 3} for n in range(8)}
PAIRS = [(random_text(10), random_text(10)) for _ in range(24)]
RATINGS = [_RANDOM.randint(0, 5) for _ in PAIRS]
LABELS = [n % 2 for n in range(len(PAIRS))]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_trained_student(tmp_path_factory.mktemp("mteb"), query_prefix="rain ", max_query_tokens=10)


@pytest.fixture(scope="module")
def student(folder):
    return Student.load(folder, device="cpu")


@pytest.fixture(scope="module")
def model(folder):
    return integration.load_mteb_model(folder, device="cpu")


def describe(name: str, kind: str, main_score: str) -> Any:
    return mteb.abstasks.task_metadata.TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        description="made in memory",
        reference=None,
        dataset={"path": "none", "revision": "1"},
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=("2026-01-01", "2026-01-01"),
        domains=[],
        task_subtypes=[],
        license="cc0-1.0",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
    )


def retrieval_task(name="LocalRetrieval", kind="Retrieval", *, passages=PASSAGES, queries=QUERIES, qrels=QRELS, **data):
    class Task(mteb.abstasks.AbsTaskRetrieval):
        metadata = describe(name, kind, "ndcg_at_10")

        def load_data(self, num_proc=None, **kwargs):
            corpus = [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
            rows = [{"id": q.id, "text": q.text} for q in queries]
            split = {
                "corpus": datasets.Dataset.from_list(corpus),
                "queries": datasets.Dataset.from_list(rows),
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split | {"relevant_docs": dict(qrels)} | data}}
            self.data_loaded = True

    return Task()


def pair_task(base, name, kind, main_score, target, values, pairs=PAIRS, sides=(None, None)):
    class Task(base):
        metadata = describe(name, kind, main_score)
        input1_prompt_type, input2_prompt_type = sides

        def load_data(self, num_proc=None, **kwargs):
            first, second = zip(*pairs, strict=True)
            columns = {"sentence1": list(first), "sentence2": list(second), target: values}
            self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})
            self.data_loaded = True

    return Task()


def sts_task(name="LocalSTS", **settings):
    return pair_task(mteb.abstasks.AbsTaskSTS, name, "STS", "cosine_spearman", "score", RATINGS, **settings)


def class_task(name="LocalPairs", **settings):
    return pair_task(
        mteb.abstasks.AbsTaskPairClassification, name, "PairClassification", "max_ap", "labels", LABELS, **settings
    )


def run(model, task, folder):
    """Evaluate with mteb; returns its results, its scores and the predictions behind them."""
    cache = mteb.cache.ResultCache(folder / "results")
    results = mteb.evaluate(
        model, [task], cache=cache, prediction_folder=folder, show_progress_bar=False, co2_tracker=False
    )
    (path,) = folder.glob("*_predictions.json")
    predictions = json.loads(path.read_text())["default"]["test"]
    (scores,) = results.task_results[0].scores["test"]
    return results, scores, predictions


def our_rankings(student, folder, *, passages=PASSAGES, queries=QUERIES, task="asymmetric"):
    encode(passages, student, folder / "ours")
    rankings = search(Index.open(folder / "ours").view, student, queries, task=task, top_k=1000)
    return {r.query.id: [(result.passage.id, result.score) for result in r.passages] for r in rankings}


def our_measure(rankings, qrels, name="nDCG@10"):
    return fmean(per_query_measures({q: [p for p, _ in r] for q, r in rankings.items()}, qrels)[name].values())


def our_scores(student, pairs, task):
    """Logits of pairs, with the first text as query and the second as passage."""
    queries = student.encode_queries([first for first, _ in pairs]).vectors
    passages = student.encode_passages([second for _, second in pairs]).vectors
    return np.concatenate([student.score(q, p[None], task) for q, p in zip(queries, passages, strict=True)])


def test_the_model_is_a_searcher_and_an_encoder_for_mteb(model):
    assert isinstance(model, mteb.models.SearchProtocol)
    assert isinstance(model, mteb.models.EncoderProtocol)
    assert not isinstance(model, mteb.models.CrossEncoderProtocol)


@pytest.mark.parametrize(("name", "task"), [("LocalRetrieval", "asymmetric"), ("QuoraLocal", "symmetric")])
def test_retrieval_equals_our_own_search(model, student, tmp_path, name, task):
    _, scores, predictions = run(model, retrieval_task(name), tmp_path)
    expected = our_rankings(student, tmp_path, task=task)
    assert {query: list(predicted) for query, predicted in predictions.items()} == {
        query: [passage for passage, _ in ranking] for query, ranking in expected.items()
    }
    for query, ranking in expected.items():
        np.testing.assert_allclose(list(predictions[query].values()), [s for _, s in ranking], rtol=1e-6)
    # mteb rounds to five places; the measures include ties such as "same0a" and "same0b"
    assert scores["ndcg_at_10"] == pytest.approx(our_measure(expected, QRELS), abs=6e-6)
    assert scores["mrr_at_10"] == pytest.approx(our_measure(expected, QRELS, "MRR@10"), abs=6e-6)
    assert 0 < scores["ndcg_at_10"] < 1
    positions = {passage: rank for rank, (passage, _) in enumerate(expected["q0"])}
    assert positions["same0b"] == positions["same0a"] + 1


def test_results_without_the_interaction_are_stored_separately(model, folder, tmp_path):
    bare = integration.load_mteb_model(folder, device="cpu", interaction=False)
    _, with_it, ours = run(model, retrieval_task(), tmp_path)
    _, without, dots = run(bare, retrieval_task(), tmp_path)
    assert ours != dots
    assert with_it["ndcg_at_10"] != without["ndcg_at_10"]
    files = sorted(path.relative_to(tmp_path).parts for path in (tmp_path / "results").rglob("LocalRetrieval.json"))
    fingerprint = model.mteb_model_meta.revision
    assert [parts[3:] for parts in files] == [
        (fingerprint, "LocalRetrieval.json"),
        (fingerprint, "experiments", "interaction_False", "LocalRetrieval.json"),
    ]
    metadata = json.loads((tmp_path.joinpath(*files[0]).parent / "model_meta.json").read_text())
    assert (metadata["name"], metadata["revision"]) == ("d2llm/tiny-student", fingerprint)


def test_num_candidates_limits_the_inner_product_search(folder, student, tmp_path):
    shallow = integration.load_mteb_model(folder, device="cpu", num_candidates=3)
    task = retrieval_task()
    task.load_data()
    shallow.index(task.dataset["default"]["test"]["corpus"], task_metadata=task.metadata, **PLACE)
    results = shallow.search(task.dataset["default"]["test"]["queries"], task_metadata=task.metadata, top_k=3, **PLACE)
    encode(PASSAGES, student, tmp_path / "ours")
    expected = search(Index.open(tmp_path / "ours").view, student, QUERIES, top_k=3, num_candidates=3)
    assert {q: list(ranking) for q, ranking in results.items()} == {
        r.query.id: [p.passage.id for p in r.passages] for r in expected
    }
    assert shallow.mteb_model_meta.experiment_kwargs == {"num_candidates": 3}


PLACE = {"hf_split": "test", "hf_subset": "default", "encode_kwargs": {"show_progress_bar": False}}


def test_reranking_scores_exactly_the_given_passages(model, student, tmp_path):
    pools = {f"q{n}": [f"same{n}b", f"same{n}a", *(p.id for p in PASSAGES[n : n + 7])] for n in range(7)}
    task = retrieval_task("LocalReranking", "Reranking", top_ranked=pools)
    _, scores, predictions = run(model, task, tmp_path)
    by_id = {passage.id: passage for passage in PASSAGES}
    assert set(predictions) == {query.id for query in QUERIES}
    assert predictions["q7"] == {}  # it has no passages to rerank
    for query in QUERIES[:7]:
        ids = pools[query.id]
        # the index stores bfloat16
        vectors = student.encode_passages([by_id[p].full_text for p in ids]).vectors
        vectors = torch.from_numpy(vectors).to(torch.bfloat16).float().numpy()
        logits = student.score(student.encode_queries([query.text]).vectors[0], vectors, "asymmetric")
        assert set(predictions[query.id]) == set(ids)
        np.testing.assert_allclose([predictions[query.id][p] for p in ids], logits, rtol=1e-4, atol=1e-4)
        order = list(predictions[query.id])
        assert order.index(f"same{query.id[1:]}a") < order.index(f"same{query.id[1:]}b")
    assert 0 < scores["ndcg_at_10"] < 1


def test_sts_uses_the_students_score(model, student, tmp_path):
    results, scores, predictions = run(model, sts_task(), tmp_path)
    expected = our_scores(student, PAIRS, "symmetric")
    np.testing.assert_allclose(predictions["similarity_scores"], expected, rtol=1e-5, atol=1e-6)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(expected, RATINGS).statistic)
    assert scores["main_score"] == scores["cosine_spearman"] != scores["spearman"]
    assert integration.scores_with_interaction(results, [sts_task()]) == {"LocalSTS": scores["spearman"]}


def test_pair_classification_uses_the_students_score(model, student, tmp_path):
    results, scores, predictions = run(model, class_task(), tmp_path)
    expected = our_scores(student, PAIRS, "symmetric")
    np.testing.assert_allclose(predictions["similarity_scores"], expected, rtol=1e-5, atol=1e-6)
    # average precision by hand: precision at each positive, best score first
    hits = np.array(LABELS)[np.argsort(-expected)]
    by_hand = np.mean([(hits[: n + 1].mean()) for n in range(len(hits)) if hits[n]])
    assert scores["similarity_ap"] == pytest.approx(by_hand)
    assert integration.scores_with_interaction(results, [class_task(), sts_task()]) == {
        "LocalPairs": pytest.approx(by_hand)
    }


def test_the_interaction_changes_pair_scores(folder, student, tmp_path):
    bare = integration.load_mteb_model(folder, device="cpu", interaction=False)
    _, _, predictions = run(bare, sts_task(), tmp_path)
    queries = student.encode_queries([first for first, _ in PAIRS]).vectors
    passages = student.encode_passages([second for _, second in PAIRS]).vectors
    dots = (student.query_vectors(queries, "symmetric") * passages).sum(axis=1)
    np.testing.assert_allclose(predictions["similarity_scores"], dots, rtol=1e-4, atol=1e-5)
    assert not np.allclose(dots, our_scores(student, PAIRS, "symmetric"), atol=1e-2)


@pytest.mark.parametrize("swapped", [False, True])
def test_prompt_types_and_tasks_by_name_are_respected(folder, student, tmp_path, swapped):
    asymmetric = integration.load_mteb_model(folder, device="cpu", tasks={"LocalPairs": "asymmetric"})
    sides = (mteb.types.PromptType.query, mteb.types.PromptType.document)
    pairs = [pair[::-1] for pair in PAIRS] if swapped else PAIRS
    task = class_task(pairs=pairs, sides=sides[::-1] if swapped else sides)
    _, _, predictions = run(asymmetric, task, tmp_path)
    expected = our_scores(student, PAIRS, "asymmetric")
    np.testing.assert_allclose(predictions["similarity_scores"], expected, rtol=1e-5, atol=1e-6)
    assert asymmetric.mteb_model_meta.experiment_kwargs == {"tasks": {"LocalPairs": "asymmetric"}}


def test_texts_are_encoded_as_passages_unless_they_are_queries(model, student):
    batches = [{"text": TEXTS[:5]}, {"text": TEXTS[5:]}]
    metadata = describe("LocalClasses", "Classification", "accuracy")
    described = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
    vectors = model.encode(batches, **described)
    np.testing.assert_array_equal(vectors, student.encode_passages(TEXTS).vectors)
    query_vectors = model.encode(batches, **described, prompt_type=mteb.types.PromptType.query)
    np.testing.assert_array_equal(query_vectors, student.encode_queries(TEXTS).vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(model.similarity(vectors, vectors)), unit @ unit.T, atol=1e-5)
    with pytest.raises(InputError, match="are not linked to their texts"):
        model.similarity_pairwise(vectors, vectors)


def test_every_kind_of_task_in_one_run(model, folder, tmp_path):
    pools = {f"q{n}": [f"same{n}b", f"same{n}a", *(p.id for p in PASSAGES[n : n + 7])] for n in range(8)}
    tasks = [
        retrieval_task(),
        retrieval_task("LocalReranking", "Reranking", top_ranked=pools),
        sts_task(),
        class_task(),
    ]
    bare = integration.load_mteb_model(folder, device="cpu", interaction=False)
    own = []
    for variant in (model, bare):
        cache = mteb.cache.ResultCache(tmp_path / "results")
        results = mteb.evaluate(variant, tasks, cache=cache, show_progress_bar=False, co2_tracker=False)
        own.append(integration.scores_with_interaction(results, tasks))
        assert not results.exceptions
    with_it, without = own
    assert set(with_it) == set(without) == {"LocalRetrieval", "LocalReranking", "LocalSTS", "LocalPairs"}
    assert all(with_it[name] != without[name] for name in with_it)


def test_model_metadata_for_mteb(model, student, folder):
    meta = model.mteb_model_meta
    weights = [*student.backbone.model.parameters(), *student.pooling.parameters(), *student.interaction.parameters()]
    assert meta.revision == student.fingerprint
    assert meta.n_parameters == sum(w.numel() for w in weights)
    assert meta.n_embedding_parameters == 400 * 32
    bytes_in_memory = sum(w.numel() * w.element_size() for w in weights)
    assert meta.memory_usage_mb == pytest.approx(bytes_in_memory / 1024**2, abs=0.05)
    assert (meta.embed_dim, meta.max_tokens, meta.similarity_fn_name) == (32, 64, "custom")
    assert meta.use_instructions  # the student has a query prefix
    assert (meta.license, meta.open_weights, meta.languages, meta.experiment_kwargs) == (None, None, None, None)
    metadata = {"languages": ["zho-Hans"], "license": "mit", "training_datasets": {"LCQMC"}}
    described = integration.load_mteb_model(folder, device="cpu", meta=metadata).mteb_model_meta
    assert (described.languages, described.license, described.open_weights, described.training_datasets) == (
        ["zho-Hans"],
        "mit",
        True,
        {"LCQMC"},
    )


@pytest.mark.parametrize("meta", [{"languages": ["English"]}, {"colour": "blue"}])
def test_invalid_metadata_is_rejected(folder, meta):
    with pytest.raises(InputError, match=f"not valid for mteb's ModelMeta.*{next(iter(meta))}"):
        integration.load_mteb_model(folder, device="cpu", meta=meta)


def test_branches_of_the_english_and_chinese_benchmarks():
    tasks = [task for name in ("MTEB(eng, v2)", "MTEB(cmn, v1)") for task in mteb.get_benchmark(name).tasks]
    searched = [t.metadata for t in tasks if isinstance(t, mteb.abstasks.AbsTaskRetrieval)]
    pairs = [t.metadata for t in tasks if t.metadata.type in integration.PAIR_TYPES]
    assert {m.type for m in [*searched, *pairs]} <= set(integration.TASK_OF_TYPE)
    assert {m.name for m in searched if integration.branch_of(m, {}) == "symmetric"} == {
        "CQADupstackGamingRetrieval",
        "CQADupstackUnixRetrieval",
        "AskUbuntuDupQuestions",
    }
    assert {integration.branch_of(m, {}) for m in pairs} == {"symmetric"}
    assert {m.main_score for m in pairs} <= set(integration.OWN_SIMILARITY)


def test_invalid_settings_are_rejected(folder, tmp_path):
    with pytest.raises(InputError, match=r"'STS12': 'both' is not a branch"):
        integration.load_mteb_model(folder, tasks={"STS12": "both"})
    with pytest.raises(InputError, match="float8"):
        integration.load_mteb_model(folder, vector_format="float8")
    with pytest.raises(ModelNotFoundError):
        integration.load_mteb_model(tmp_path / "nothing")
    config = tiny_student_config(write_tiny_model(tmp_path / "backbone"))
    paper = config.model_copy(update={"interaction": InteractionConfig(head="paper", hidden_dim=16, feature_dim=8)})
    Student.create(paper, device="cpu").save(tmp_path / "paper")
    with pytest.raises(InputError, match="'paper'"):
        integration.load_mteb_model(tmp_path / "paper", interaction=False)


def test_invalid_requests_are_rejected(folder, student):
    fresh = integration.load_mteb_model(folder, device="cpu")
    metadata = describe("LocalRetrieval", "Retrieval", "ndcg_at_10")
    rows = [{"id": "a", "text": "rain"}]
    with pytest.raises(InputError, match="no index"):
        fresh.search(rows, task_metadata=metadata, top_k=3, **PLACE)
    with pytest.raises(DuplicateIdError, match="'a'"):
        fresh.index(rows * 2, task_metadata=metadata, **PLACE)
    with pytest.raises(InputError, match="precision 'int8'"):
        fresh.index(rows, task_metadata=metadata, **(PLACE | {"encode_kwargs": {"precision": "int8"}}))
    with pytest.raises(InputError, match="truncate_dim 8, which this model does not have"):
        fresh.index(rows, task_metadata=metadata, **(PLACE | {"encode_kwargs": {"truncate_dim": 8}}))
    fresh.index(rows, task_metadata=metadata, **PLACE)
    with pytest.raises(InputError, match="query 'c' is a conversation"):
        fresh.search([{"id": "c", "text": ["hello", "you"]}], task_metadata=metadata, top_k=3, **PLACE)
    with pytest.raises(InputError, match=r"query 'a': 1 passages to rerank, the first 'z'"):
        fresh.search(rows, task_metadata=metadata, top_k=3, top_ranked={"a": ["a", "z"]}, **PLACE)

    class Broken(Student):
        def prepare(self, query_vector, task):
            return None  # scores by ``score``

        def score(self, query_vector, passage_vectors, task):
            return np.full(len(passage_vectors), np.nan, np.float32)

    broken = integration.D2LLMModel(Broken.load(folder, device="cpu"), fresh.mteb_model_meta)
    broken.index(rows, task_metadata=metadata, **PLACE)
    with pytest.raises(ModelError, match="query 'a': 1 of 1 scores are NaN"):
        broken.search(rows, task_metadata=metadata, top_k=3, top_ranked={"a": ["a"]}, **PLACE)


def test_truncation_is_reported_and_indexes_are_reused(folder, tmp_path, caplog):
    searcher = integration.load_mteb_model(folder, device="cpu", work_folder=tmp_path)
    metadata = describe("LocalRetrieval", "Retrieval", "ndcg_at_10")
    rows = [{"id": "short", "text": "rain"}, {"id": "long", "text": " ".join(TEXTS * 3)}]
    searcher.index(rows, task_metadata=metadata, **PLACE)
    assert "LocalRetrieval: 1 of 2 texts were too long" in caplog.text
    (index_folder,) = tmp_path.iterdir()
    modified = index_folder.joinpath("manifest.json").stat().st_mtime_ns
    searcher.index(rows, task_metadata=metadata, **PLACE)
    assert list(tmp_path.iterdir()) == [index_folder]
    assert index_folder.joinpath("manifest.json").stat().st_mtime_ns == modified
    query = {"id": "q", "text": "snow", "instruction": "and rain"}
    as_mteb_joins = [{"id": "q", "text": "snow and rain"}]
    results = [
        searcher.search(queries, task_metadata=metadata, top_k=2, **PLACE) for queries in ([query], as_mteb_joins)
    ]
    assert results[0] == results[1]


def test_the_shipped_student_matches_our_evaluation(shared_data, tmp_path):
    shipped = integration.load_mteb_model(device="cpu")
    dataset = read_beir(shared_data / "pubmedqa", splits=["test"])
    qrels = {query: dict(grades) for query, grades in list(dataset.qrels["test"].items())[:25]}
    queries = [dataset.queries[query] for query in qrels]
    passages = [dataset.passages[passage] for grades in qrels.values() for passage in grades]
    _, scores, _ = run(shipped, retrieval_task(passages=passages, queries=queries, qrels=qrels), tmp_path)
    ours = our_rankings(Student.load("d2llm-minilm", device="cpu"), tmp_path, passages=passages, queries=queries)
    assert scores["ndcg_at_10"] == pytest.approx(our_measure(ours, qrels), abs=6e-6)
    assert scores["ndcg_at_10"] > 0.9
    meta = shipped.mteb_model_meta
    assert (meta.name, meta.languages, meta.license, meta.open_weights) == (
        "d2llm/d2llm-minilm",
        ["eng-Latn"],
        "apache-2.0",
        True,
    )
    assert {"Banking77Classification", "MSMARCO"} <= meta.get_training_datasets()


def test_lists_get_the_whole_score_and_pairs_that_of_the_vectors(tmp_path):
    student = Student.load("d2llm-minilm", device="cpu", dtype="float32")
    meta = integration.model_meta(student, "d2llm-minilm", {}, {})
    shipped = integration.D2LLMModel(student, meta, tasks={"LocalPairs": "asymmetric"})
    index = Index.create(tmp_path / "index", student)
    index.upsert(PASSAGES)
    pools = {query.id: [passage.id for passage in PASSAGES] for query in QUERIES}
    reranking = retrieval_task("LocalReranking", "Reranking", top_ranked=pools)
    _, _, predictions = run(shipped, reranking, tmp_path / "lists")
    for query in QUERIES:
        found = {result.passage.id: result.score for result in index.search(query, top_k=len(PASSAGES)).passages}
        assert predictions[query.id] == pytest.approx(found, abs=1e-3)
    _, _, predictions = run(shipped, class_task(), tmp_path / "pairs")
    by_vectors = student.predict(PAIRS, task="asymmetric", with_features=False)
    np.testing.assert_allclose(predictions["similarity_scores"], by_vectors, atol=1e-3)
    assert not np.allclose(by_vectors, student.predict(PAIRS, task="asymmetric"), atol=1)

"""A backbone behind an embedding API, against an endpoint on a real socket."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import sqlite3
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2llm.core.errors import D2LLMError, InputError, MismatchError, ModelError, RecipeError, StorageError
from d2llm.core.types import Passage
from d2llm.methods.backbones.remote import EndpointUsage, RemoteBackbone, VectorCache
from d2llm.models.attribution import attribute
from d2llm.models.export.export import export
from d2llm.models.layer_choice import layer_distances
from d2llm.models.student import Student
from d2llm.models.student_files import check_content
from d2llm.recipe import StudentConfig
from d2llm.recipe.recipe import parse_recipe, shaping_settings
from d2llm.retrieval.chunking import Chunker
from d2llm.store.index_manifest import Chunking
from d2llm.training.distill import _starting_student
from d2llm.training.fit_tokens import fit_tokens
from local_endpoint import EMBEDDING_DIM, LocalEndpoint, Reply, Request, embedding, embeddings, local_endpoint
from tiny_models import TEXTS, tiny_tokenizer

KEY = "sk-not-a-real-key-0123456789"
TRIAL = "What do cows drink?"
SCALE = EMBEDDING_DIM**0.5  # a student's vectors have norm sqrt(dim)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "d2llm" / "vectors"


@pytest.fixture
def endpoint() -> Iterator[LocalEndpoint]:
    with local_endpoint(embeddings) as running:
        yield running


def config_of(url: str, *, remote: dict[str, Any] | None = None, **backbone: Any) -> StudentConfig:
    section = {"url": url, "dimensions": EMBEDDING_DIM, "patience_minutes": 0} | (remote or {})
    return StudentConfig.model_validate(
        {
            "backbone": {"model": "served", "remote": section} | backbone,
            "interaction": {"hidden_dim": 16, "feature_dim": 8},
        }
    )


def student_of(endpoint: LocalEndpoint, *, remote: dict[str, Any] | None = None, **backbone: Any) -> Student:
    return Student.create(config_of(endpoint.url, remote=remote, **backbone), device="cpu", dtype="float32")


def remote_of(student: Student) -> RemoteBackbone:
    assert isinstance(student.backbone, RemoteBackbone)
    return student.backbone


def inputs(endpoint: LocalEndpoint) -> list[list[str]]:
    return [request.body["input"] for request in endpoint.requests]


def asked(endpoint: LocalEndpoint) -> Counter[str]:
    """How often each text was sent, without the trial, which may be cut."""
    return Counter(text for texts in inputs(endpoint) for text in texts if not TRIAL.startswith(text))


def expected(*texts: str) -> np.ndarray:
    return SCALE * np.array([embedding(text) for text in texts])


def error_of(reply: Any, *texts: str, **settings: Any) -> tuple[D2LLMError, LocalEndpoint]:
    """The error of encoding texts with a student whose trial was answered."""
    answer = embeddings
    with local_endpoint(lambda request, number: answer(request, number)) as running:
        student = student_of(running, **settings)
        answer = reply
        with pytest.raises(D2LLMError) as caught:
            student.encode_passages(texts or ["a text"])
    return caught.value, running


# --- vectors


def test_vectors_are_those_of_the_endpoint_with_one_length(endpoint: LocalEndpoint) -> None:
    """The endpoint answers in reverse order, with the places of its vectors."""
    student = student_of(endpoint)
    encoded = student.encode_passages(TEXTS)
    np.testing.assert_allclose(encoded.vectors, expected(*TEXTS), atol=1e-5)
    assert student.vector_dim == EMBEDDING_DIM
    assert encoded.truncated == ()
    assert encoded.lengths == tuple(-(-len(text) // 3) for text in TEXTS)  # three characters count as a token
    trial, request = endpoint.requests
    assert trial.body == {"model": "served", "input": [TRIAL]}
    assert request.path == "/v1/embeddings"
    assert request.body == {"model": "served", "input": TEXTS}
    assert "Authorization" not in request.headers


def test_an_untrained_student_scores_as_the_cosine(endpoint: LocalEndpoint) -> None:
    student = student_of(endpoint)
    query, passages = student.encode_queries(["the cat"]).vectors[0], student.encode_passages(TEXTS).vectors
    cosines = np.array([np.dot(embedding("the cat"), embedding(text)) for text in TEXTS])
    scores = student.score(query, passages, "asymmetric")
    np.testing.assert_array_equal(np.argsort(-scores), np.argsort(-cosines))


def test_a_vector_is_asked_for_once(endpoint: LocalEndpoint) -> None:
    first = student_of(endpoint)
    first.encode_passages([*TEXTS, *TEXTS])
    first.encode_queries(TEXTS)  # the same vectors, because nothing tells the endpoint that these are queries
    again = student_of(endpoint)
    np.testing.assert_array_equal(again.encode_passages(TEXTS).vectors, first.encode_passages(TEXTS).vectors)
    assert asked(endpoint) == Counter(TEXTS)
    assert len(endpoint.requests) == 2
    words = sum(len(text.split()) for text in [TRIAL, *TEXTS])
    assert remote_of(first).usage == EndpointUsage(num_texts=9, num_requests=2, num_tokens=words, num_retries=0)
    assert remote_of(again).usage == EndpointUsage()


def test_another_model_revision_or_width_has_other_vectors(endpoint: LocalEndpoint) -> None:
    for settings in (
        {},
        {"model": "other"},
        {"remote": {"revision": "2"}},
        {"remote": {"dimensions": 8, "shorten": True}},
    ):
        student_of(endpoint, **settings).encode_passages(["a text"])
    assert asked(endpoint) == {"a text": 4}
    assert [request.body.get("dimensions") for request in endpoint.requests[-2:]] == [8, 8]


def test_texts_are_sent_in_requests_of_some(endpoint: LocalEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    student = student_of(endpoint, remote={"batch_texts": 3, "concurrency": 1})
    with caplog.at_level(logging.INFO, "d2llm.remarks"):
        student.encode_passages(TEXTS, advance=done.append)
    assert inputs(endpoint)[1:] == [TEXTS[:3], TEXTS[3:6], TEXTS[6:]]
    assert sum(done) == len(TEXTS)
    assert "vectors of 8 texts in 3 requests, " in caplog.text


def test_progress_of_many_texts_is_reported_between_requests(endpoint: LocalEndpoint) -> None:
    student = student_of(endpoint, remote={"batch_texts": 1, "concurrency": 1})
    done: list[tuple[int, int]] = []
    texts = [f"text {n}" for n in range(10)]
    encoded = student.encode_passages(texts, advance=lambda number: done.append((number, len(endpoint.requests))))
    assert done == [(4, 5), (4, 9), (2, 11)]  # the trial is one of the requests
    np.testing.assert_allclose(encoded.vectors, expected(*texts), atol=1e-5)
    assert len(encoded.lengths) == 10


def test_queries_and_passages_may_be_sent_differently(endpoint: LocalEndpoint) -> None:
    remote = {"query_body": {"input_type": "query"}, "passage_body": {"input_type": "passage", "truncate": "END"}}
    student = student_of(endpoint, remote=remote, query_prefix="find: ")
    student.encode_queries(["cats"])
    student.encode_passages(["cats"])
    student.encode_passages(["find: cats"])
    assert [request.body for request in endpoint.requests[1:]] == [
        {"model": "served", "input": ["find: cats"], "input_type": "query"},
        {"model": "served", "input": ["cats"], "input_type": "passage", "truncate": "END"},
        {"model": "served", "input": ["find: cats"], "input_type": "passage", "truncate": "END"},
    ]


def test_an_instruction_is_sent_in_place_of_the_prefix(endpoint: LocalEndpoint) -> None:
    student = student_of(endpoint, query_prefix="find: ", max_query_tokens=8, max_passage_tokens=8)
    plain, instructed = student.encode_queries(["cats"]), student.encode_queries(["cats"], instruction="Task: pets\n")
    np.testing.assert_allclose(plain.vectors, expected("find: cats"), atol=1e-5)
    np.testing.assert_allclose(instructed.vectors, expected("Task: pets\ncats"), atol=1e-5)
    assert asked(endpoint) == {"find: cats": 1, "Task: pets\ncats": 1}
    assert student.encode_queries(["cats eat fish and mice"], instruction="Task: pets\n").truncated == (0,)
    num_requests = len(endpoint.requests)
    with pytest.raises(InputError, match="but the student reads only 8 of instruction and query together"):
        student.encode_queries(["cats"], instruction="Task: find what is known about pets\n")
    assert len(endpoint.requests) == num_requests


@pytest.mark.parametrize("blank", ["", " \n\t "])
def test_a_text_without_words_is_not_sent(endpoint: LocalEndpoint, blank: str) -> None:
    student = student_of(endpoint)
    encoded = student.encode_passages([blank, "a text"])
    np.testing.assert_allclose(encoded.vectors, [np.zeros(EMBEDDING_DIM), expected("a text")[0]], atol=1e-5)
    assert asked(endpoint) == {"a text": 1}
    assert np.isfinite(student.score(encoded.vectors[1], encoded.vectors, "asymmetric")).all()


def test_long_texts_are_cut_and_counted(endpoint: LocalEndpoint) -> None:
    limits = {"max_query_tokens": 4, "max_passage_tokens": 5}
    student = student_of(endpoint, remote={"characters_per_token": 2.9}, passage_prefix="p: ", **limits)
    encoded = student.encode_passages(["1234567", "12345678", "1\n34567890"])
    assert encoded.truncated == (1, 2)
    assert encoded.lengths == (5, 5, 5)
    assert asked(endpoint) == {"p: 1234567": 1, "p: 1\n34567": 1}
    assert student.backbone.tokenize(["123456789"], "query").lengths == [4]  # in training; a search reads five
    assert asked(endpoint)["12345678"] == 1


def test_a_named_tokenizer_cuts_at_its_tokens(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    student = student_of(endpoint, remote={"tokenizer": str(tmp_path / "tokenizer")}, max_passage_tokens=6)
    encoded = student.encode_passages([TEXTS[0]])
    around = tokenizer.num_special_tokens_to_add()
    ends = [end for _, end in tokenizer(TEXTS[0], add_special_tokens=False, return_offsets_mapping=True).offset_mapping]
    assert encoded.truncated == (0,)
    assert encoded.lengths == (6,)
    assert asked(endpoint) == {TEXTS[0][: ends[5 - around]]: 1}


def test_threads_may_ask_at_the_same_time(endpoint: LocalEndpoint) -> None:
    student = student_of(endpoint, remote={"batch_texts": 2})
    with ThreadPoolExecutor(4) as threads:
        encoded = list(threads.map(student.encode_passages, [TEXTS, TEXTS[::-1]] * 4))
    for index, each in enumerate(encoded):
        np.testing.assert_allclose(each.vectors, expected(*(TEXTS if index % 2 == 0 else TEXTS[::-1])), atol=1e-5)


def test_whitening_is_fitted_to_the_vectors(endpoint: LocalEndpoint) -> None:
    config = config_of(endpoint.url).model_dump() | {"pooling": "whitening"}
    student = Student.create(StudentConfig.model_validate(config), device="cpu", dtype="float32")
    texts = [f"{first} {second}" for first in TEXTS for second in TEXTS]
    student.fit_pooling(texts)
    assert not np.allclose(student.encode_passages(texts).vectors, expected(*texts), atol=0.1)


def test_a_projection_makes_remote_vectors_narrower(endpoint: LocalEndpoint) -> None:
    config = config_of(endpoint.url).model_dump() | {"pooling": {"kind": "projection", "dim": 2}}
    student = Student.create(StudentConfig.model_validate(config), device="cpu", dtype="float32")
    texts = [f"{first} {second}" for first in TEXTS for second in TEXTS]
    student.fit_pooling(texts)
    own = expected(*texts).astype(np.float64)
    own *= np.sqrt(own.shape[1]) / np.linalg.norm(own, axis=1, keepdims=True)
    _, _, directions = np.linalg.svd(own - own.mean(axis=0))
    narrow = own @ directions[:2].T
    narrow /= np.linalg.norm(narrow, axis=1, keepdims=True)
    found = student.encode_passages(texts).vectors
    assert found.shape == (len(texts), 2)
    np.testing.assert_allclose(found @ found.T / 2, narrow @ narrow.T, rtol=1e-3, atol=1e-3)


def test_a_document_is_split_by_characters(endpoint: LocalEndpoint) -> None:
    student = student_of(endpoint)
    text = " ".join(TEXTS)
    pieces = Chunker(student, Chunking(16)).split(Passage("d", text))
    assert len(pieces) > 4
    assert max(len(piece.text) for piece in pieces) <= 48
    assert "".join("".join(piece.text.split()) for piece in pieces) == "".join(text.split())


# --- files


def test_a_saved_student_is_the_same_and_has_no_key(endpoint, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDDING_KEY", KEY)
    student = student_of(endpoint, remote={"api_key_env": "EMBEDDING_KEY", "characters_per_token": 2.0})
    vectors = student.encode_passages(TEXTS).vectors
    assert all(request.headers["Authorization"] == f"Bearer {KEY}" for request in endpoint.requests)
    student.save(tmp_path / "student")
    loaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert loaded.fingerprint == student.fingerprint
    assert loaded.backbone.tokenize(["12345"], "passage").lengths == [3]
    np.testing.assert_array_equal(loaded.encode_passages(TEXTS).vectors, vectors)
    check_content(tmp_path / "student")
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())
    assert manifest["config"]["backbone"]["model"] == "served"
    assert manifest["config"]["backbone"]["remote"]["dimensions"] == EMBEDDING_DIM
    assert "behind an embedding API" in (tmp_path / "student" / "README.md").read_text()
    files = [path for folder in (cache, tmp_path / "student") for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert not [path for path in cache.iterdir() if TEXTS[0].encode() in path.read_bytes()]
    assert KEY.encode() not in pickle.dumps(student)


def test_a_student_may_move_to_another_address(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    """Address, key and pace are no part of its identity."""
    student = student_of(endpoint)
    student.save(tmp_path / "student")
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())
    with local_endpoint(embeddings) as other:
        manifest["config"]["backbone"]["remote"] |= {"url": other.url, "batch_texts": 1, "timeout_seconds": 5.0}
        (tmp_path / "student" / "manifest.json").write_text(json.dumps(manifest))
        moved = Student.load(tmp_path / "student", device="cpu", dtype="float32")
        moved.encode_passages(["elsewhere"])
        assert asked(other) == {"elsewhere": 1}
        assert moved.fingerprint == student.fingerprint
        check_content(tmp_path / "student")
        recipe = {"training": {"start": str(tmp_path / "student")}, "student": config_of(endpoint.url).model_dump()}
        assert _starting_student(parse_recipe(recipe), device="cpu", dtype="float32").fingerprint == student.fingerprint
        shaping = [
            shaping_settings(parse_recipe({"student": {**config_of(url).model_dump()}}))
            for url in ("http://a/v1", "http://b/v1")
        ]
        assert shaping[0] == shaping[1]


@pytest.mark.parametrize("change", [{"dimensions": 8}, {"revision": "2"}, {"query_body": {"a": 1}}])
def test_a_student_is_not_loaded_with_other_vectors(endpoint, tmp_path, change: dict[str, Any]):
    student_of(endpoint).save(tmp_path / "student")
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())
    manifest["config"]["backbone"]["remote"] |= change | {"shorten": "dimensions" in change}
    (tmp_path / "student" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match=r"manifest.json: the settings of the remote backbone .*restore"):
        Student.load(tmp_path / "student", device="cpu", dtype="float32")


def test_a_copy_encodes(endpoint: LocalEndpoint) -> None:
    student = student_of(endpoint)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        np.testing.assert_allclose(other.encode_passages(TEXTS[:2]).vectors, expected(*TEXTS[:2]), atol=1e-5)
    assert asked(endpoint) == Counter(TEXTS[:2])


def test_a_loaded_student_names_its_manifest_in_errors(endpoint: LocalEndpoint, tmp_path: Path, cache: Path) -> None:
    student_of(endpoint).save(tmp_path / "student")
    for path in cache.iterdir():
        path.unlink()
    endpoint.reply = lambda request, number: Reply({"error": "no"}, status=401)
    with pytest.raises(ModelError, match=r"student/manifest.json: config.backbone.remote.api_key_env"):
        Student.load(tmp_path / "student", device="cpu")


# --- what cannot work


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"backbone": {"tuning": "lora"}}, 'tuning is "lora", but .* set tuning = "frozen"'),
        ({"backbone": {"tuning": "full"}}, "cannot be trained"),
        ({"backbone": {"layers": 2}}, "layers cannot be set for a remote backbone"),
        ({"pooling": "mean"}, "pooling is mean, which pools tokens, but a remote backbone gives one vector"),
        ({"backbone": {"remote": {"url": "http://a/v1"}}}, "student.backbone.remote.dimensions is missing"),
        ({"backbone": {"remote": {"url": "http://key@a/v1", "dimensions": 4}}}, "student.backbone.remote.url"),
        ({"backbone": {"remote": {"url": "http://a/v1", "dimensions": 4, "dimension": 4}}}, "unknown key .*dimensions"),
        ({"pooling": "pma"}, 'pooling is pma, .* set pooling = "auto"'),
        ({"pooling": {"kind": "projection", "dim": 2, "pooling": "pma"}}, "pooling is pma, which pools tokens"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(sections: dict[str, Any], message: str) -> None:
    backbone = {"model": "served", "remote": {"url": "http://a/v1", "dimensions": 4}} | sections.get("backbone", {})
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"student": sections | {"backbone": backbone}})


def test_token_vectors_are_refused_in_a_recipe() -> None:
    student = {"backbone": {"model": "served", "remote": {"url": "http://a/v1", "dimensions": 4}}}
    with pytest.raises(RecipeError, match=r"score_features.maxsim needs the states of tokens"):
        parse_recipe({"student": student, "score_features": {"maxsim": True}})
    assert parse_recipe(
        {"student": student, "score_features": {"bm25": True, "window_vectors": True}}
    ).score_features.bm25


def test_what_needs_tokens_or_weights_is_refused(endpoint: LocalEndpoint, tmp_path: Path) -> None:
    student = student_of(endpoint)
    student.save(tmp_path / "student")
    with pytest.raises(InputError, match="late chunking needs the states of tokens, and 'served' is a remote backbone"):
        _ = student.chunk_reader
    with pytest.raises(InputError, match=r"a weight for each word .* needs the states of tokens"):
        attribute(student, "a", "b", "asymmetric")
    with pytest.raises(InputError, match="training token embeddings needs"):
        fit_tokens(student, [])
    with pytest.raises(InputError, match="choosing layers needs"):
        layer_distances(student.backbone, TEXTS)
    with pytest.raises(InputError, match="a graph of the backbone needs"):
        export(student, tmp_path / "onnx", "onnx")
    with pytest.raises(InputError, match="engine 'onnx' runs models of transformers"):
        Student.load(tmp_path / "student", engine="onnx")
    with pytest.raises(InputError, match="merge=False"):
        student.save(tmp_path / "merged", merge=True)
    with pytest.raises(InputError, match="whose weights cannot be read"):
        _ = student.backbone.model
    assert not (tmp_path / "onnx").exists()
    assert not (tmp_path / "merged").exists()
    assert Student.load(tmp_path / "student", engine="auto").encode_passages(["a"]).vectors.any()
    assert "head.py" in " ".join(export(student, tmp_path / "numpy", "numpy").files)


# --- an endpoint that fails


def test_an_endpoint_that_is_away_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be reached: .* correct student.backbone.remote.url"):
        Student.create(config_of("http://127.0.0.1:1/v1"), device="cpu")


def test_another_width_is_an_error_at_once(endpoint: LocalEndpoint) -> None:
    message = r"'served' gives vectors of 16 dimensions, but student.backbone.remote.dimensions is 12; .*shorten"
    with pytest.raises(ModelError, match=message):
        student_of(endpoint, remote={"dimensions": 12})


def test_a_busy_endpoint_is_asked_again(endpoint: LocalEndpoint) -> None:
    student = student_of(endpoint, remote={"patience_minutes": 1})
    endpoint.reply = lambda request, number: (
        Reply("slow down", status=429, headers={"Retry-After": "0.2"}) if number < 3 else embeddings(request, number)
    )
    np.testing.assert_allclose(student.encode_passages(["a text"]).vectors, expected("a text"), atol=1e-5)
    first, second, third = (request.when for request in endpoint.requests[1:])
    assert second - first >= 0.2
    assert third - second >= 0.2
    assert remote_of(student).usage == EndpointUsage(num_texts=2, num_requests=2, num_tokens=6, num_retries=2)


def test_a_text_that_is_too_long_there_is_the_users_error() -> None:
    refusal = Reply({"error": {"message": "This model's maximum context length is 8192 tokens"}}, status=400)
    error, _ = error_of(lambda request, number: refusal)
    assert isinstance(error, InputError)
    assert "lower student.backbone.max_passage_tokens" in str(error)


@pytest.mark.parametrize(
    "body",
    ["<html>", {"choices": []}, {"data": [{"embedding": "AAAA"}]}, {"data": [{"index": 5, "embedding": [1.0] * 16}]}],
)
def test_an_answer_without_vectors_is_quoted(body: object) -> None:
    error, running = error_of(lambda request, number: Reply(body))
    assert f"{running.url}/embeddings did not answer with vectors: " in str(error)


def fewer(request: Request, number: int) -> Reply:
    reply = embeddings(request, number)
    reply.body["data"] = [row for row in reply.body["data"] if row["index"] < 2]
    return reply


def test_fewer_vectors_than_texts_are_an_error() -> None:
    error, _ = error_of(fewer, *TEXTS[:3])
    assert "2 vectors came back for 3 texts; lower student.backbone.remote.batch_texts" in str(error)


def test_numbers_that_are_not_finite_name_their_text(endpoint: LocalEndpoint) -> None:
    def reply(request: Request, number: int) -> Reply:
        answer = embeddings(request, number)
        for row in answer.body["data"]:
            if request.body["input"][row["index"]] == TEXTS[1]:
                row["embedding"][3] = value
        return answer

    student = student_of(endpoint)
    endpoint.reply = reply
    for value in (float("nan"), 1e300, None):  # noqa: B007 - the reply has it
        with pytest.raises(ModelError, match=r"the vector of the text 'a dog runs .* not finite"):
            student.encode_passages(TEXTS[:3])
    endpoint.reply = embeddings
    student.encode_passages(TEXTS[:3])
    assert asked(endpoint) == {TEXTS[0]: 1, TEXTS[1]: 4, TEXTS[2]: 1}  # the others were kept


def test_vectors_that_came_before_an_error_are_kept(endpoint: LocalEndpoint) -> None:
    endpoint.reply = lambda request, number: (
        Reply("broken", status=503) if TEXTS[5] in request.body["input"] else embeddings(request, number)
    )
    student = student_of(endpoint, remote={"batch_texts": 2, "concurrency": 1})
    with pytest.raises(ModelError, match="Run the command again"):
        student.encode_passages(TEXTS)
    assert inputs(endpoint)[1:] == [TEXTS[:2], TEXTS[2:4], TEXTS[4:6]]
    endpoint.reply = embeddings
    np.testing.assert_allclose(student_of(endpoint).encode_passages(TEXTS).vectors, expected(*TEXTS), atol=1e-5)
    assert inputs(endpoint)[4:] == [TEXTS[4:]]


# --- the cache


def test_the_cache_gives_back_what_was_added(tmp_path: Path) -> None:
    """More rows than fit into one statement, and two programs with the file open."""
    rows = {str(n).encode(): np.array([n, -n, 0.5], np.float32) for n in range(1200)}
    one, other = (VectorCache(tmp_path / "new" / "v.sqlite", 3) for _ in range(2))
    one.add(rows.items())
    other.add([(b"7", np.ones(3, np.float32)), (b"more", np.full(3, 2, np.float32))])
    ids = one.find([*rows, b"more", b"unknown"])
    assert ids.keys() == rows.keys() | {b"more"}
    keys = [b"1199", b"7", b"0", b"7"]
    vectors = other.read([ids[key] for key in keys] + [0])
    np.testing.assert_array_equal(vectors, np.stack([*(rows[key] for key in keys), np.zeros(3, np.float32)]))
    assert one.read([]).shape == (0, 3)


def test_a_damaged_cache_says_what_to_do(endpoint: LocalEndpoint, cache: Path) -> None:
    student = student_of(endpoint)
    (path,) = cache.iterdir()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE vectors SET vector = x'00'")
    connection.close()
    tokenized = student.tokenize([TRIAL], "passage")
    with pytest.raises(StorageError, match="lacks a vector that was there, or is damaged; delete it"):
        student.encode_tokens(tokenized.ids)
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StorageError, match=r"\.sqlite: .*not a database.*delete it"):
        student_of(endpoint)


def test_a_cache_folder_that_cannot_be_made_is_an_error(endpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="XDG_CACHE_HOME"):
        student_of(endpoint)

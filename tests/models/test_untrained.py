"""Models of sentence-transformers as students that were not trained."""

from __future__ import annotations

import json

import numpy as np
import pytest

from d2llm import Index, Student
from d2llm.core.errors import InputError, ModelNotFoundError
from d2llm.models.external import is_bi_encoder, write_untrained
from e2e.command_line import succeed
from late_import import late_import
from tiny_models import TEXTS, write_tiny_model, write_trained_student

library = late_import("sentence_transformers", reason="pip install 'd2llm[sentence-transformers]'")
LONG = " ".join(TEXTS * 4)
QUERY = TEXTS[0]


def make_model(folder, pooling="mean", *, more=(), similarity="cosine"):
    """A tiny bi-encoder with prompts and a limit of 20 tokens."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    backbone = Transformer(str(write_tiny_model(folder / "backbone", "bert")), max_seq_length=20)
    prompts = {"query": "find the text: ", "document": "read: "}
    modules = [backbone, Pooling(32, pooling_mode=pooling), *more]
    return library.SentenceTransformer(modules=modules, prompts=prompts, similarity_fn_name=similarity, device="cpu")


@pytest.fixture(scope="module", params=["mean", "cls"])
def model(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), request.param)


def cosines(model, queries, passages):
    return model.similarity(model.encode_query(queries), model.encode_document(passages)).numpy()


@pytest.mark.parametrize("is_saved", [True, False], ids=["folder", "object"])
def test_an_index_of_a_model_scores_by_its_cosine_and_by_words(model, tmp_path, is_saved):
    source = model
    if is_saved:
        source = tmp_path / "saved"
        model.save(str(source))
    texts = [*TEXTS, LONG]
    settings = {"device": "cpu", "dtype": "float32", "engine": "torch"}
    with Index.create(tmp_path / "tiny.index", source, vector_format="float32", **settings) as index:
        index.upsert([{"id": str(n), "text": text} for n, text in enumerate(texts)])
    with Index.open(tmp_path / "tiny.index", **settings) as index:
        ranking = index.search(QUERY, top_k=len(texts), explain=True, score_features={})
        scores = {int(result.passage.id): result.score for result in ranking.passages}
        expected = 20 * cosines(model, [QUERY], texts)[0]
        np.testing.assert_allclose([scores[n] for n in range(len(texts))], expected, atol=1e-3)
        with_words = index.search(QUERY, top_k=len(texts), explain=True)
        added = {
            int(result.passage.id): result.score - scores[int(result.passage.id)] for result in with_words.passages
        }
        assert max(added, key=lambda n: added[n]) == 0  # the text itself
        assert added[0] > 0.1
        index.upsert_documents([{"id": "long", "text": LONG}])
        assert len(index) > len(texts) + 1
    (tmp_path / "moved").mkdir()
    for name in ("tiny.index", "tiny.index.student"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with Index.open(tmp_path / "moved" / "tiny.index", **settings) as index:
        assert len(index.search(QUERY, top_k=3)) == 3


def test_the_same_model_opens_its_index_again_and_another_does_not(model, tmp_path):
    settings = {"device": "cpu", "dtype": "float32", "engine": "torch"}
    Index.create(tmp_path / "tiny.index", model, **settings).close()
    Index.create(tmp_path / "tiny.index", model, exist_ok=True, **settings).close()
    other = make_model(tmp_path, "lasttoken")
    with pytest.raises(InputError, match=r"tiny.index.student: holds another student"):
        Index.create(tmp_path / "tiny.index", other, exist_ok=True, **settings)


def test_a_student_is_not_left_beside_an_index_that_was_not_made(model, tmp_path):
    (tmp_path / "tiny.index").mkdir()
    (tmp_path / "tiny.index" / "mine").touch()
    settings = {"device": "cpu", "dtype": "float32", "engine": "torch"}
    with pytest.raises(InputError, match="files that d2llm did not make"):
        Index.create(tmp_path / "tiny.index", model, **settings)
    assert not (tmp_path / "tiny.index.student").exists()
    write_untrained(model, tmp_path / "tiny.index.student")
    with pytest.raises(InputError, match="files that d2llm did not make"):
        Index.create(tmp_path / "tiny.index", model, **settings)
    assert (tmp_path / "tiny.index.student" / "manifest.json").is_file()  # it was there before


def test_less_similar_texts_make_words_count_more(model, tmp_path):
    student = Student.load(write_untrained(model, tmp_path / "student"), device="cpu", dtype="float32")
    weight = student.feature_weights("asymmetric").terms["window_bm25_fraction"]
    assert 0 < weight < 0.7 * 20
    assert student.trained_tasks == ()
    assert student.config.backbone.query_prefix == "find the text: "
    assert student.config.backbone.max_passage_tokens == 20


def test_the_command_makes_a_student(model, tmp_path):
    model.save(str(tmp_path / "saved"))
    assert is_bi_encoder(tmp_path / "saved")
    succeed("export", tmp_path / "saved", "--to", "student", "--out", tmp_path / "student")
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    vectors = student.encode_passages(TEXTS).vectors / np.sqrt(32)
    np.testing.assert_allclose(vectors, model.encode_document(TEXTS, normalize_embeddings=True), atol=1e-5)
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())
    assert manifest["config"]["backbone"]["model"] == str((tmp_path / "saved").resolve())


def test_other_commands_say_how_to_make_a_student(model, tmp_path):
    model.save(str(tmp_path / "saved"))
    with pytest.raises(ModelNotFoundError, match=r"make a student of it with `d2llm export .*saved --to student"):
        Student.load(tmp_path / "saved")


def dense():
    from sentence_transformers.base.modules import Dense

    return Dense(32, 32)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"similarity": "dot"}, "scores by cosines, and this model does not"),
        ({"more": "dense"}, "it does more than to pool the states of a transformer"),
    ],
    ids=["dot", "dense"],
)
def test_other_models_are_refused(tmp_path, settings, problem):
    more = [dense()] if settings.pop("more", None) else []
    with pytest.raises(InputError, match=problem):
        Index.create(tmp_path / "tiny.index", make_model(tmp_path, more=more, **settings))
    assert not (tmp_path / "tiny.index").exists()
    assert not (tmp_path / "tiny.index.student").exists()


def test_a_student_that_the_library_can_load_stays_a_student(tmp_path):
    folder = write_trained_student(tmp_path)
    Student.load(folder, device="cpu", dtype="float32").save(tmp_path / "plain", merge=True)
    assert not is_bi_encoder(tmp_path / "plain")
    assert not is_bi_encoder("d2llm-minilm")
    assert not is_bi_encoder(Student.load(folder, device="cpu"))

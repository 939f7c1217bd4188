"""Instructions before queries: what reads them, and what sees the plain query."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.core.types import Passage
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from d2llm.ops.rereading import StudentError
from d2llm.retrieval.cosine import CosineStudent, DotStudent
from d2llm.retrieval.expansion import Expansion
from d2llm.retrieval.index import Index
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.settings import SearchSettings
from fake_models import FakeStudent, FakeTeacher, TokenStudent
from indexed_student import QUERIES, make_indexed
from rerankers import cascade, teacher_reading
from tiny_models import tiny_student_config, write_tiny_model

INSTRUCTION = "a book about ships:\n"
WORDS = "cat dog fish bird horse sleeps runs swims flies eats red green blue small large".split()  # noqa: SIM905
PASSAGES = [Passage(f"p{n:02d}", " ".join(np.random.default_rng(n).choice(WORDS, size=4))) for n in range(40)]
FAKE_QUERY, FAKE_INSTRUCTION = "small red bird", "green horse "


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A student with random weights, whose queries have the prefix "rain "."""
    return make_indexed(tmp_path_factory.mktemp("indexed"))


@pytest.fixture(scope="module", params=["bert", "llama"])
def with_tokens(request, tmp_path_factory):
    """A student with token embeddings, of which special tokens and white space have none."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tokens") / request.param, request.param)
    student = Student.create(tiny_student_config(folder, query_prefix="rain "), device="cpu", dtype="float32")
    tokenizer = student.backbone.tokenizer
    rarity = [float(bool(tokenizer.decode([token]).strip(" :<s>/\n"))) for token in range(len(tokenizer))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student.token_projection = TokenProjection(student.backbone.dim, 8, rarity, max_query_tokens=4)
    return student


@pytest.fixture(scope="module")
def fake_index(tmp_path_factory):
    index = Index.create(tmp_path_factory.mktemp("fake") / "i", FakeStudent(), vector_format="float32")
    index.upsert(PASSAGES)
    return index


def pairs(ranking):
    return [(result.passage.id, result.score) for result in ranking.passages]


def ids(ranking):
    return [result.passage.id for result in ranking.passages]


class TestVectors:
    def test_the_text_that_is_read_is_the_instruction_and_the_query(self, indexed):
        plain = Student.create(indexed.student.config, device="cpu", dtype="float32")
        plain.load_state_dict(indexed.student.state_dict())
        plain.backbone.config = plain.backbone.config.model_copy(update={"query_prefix": ""})
        expected = plain.encode_queries([INSTRUCTION + query for query in QUERIES])
        encoded = indexed.student.encode_queries(QUERIES, instruction=INSTRUCTION)
        np.testing.assert_allclose(encoded.vectors, expected.vectors, rtol=1e-5, atol=1e-5)
        assert encoded.lengths == expected.lengths
        assert np.abs(encoded.vectors - indexed.student.encode_queries(QUERIES).vectors).max() > 0.1

    def test_it_replaces_the_configured_prefix(self, indexed):
        student = indexed.student
        own = student.encode_queries(QUERIES).vectors
        np.testing.assert_array_equal(student.encode_queries(QUERIES, instruction="rain ").vectors, own)
        bare = student.backbone.tokenize(QUERIES, "query", prefix="").ids
        assert student.tokenize(QUERIES, "query", instruction="").ids == bare

    @pytest.mark.parametrize("wrap", [CosineStudent, DotStudent])
    def test_students_around_another_pass_it_on(self, indexed, wrap):
        vectors = wrap(indexed.student).encode_queries(QUERIES, instruction=INSTRUCTION).vectors
        own = indexed.student.encode_queries(QUERIES, instruction=INSTRUCTION).vectors
        cosines = np.sum(vectors * own, axis=1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(own, axis=1)
        np.testing.assert_allclose(cosines, 1, rtol=1e-5)

    def test_it_takes_room_from_the_query(self, indexed):
        student = indexed.student
        (query,) = student.backbone.tokenize([QUERIES[0]], "query", prefix="").lengths
        (both,) = student.backbone.tokenize([INSTRUCTION + QUERIES[0]], "query", prefix="").lengths
        assert query < both
        before = student.max_query_tokens
        try:
            for limit, cut in ((both, ()), (both - 1, (0,))):
                student.max_query_tokens = limit
                encoded = student.encode_queries(QUERIES[:1], instruction=INSTRUCTION)
                assert (encoded.truncated, encoded.lengths) == (cut, (limit,))
                ranking = indexed.index.search(QUERIES[0], instruction=INSTRUCTION)
                assert ranking.truncated == bool(cut)
            student.max_query_tokens = student.backbone.num_tokens(INSTRUCTION)
            with pytest.raises(InputError, match=r"the instruction has \d+ tokens, but the student reads only \d+ of"):
                indexed.index.search(QUERIES[0], instruction=INSTRUCTION)
        finally:
            student.max_query_tokens = before

    def test_invalid_uses_are_refused(self, indexed):
        student = indexed.student
        with pytest.raises(InputError, match="is not valid Unicode text"):
            student.encode_queries(QUERIES, instruction="\ud800 ")
        with pytest.raises(InputError, match="an instruction is put before queries"):
            student.tokenize(QUERIES, "passage", instruction=INSTRUCTION)


class TestVectorsOfTokens:
    def test_those_of_the_instruction_are_left_out(self, with_tokens):
        text = "bread and salt"
        student, tokenizer = with_tokens, with_tokens.backbone.tokenizer
        ids = tokenizer([INSTRUCTION + text])["input_ids"]
        own = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        closing = len(ids[0]) - 1 - len(tokenizer(INSTRUCTION, add_special_tokens=False)["input_ids"]) - own
        states, mask = student.backbone(*student.backbone.pad(ids))
        end = len(ids[0]) - closing
        kept = student.token_projection(states[0, end - own : end]).detach().numpy()
        encoded = student.encode_with_tokens([text], "query", instruction=INSTRUCTION)
        fraction = min(1.0, 4 / own)
        assert encoded.tokens.counts.tolist() == [min(4, own)]
        np.testing.assert_allclose(encoded.tokens.vectors, fraction * kept[:4], rtol=1e-4, atol=1e-4)
        pooled = student.pool(states, mask).detach().numpy()
        np.testing.assert_allclose(encoded.vectors, pooled, rtol=1e-4, atol=1e-4)

    def test_their_number_does_not_depend_on_the_instruction(self, with_tokens):
        texts = ["the cat", "snow", "?", "the cat sat on the mat and slept in the sun", ""]
        counts = {
            instruction: with_tokens.encode_with_tokens(texts, "query", instruction=instruction).tokens.counts.tolist()
            for instruction in ("", "rain: ", "she reads a book about stars: ", INSTRUCTION)
        }
        assert counts["rain: "] == counts["she reads a book about stars: "]  # the blank joins the first word
        assert counts[INSTRUCTION] == counts[""]
        assert counts["rain: "][-2:] == [4, 0]

    def test_a_configured_prefix_counts_as_it_was_trained(self, with_tokens):
        counts = with_tokens.encode_with_tokens(["?"], "query").tokens.counts.tolist()
        assert counts == with_tokens.encode_with_tokens(["rain ?"], "query", instruction="").tokens.counts.tolist()
        assert counts[0] > 0

    def test_a_query_that_is_cut_has_those_that_were_read(self, with_tokens, monkeypatch):
        room = with_tokens.backbone.num_tokens(INSTRUCTION) + 2
        monkeypatch.setattr(with_tokens, "max_query_tokens", room)
        encoded = with_tokens.encode_with_tokens(["bread and salt"], "query", instruction=INSTRUCTION)
        assert encoded.truncated == (0,)
        assert encoded.tokens.counts.tolist() == [2]

    def test_a_search_counts_the_querys_own(self, tmp_path):
        student = TokenStudent()
        index = Index.create(tmp_path / "i", student, vector_format="float32", token_vectors="float32")
        index.upsert(PASSAGES)
        score_features = {"maxsim": 5.0}
        plain = index.search(FAKE_QUERY, score_features=score_features, explain=True, top_k=40)
        ranking = index.search(
            FAKE_QUERY, score_features=score_features, explain=True, top_k=40, instruction=FAKE_INSTRUCTION
        )
        terms = [
            {result.passage.id: result.explanation.tokens for result in each.passages} for each in (plain, ranking)
        ]
        assert terms[0] == pytest.approx(terms[1])


class TestSearch:
    def test_passages_are_ranked_for_the_text_with_the_instruction(self, fake_index):
        ranking = fake_index.search(FAKE_QUERY, instruction=FAKE_INSTRUCTION, top_k=40)
        expected = fake_index.search(FAKE_INSTRUCTION + FAKE_QUERY, top_k=40)
        assert pairs(ranking) == pairs(expected)
        assert ranking.query.text == FAKE_QUERY
        assert ids(ranking) != ids(fake_index.search(FAKE_QUERY, top_k=40))

    def test_words_are_those_of_the_plain_query(self, fake_index):
        settings = {"score_features": {"bm25": 2.0}, "explain": True, "top_k": 40}
        plain = fake_index.search(FAKE_QUERY, **settings)
        ranking = fake_index.search(FAKE_QUERY, instruction=FAKE_INSTRUCTION, **settings)
        by_words = [
            {result.passage.id: (result.explanation.terms, result.explanation.lexical) for result in each.passages}
            for each in (plain, ranking)
        ]
        assert by_words[0] == by_words[1]
        assert {term for terms, _ in by_words[0].values() for term in terms} <= {"small", "red", "bird"}

    def test_a_fusion_takes_the_words_of_the_plain_query(self, fake_index):
        """With all weight on BM25, the vectors do not matter."""
        options = {"hybrid": 1.0, "sources": ("bm25",), "top_k": 40}
        plain = fake_index.search(FAKE_QUERY, **options)
        ranking = fake_index.search(FAKE_QUERY, instruction=FAKE_INSTRUCTION, **options)
        assert pairs(ranking) == pairs(plain)

    @pytest.mark.parametrize("reader", [cascade, teacher_reading])
    def test_a_teacher_reads_the_plain_query(self, fake_index, reader):
        teacher = FakeTeacher()
        if reader is cascade:
            rereader = cascade(teacher, StudentError(1.0, 0.0, 1.0), num_passages=5, min_gain=0.0)
        else:
            rereader = teacher_reading(teacher, 5)
        fake_index.search(FAKE_QUERY, instruction=FAKE_INSTRUCTION, rerank=rereader)
        assert {query for query, _ in teacher.pairs} == {FAKE_QUERY}

    def test_every_rephrasing_has_it(self, fake_index):
        writer = Writer("a little bird flies", "blue fish")
        options = {"top_k": 40, "num_candidates": 40}
        ranking = fake_index.search(
            FAKE_QUERY, instruction=FAKE_INSTRUCTION, expansion=Expansion(writer, expansions=2), **options
        )
        expected = fake_index.search(
            FAKE_INSTRUCTION + FAKE_QUERY,
            expansion=Expansion(Writer(*(FAKE_INSTRUCTION + text for text in writer.texts)), expansions=2),
            **options,
        )
        assert pairs(ranking) == pairs(expected)
        assert writer.read == {FAKE_QUERY}

    def test_a_hypothetical_passage_has_none(self, fake_index):
        writer, student = Writer("blue fish swims"), fake_index.student
        settings = {"expansion": Expansion(writer, "hyde"), "top_k": 40}
        ranking = fake_index.search(FAKE_QUERY, instruction=FAKE_INSTRUCTION, **settings)
        own = student.encode_queries([FAKE_INSTRUCTION + FAKE_QUERY]).vectors[0]
        mean = own + student.encode_passages(writer.texts).vectors[0]
        (expected,) = Searcher(fake_index.view, student, SearchSettings(top_k=40)).rank(
            [FAKE_QUERY], vectors=(mean * np.linalg.norm(own) / np.linalg.norm(mean))[None]
        )
        assert ids(ranking) == ids(expected)
        np.testing.assert_allclose([s for _, s in pairs(ranking)], [s for _, s in pairs(expected)], rtol=1e-5)
        assert writer.read == {FAKE_QUERY}

    def test_ids_and_contexts_follow_it(self, indexed):
        settings = SearchSettings(instruction=INSTRUCTION)
        (ranking,) = indexed.index.search(QUERIES[:1], settings)
        (by_id,) = Searcher(indexed.index.view, indexed.student, settings).rank_ids(QUERIES[:1])
        assert list(by_id.passages) == pairs(ranking)
        context = indexed.index.context(QUERIES[0], max_tokens=200, instruction=INSTRUCTION, near_duplicates=1.0)
        assert ids(context.ranking) == ids(ranking)

    def test_vectors_that_are_there_already_are_refused(self, indexed):
        searcher = Searcher(indexed.index.view, indexed.student, SearchSettings(instruction=INSTRUCTION))
        encoded = indexed.student.encode_queries(QUERIES)
        for rank in (
            lambda: searcher.rank(QUERIES, vectors=encoded.vectors),
            lambda: searcher.rank_ids(QUERIES, encoded=encoded),
        ):
            with pytest.raises(InputError, match="these queries are encoded already: encode them with the instruction"):
                rank()


class Writer:
    """Writes the same texts for every query, and records what it read."""

    fingerprint = "writer"

    def __init__(self, *texts):
        self.texts, self.read = texts, set()

    def write(self, assignments, *, advance=None):
        from d2llm.models.writers.writer import WrittenQueries

        self.read |= {assignment.passage for assignment in assignments}
        return [WrittenQueries(self.texts, 1, 1) for _ in assignments]

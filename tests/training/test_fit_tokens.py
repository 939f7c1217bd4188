"""Training the projection that makes token embeddings, on a real small backbone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2llm.core.errors import InputError, ModelError
from d2llm.core.types import Passage, Query, WholeText
from d2llm.data.beir import Dataset
from d2llm.models.fitted_part import Widths
from d2llm.models.score_features import ScoreFeatures, TaskFeatureWeights
from d2llm.models.sources import find_model, load_tokenizer
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection, skipped_tokens
from d2llm.models.tokens import StoredProjection
from d2llm.recipe import StudentConfig, TokensConfig
from d2llm.retrieval.index import Index
from d2llm.store.index_manifest import Chunking
from d2llm.training.dev_sets import dev_queries
from d2llm.training.fit_score_features import fit_score_features, make_feature_lists
from d2llm.training.fit_scores import fit_scores
from d2llm.training.fit_tokens import _choose, _Examples, _loss, fit_tokens, token_rarity

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
THINGS = ("house", "river", "tree", "lamp", "chair", "train", "cloud", "stone", "bridge", "letter", "horse", "ship")


@pytest.fixture(scope="module")
def dataset():
    """Which thing has which colour: a question shares its two words with one passage among many similar ones."""
    passages, queries, qrels = {}, {}, {"train": {}, "dev": {}}
    for number, (colour, thing) in enumerate((c, t) for c in COLOURS for t in THINGS):
        passages[f"p{number}"] = Passage(f"p{number}", f"In this place everyone knows the {colour} {thing}, for sure.")
        queries[f"q{number}"] = Query(f"q{number}", f"who knows a {thing} that is {colour}?")
        qrels["dev" if number % 3 == 0 else "train"][f"q{number}"] = {f"p{number}": 1}
    return Dataset("colours", Path("colours"), passages, queries, qrels)


@pytest.fixture(scope="module")
def trained(dataset):
    student = Student.create(StudentConfig(), device="cpu", dtype="float32")
    report = fit_tokens(student, [dataset], TokensConfig(dim=16, epochs=3, batch_queries=8), seed=1)
    return student, report


def weighted(student, weights):
    """Score features for questions with these weights."""
    task = TaskFeatureWeights(weights=weights, dev={}, num_queries={})
    return ScoreFeatures(tasks={"asymmetric": task})


def test_the_loss_falls_and_nothing_else_changes(trained, dataset):
    student, report = trained
    assert report.queries == {"colours": 64}
    assert report.losses[-1] < report.losses[0]
    assert report.token_dim == student.token_dim == 16
    assert report.fingerprint == student.token_fingerprint
    assert student.fingerprint == Student.create(StudentConfig(), device="cpu", dtype="float32").fingerprint
    again = Student.create(StudentConfig(), device="cpu", dtype="float32")
    fit_tokens(again, [dataset], TokensConfig(dim=16, epochs=3, batch_queries=8), seed=1)
    assert again.token_fingerprint == report.fingerprint


def test_tokens_come_from_the_reading_that_gives_the_vector(trained):
    student, _ = trained
    texts = ["The red house, really!", "?!", "", "a"]
    with_tokens = student.encode_with_tokens(texts, "passage")
    np.testing.assert_allclose(with_tokens.vectors, student.encode_passages(texts).vectors, rtol=1e-4, atol=1e-4)
    assert with_tokens.tokens.counts.tolist() == [4, 0, 0, 1]  # no vectors of punctuation and special tokens
    np.testing.assert_allclose(np.linalg.norm(with_tokens.tokens.vectors, axis=1), 4, rtol=1e-5)
    alone = student.encode_with_tokens(texts[:1], "passage").tokens.vectors
    np.testing.assert_allclose(with_tokens.tokens.vectors[:4], alone, rtol=1e-4, atol=1e-4)


def test_tokens_of_late_chunks_have_seen_the_whole_text(trained, tmp_path):
    student, _ = trained
    text = "The red house stands there. It was sold in May, and nobody has seen it since."
    (whole,) = student.encode_with_tokens([text], "passage").tokens.split()
    encoded = student.encode_chunks([(WholeText(text), [(0, len(text)), (0, 27), (28, len(text))])], with_tokens=True)
    complete, first, second = encoded.tokens.split()
    np.testing.assert_allclose(complete, whole, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=1e-4)  # in the context of the whole text
    (alone,) = student.encode_with_tokens([text[28:]], "passage").tokens.split()
    assert np.abs(second - alone).max() > 0.1
    assert student.encode_chunks([(WholeText(text), [(0, 5)])]).tokens is None
    index = Index.create(tmp_path / "late", student, token_vectors="int8")
    index.upsert_documents([Passage("d", f"{text} " * 4), Passage("short", "Red.")], Chunking(32, late=True))
    counts = index.unsharded_view.tokens.counts(index.view.live_rows())
    assert len(counts) > 2
    assert counts.min() > 0
    assert index.verify().problems == []


def test_of_a_long_query_only_the_rarest_tokens_count():
    projection = TokenProjection(4, 2, [0.0, 1.0, 3.0, 0.5, 3.0], max_query_tokens=3)
    ids = [0, 3, 2, 0, 1, 4, 2]
    assert projection.positions(ids) == [1, 2, 4, 5, 6]
    assert projection.query_positions(ids) == [2, 5, 6]
    assert projection.query_positions([1, 0, 1, 3, 1, 1]) == [0, 2, 4]  # of equal tokens the first
    assert projection.query_positions([0]) == []
    assert [projection.query_fraction(each) for each in (ids, [1, 2, 3, 0], [])] == [0.6, 1.0, 1.0]


def test_a_token_is_rare_if_few_passages_have_it(trained, dataset):
    student, _ = trained
    rarity = student.token_projection.rarity
    assert token_rarity(student, [dataset]) == pytest.approx(rarity.tolist())
    everywhere, colour, unknown, punctuation = student.backbone.tokenizer.convert_tokens_to_ids(
        ["knows", "red", "zebra", "!"]
    )
    assert rarity[everywhere] == pytest.approx(0.01)
    assert rarity[colour] == pytest.approx(np.log(97 / 12.5))
    assert rarity[unknown] == rarity.max() == pytest.approx(np.log(97 / 0.5))
    assert rarity[punctuation] == 0


def test_a_long_query_has_vectors_of_its_rarest_tokens(trained):
    student, _ = trained
    text = "everyone knows " * 10 + "the zebra, " + "everyone knows " * 10
    counts = student.encode_with_tokens([text, "", "?", "zebra"], "query").tokens.counts
    assert counts.tolist() == [16, 0, 0, 1]
    ids = student.tokenize([text], "query").ids[0]
    kept = student.backbone.tokenizer.decode([ids[index] for index in student.token_projection.query_positions(ids)])
    assert kept == "everyone knows " * 7 + "everyone zebra"  # no passage has zebra, all have the others
    (first,) = student.encode_with_tokens([text], "query").tokens.split()
    (whole,) = student.encode_with_tokens([text], "passage").tokens.split()
    fraction = 16 / 42  # the other tokens count as cosines of 0
    assert all(np.abs(whole - row / fraction).max(axis=1).min() < 1e-3 for row in first)  # as a passage would have them


def test_the_lists_of_the_fit_have_the_score_of_an_index(trained, dataset, tmp_path):
    student, _ = trained
    lists = make_feature_lists(student, dataset, "asymmetric", terms=("bm25", "maxsim"), num_queries=4)
    student.score_features = weighted(student, {"bm25": 0.5, "maxsim": 30.0})
    index = Index.create(tmp_path / "index", student, vector_format="float32")
    index.upsert(dataset.passages.values())
    queries = dev_queries(dataset, num_queries=4, seed=0)
    for query, (scores, _) in zip(queries, lists.lists, strict=True):
        summed = scores @ np.array([1, 0.5, 30.0])
        (ranking,) = index.search([query], top_k=1)
        assert summed.max() == pytest.approx(ranking.passages[0].score, abs=0.01)


def test_tokens_are_saved_and_searched(trained, dataset, tmp_path):
    student, report = trained
    student.score_features = weighted(student, {"maxsim": 30.0})
    student.save(tmp_path / "student")
    loaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    assert loaded.token_fingerprint == report.fingerprint
    index = Index.create(tmp_path / "index", loaded)
    index.upsert(dataset.passages.values())
    assert index.stats().token_format == "int4"
    rankings = index.search([dataset.queries[f"q{n}"] for n in range(0, 96, 3)], top_k=1)
    assert sum(r.passages[0].passage.id[1:] == r.query.id[1:] for r in rankings) > 25
    (exact,) = index.search([dataset.queries["q3"]], exact=True, top_k=5)
    (usual,) = index.search([dataset.queries["q3"]], top_k=5)
    assert [p.passage.id for p in exact.passages] == [p.passage.id for p in usual.passages]
    assert exact.certificate.proved == 5


def test_training_can_continue_from_a_projection(trained, dataset):
    student, report = trained
    start = student.token_projection
    other = Student.create(StudentConfig(), device="cpu", dtype="float32")
    continued = fit_tokens(other, [dataset], TokensConfig(epochs=1, batch_queries=8), start=start)
    assert continued.token_dim == 16
    assert continued.losses[0] < report.losses[0]
    assert student.token_fingerprint == report.fingerprint  # the start is unchanged


def test_training_a_student_forgets_its_tokens(trained, dataset):
    student = Student.create(StudentConfig(), device="cpu", dtype="float32")
    student.token_projection = trained[0].token_projection
    student.prepare_training()
    assert student.token_projection is None
    with pytest.raises(InputError, match="fit-tokens"):
        student.encode_with_tokens(["a"], "query")
    with pytest.raises(InputError, match="train them first"):
        fit_scores(student, [dataset], "asymmetric", token_vectors=True)
    with pytest.raises(InputError, match="no token embeddings"):
        fit_score_features(student, [(dataset, "asymmetric")], terms=("maxsim",))


def test_what_cannot_be_trained_is_refused(dataset):
    student = Student.create(StudentConfig(), device="cpu", dtype="float32")
    untrained = Dataset("none", Path("none"), dataset.passages, dataset.queries, {"dev": dataset.qrels["dev"]})
    with pytest.raises(InputError, match="none: token embeddings are trained on judged queries of a train split"):
        fit_tokens(student, [untrained])


def test_queries_that_share_passages_with_other_splits_are_left_out(dataset):
    shared = {"train": dataset.qrels["train"], "test": {"q3": {"p1": 1, "p2": 1}}}
    overlapping = Dataset("shared", Path("shared"), dataset.passages, dataset.queries, shared)
    config = TokensConfig(dim=4, epochs=1)
    assert set(_choose(overlapping, None, config, 0)) == dataset.qrels["train"].keys() - {"q1", "q2"}
    assert set(_choose(overlapping, {"shared": ["q1", "q4", "q3"]}, config, 0)) == {"q1", "q4"}
    only = Dataset(
        "only", Path("only"), dataset.passages, dataset.queries, {"train": {"q1": {"p1": 1}}, "dev": {"q2": {"p1": 1}}}
    )
    with pytest.raises(InputError, match="only: no train query is left"):
        _choose(only, None, config, 0)
    with pytest.raises(InputError, match="give at least one"):
        fit_tokens(Student.create(StudentConfig(), device="cpu", dtype="float32"), [])


def test_other_relevant_passages_of_a_batch_are_no_negatives():
    """Two queries of one intent: the target of each is also relevant to the other."""
    projection = TokenProjection(4, 4, [1.0])
    projection.weight.data = torch.eye(4)
    states = [torch.eye(4)[:1], torch.eye(4)[1:2]]
    alike = _Examples("a", states, states, [[0], [1]], [[0, 1], [0, 1]], [[], []])
    apart = _Examples("a", states, states, [[0], [1]], [[0], [1]], [[], []])
    arguments = torch.zeros(()), [0, 1], TokensConfig(), random.Random(0)
    losses = [float(_loss(projection, arguments[0], examples, *arguments[1:])) for examples in (alike, apart)]
    assert losses[0] == 0  # nothing is left to tell them from
    assert losses[1] > 0.3


def test_new_tokens_are_not_counted_with_the_weights_of_others(dataset):
    student = Student.create(StudentConfig(), device="cpu", dtype="float32")
    words = TaskFeatureWeights(weights={"bm25": 1.0}, dev={}, num_queries={})
    counted = TaskFeatureWeights(weights={"maxsim": 3.0}, dev={}, num_queries={}, without_parts=words)
    alone = TaskFeatureWeights(weights={"maxsim": 3.0}, dev={}, num_queries={})
    student.score_features = ScoreFeatures(tasks={"asymmetric": counted, "symmetric": alone})
    fit_tokens(student, [dataset], TokensConfig(dim=4, epochs=1))
    assert student.feature_weights("asymmetric").terms == {"bm25": 1.0}
    assert not student.feature_weights("symmetric")


def test_a_projection_of_another_student_or_damaged_is_refused(trained, tmp_path):
    student, _ = trained
    student.token_projection.write(tmp_path, "someone-else")
    with pytest.raises(ModelError, match="trained for the student someone-else, but this one is mine; restore"):
        TokenProjection.read(tmp_path, "mine", Widths(0, 384))
    with pytest.raises(ModelError, match="does not fit a student whose states have 100 dimensions"):
        TokenProjection.read(tmp_path, "someone-else", Widths(0, 100))
    save_file(
        load_file(tmp_path / TokenProjection.file_name),
        tmp_path / TokenProjection.file_name,
        metadata={"student": "mine"},
    )
    with pytest.raises(ModelError, match="does not say how many tokens of a query count"):
        TokenProjection.read(tmp_path, "mine", Widths(0, 384))
    (tmp_path / "tokens.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"tokens.safetensors cannot be read"):
        TokenProjection.read(tmp_path, "mine", Widths(0, 384))
    assert TokenProjection.read(tmp_path / "elsewhere", "mine", Widths(0, 384)) is None


def test_weights_follow_what_an_index_stores():
    words = TaskFeatureWeights(weights={"bm25": 1.0}, dev={}, num_queries={})
    tokens = TaskFeatureWeights(weights={"bm25": 2.0, "maxsim": 3.0}, dev={}, num_queries={}, without_parts=words)
    every = TaskFeatureWeights(
        weights={"maxsim": 4.0, "window_vectors": 5.0}, dev={}, num_queries={}, without_parts=tokens
    )
    score_features = ScoreFeatures(tasks={"asymmetric": every})
    assert score_features.weights("asymmetric").terms == {"maxsim": 4.0, "window_vectors": 5.0}
    assert score_features.weights("asymmetric", stored=("token",)).terms == {"bm25": 2.0, "maxsim": 3.0}
    assert score_features.weights("asymmetric", stored=("window",)).terms == {"bm25": 1.0}
    assert score_features.weights("asymmetric", stored=()).terms == {"bm25": 1.0}


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_tokens_without_a_letter_or_digit_are_skipped(model):
    tokenizer = load_tokenizer(find_model(model))
    skipped = set(skipped_tokens(tokenizer))
    ids = tokenizer("Is it (really) 2°C – or 35.6°F? Ångström; 温度!\n\n", add_special_tokens=True)["input_ids"]
    kept = tokenizer.decode([token_id for token_id in ids if token_id not in skipped])
    assert not set(kept) & set("()–?;!\n.")
    assert all(word in kept.lower() for word in ("is", "really", "35", "6"))
    assert set(tokenizer.all_special_ids) <= skipped


def test_the_fingerprint_is_hashed_once_for_the_same_weights(monkeypatch):
    """Every search compares it with the index's, so it must not cost one a hash of all weights."""
    hashed = []
    real = StoredProjection.__init__
    monkeypatch.setattr(StoredProjection, "__init__", lambda self, *args: (hashed.append(1), real(self, *args))[1])
    projection = TokenProjection(8, 4, [1.0, 2.0, 3.0])
    before = projection.fingerprint
    assert projection.fingerprint == before
    assert len(hashed) == 1
    kept = {name: tensor.clone() for name, tensor in projection.state_dict().items()}
    with torch.no_grad():
        projection.weight.mul_(2)
    changed = projection.fingerprint
    with torch.no_grad():
        projection.rarity[1] = 5
    assert len({before, changed, projection.fingerprint}) == 3
    projection.load_state_dict(kept)
    assert projection.fingerprint == before
    projection.weight = torch.nn.Parameter(projection.weight.detach() + 1)
    assert projection.fingerprint != before
    assert len(hashed) == 5

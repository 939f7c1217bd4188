"""A bi-encoder as a teacher: the student's own scores, each text encoded once, identity known without loading."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import ModelNotFoundError
from d2llm.models.student import Student
from d2llm.models.teachers import cosine as cosine_teacher
from d2llm.models.teachers.cosine import CosineTeacher
from d2llm.models.teachers.pair_teacher import PairTeacher, identify_teacher, load_teacher
from d2llm.recipe import TeacherConfig
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

PAIRS = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[1]), (TEXTS[0], TEXTS[3]), (TEXTS[0], TEXTS[1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cosine")
    student = Student.create(
        tiny_student_config(write_tiny_model(root / "bert", "bert"), tuning="frozen"), dtype="float32"
    )
    randomise(student.interaction)
    student.save(root / "student")
    return root


def config(model):
    return TeacherConfig(model=str(model), kind="cosine")


def load(model):
    return CosineTeacher.load(config(model), device="cpu", dtype="float32")


def record_encoded(teacher, monkeypatch):
    """A list that collects the texts encoded from now on."""
    encoded = []
    for name in ("encode_queries", "encode_passages"):
        original = getattr(teacher.student, name)
        monkeypatch.setattr(
            teacher.student,
            name,
            lambda texts, original=original, name=name: (encoded.append((name, texts)), original(texts))[1],
        )
    return encoded


@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
def test_log_odds_are_the_students_logits(folder, task):
    teacher = load(folder / "student")
    finished = []
    scores = teacher.score_pairs(PAIRS, task, with_features=True, advance=finished.append)
    student = Student.load(folder / "student", device="cpu", dtype="float32")
    for (query, passage), value in zip(PAIRS, scores.log_odds, strict=True):
        vectors = student.encode_queries([query]).vectors[0], student.encode_passages([passage]).vectors
        assert value == pytest.approx(float(student.score(*vectors, task)[0]), abs=1e-4)
    assert scores.features is None
    assert sum(finished) == len(PAIRS)
    assert len(set(scores.log_odds.round(4).tolist())) == 3


def test_the_tasks_differ_in_scores_and_fingerprints(folder):
    teacher = load(folder / "student")
    scores = [teacher.score_pairs(PAIRS, task).log_odds for task in ("asymmetric", "symmetric")]
    assert np.abs(scores[0] - scores[1]).max() > 0.01
    assert teacher.prompt_fingerprint("asymmetric") != teacher.prompt_fingerprint("symmetric")


def test_a_backbone_scores_twenty_times_the_cosine(folder):
    teacher = load(folder / "bert")
    value = float(teacher.score_pairs(PAIRS[:1], "asymmetric").log_odds[0])
    backbone = teacher.student.backbone
    states = []
    for text, kind in zip(PAIRS[0], ("query", "passage"), strict=True):
        tokens, mask = backbone.pad(backbone.tokenize([text], kind).ids)
        states.append(backbone.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[mask].mean(0))
    a, b = (state.detach().double().numpy() for state in states)
    assert value == pytest.approx(20 * a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-3)


def test_each_text_is_encoded_once_and_cached(folder, monkeypatch):
    teacher = load(folder / "student")
    encoded = record_encoded(teacher, monkeypatch)
    first = teacher.score_pairs(PAIRS, "asymmetric")
    assert encoded == [("encode_queries", [TEXTS[0], TEXTS[2]]), ("encode_passages", [TEXTS[1], TEXTS[3]])]
    second = teacher.score_pairs([*PAIRS, (TEXTS[1], TEXTS[3])], "asymmetric")
    # TEXTS[1] was encoded as a passage only, so as a query it is new.
    assert encoded[2:] == [("encode_queries", [TEXTS[1]])]
    assert (second.log_odds[: len(PAIRS)] == first.log_odds).all()
    lengths = teacher.student.tokenize([TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[3], TEXTS[1]], "query").lengths
    assert (first.num_tokens, second.num_tokens) == (sum(lengths[:4]), lengths[4])


def test_the_cache_keeps_the_most_recently_used_texts(folder, monkeypatch):
    monkeypatch.setattr(cosine_teacher, "_CACHED_NUMBERS", 2 * 32)
    teacher = load(folder / "student")
    encoded = record_encoded(teacher, monkeypatch)
    for passages in ([TEXTS[0], TEXTS[1]], [TEXTS[0]], [TEXTS[2]], [TEXTS[0], TEXTS[1]], TEXTS[:5]):
        teacher.score_pairs([("q", passage) for passage in passages], "asymmetric")
    encoded_passages = [texts for name, texts in encoded if name == "encode_passages"]
    # The third call drops TEXTS[1], the least recently used; the last call exceeds the cache and still works.
    assert encoded_passages == [[TEXTS[0], TEXTS[1]], [TEXTS[2]], [TEXTS[1]], TEXTS[2:5]]


def test_truncated_pairs_are_counted_on_cache_hits_too(folder):
    teacher = load(folder / "student")
    long = " ".join(TEXTS)
    pairs = [(TEXTS[0], long), (TEXTS[0], TEXTS[1]), (long, long)]
    assert [teacher.score_pairs(pairs, "asymmetric").num_truncated for _ in range(2)] == [2, 2]
    assert teacher.score_pairs(pairs[1:2], "asymmetric").num_truncated == 0


def test_a_text_exactly_at_the_limit_is_not_truncated(folder):
    teacher = load(folder / "student")
    limit = teacher.student.config.backbone.max_passage_tokens
    words = " ".join(TEXTS).split()
    fits = next(
        text
        for text in (" ".join(words[:n]) + "z" * m for n in range(len(words), 0, -1) for m in range(9))
        if (tokens := teacher.student.tokenize([text], "passage")).lengths == [limit] and not tokens.num_truncated
    )
    assert teacher.score_pairs([("q", fits), ("q", " ".join(TEXTS))], "asymmetric").num_truncated == 1


@pytest.mark.parametrize("name", ["student", "bert"])
def test_identity_is_known_without_loading(folder, name):
    teacher = load_teacher(config(folder / name), device="cpu", dtype="float32")
    identity = identify_teacher(config(folder / name))
    assert isinstance(teacher, CosineTeacher)
    assert isinstance(teacher, PairTeacher)
    assert identity.fingerprint == teacher.fingerprint
    assert identity.prompts == {task: teacher.prompt_fingerprint(task) for task in ("asymmetric", "symmetric")}


def test_different_weights_have_different_fingerprints(folder, tmp_path):
    other = write_tiny_model(tmp_path / "other", "bert", seed=1)
    fingerprints = {
        identify_teacher(config(model)).fingerprint for model in (folder / "student", folder / "bert", other)
    }
    assert len(fingerprints) == 3


def test_a_missing_model_is_reported(tmp_path):
    with pytest.raises(ModelNotFoundError):
        CosineTeacher.load(config(tmp_path / "nothing"))

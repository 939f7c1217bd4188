"""A bi-encoder as a teacher: the same scores as the student's, each text encoded once, an identity without weights."""

from __future__ import annotations

import numpy as np
import pytest

from d2llm.core.errors import ModelNotFoundError
from d2llm.core.recipe import TeacherConfig
from d2llm.models.student import Student
from d2llm.models.teachers import cosine as cosine_teacher
from d2llm.models.teachers.cosine import CosineTeacher
from d2llm.models.teachers.judge import Judge, identify_judge, load_judge
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

PAIRS = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[1]), (TEXTS[0], TEXTS[3]), (TEXTS[0], TEXTS[1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("cosine")
    student = Student.create(
        tiny_student_config(write_tiny_model(place / "bert", "bert"), tuning="frozen"), dtype="float32"
    )
    randomise(student.interaction)
    student.save(place / "student")
    return place


def config(model):
    return TeacherConfig(model=str(model), kind="cosine")


def load(model):
    return CosineTeacher.load(config(model), device="cpu", dtype="float32")


def count_encoded(teacher, monkeypatch):
    """The texts that are encoded from here on."""
    encoded = []
    for name in ("encode_queries", "encode_passages"):
        plain = getattr(teacher.student, name)
        monkeypatch.setattr(
            teacher.student,
            name,
            lambda texts, plain=plain, name=name: (encoded.append((name, texts)), plain(texts))[1],
        )
    return encoded


@pytest.mark.parametrize("task", ["asymmetric", "symmetric"])
def test_log_odds_are_the_students_own_logits(folder, task):
    teacher = load(folder / "student")
    finished = []
    judged = teacher.judge(PAIRS, task, with_features=True, advance=finished.append)
    student = Student.load(folder / "student", device="cpu", dtype="float32")
    for (query, passage), value in zip(PAIRS, judged.log_odds, strict=True):
        vectors = student.encode_queries([query]).vectors[0], student.encode_passages([passage]).vectors
        assert value == pytest.approx(float(student.score(*vectors, task)[0]), abs=1e-4)
    assert judged.features is None
    assert sum(finished) == len(PAIRS)
    assert len(set(judged.log_odds.round(4).tolist())) == 3


def test_the_two_tasks_are_told_apart(folder):
    teacher = load(folder / "student")
    scores = [teacher.judge(PAIRS, task).log_odds for task in ("asymmetric", "symmetric")]
    assert np.abs(scores[0] - scores[1]).max() > 0.01
    assert teacher.prompt_fingerprint("asymmetric") != teacher.prompt_fingerprint("symmetric")


def test_a_backbone_scores_by_twenty_times_its_cosine(folder):
    teacher = load(folder / "bert")
    value = float(teacher.judge(PAIRS[:1], "asymmetric").log_odds[0])
    backbone = teacher.student.backbone
    states = []
    for text, kind in zip(PAIRS[0], ("query", "passage"), strict=True):
        tokens, mask = backbone.pad(backbone.tokenize([text], kind).ids)
        states.append(backbone.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[mask].mean(0))
    a, b = (state.detach().double().numpy() for state in states)
    assert value == pytest.approx(20 * a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-3)


def test_each_text_is_encoded_once_and_kept(folder, monkeypatch):
    teacher = load(folder / "student")
    encoded = count_encoded(teacher, monkeypatch)
    first = teacher.judge(PAIRS, "asymmetric")
    assert encoded == [("encode_queries", [TEXTS[0], TEXTS[2]]), ("encode_passages", [TEXTS[1], TEXTS[3]])]
    again = teacher.judge([*PAIRS, (TEXTS[1], TEXTS[3])], "asymmetric")
    # A passage's vector is not a query's, so TEXTS[1] as a query is new.
    assert encoded[2:] == [("encode_queries", [TEXTS[1]])]
    assert (again.log_odds[: len(PAIRS)] == first.log_odds).all()
    lengths = teacher.student.tokenize([TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[3], TEXTS[1]], "query").lengths
    assert (first.num_tokens, again.num_tokens) == (sum(lengths[:4]), lengths[4])


def test_the_texts_used_last_are_kept(folder, monkeypatch):
    monkeypatch.setattr(cosine_teacher, "_CACHED_NUMBERS", 2 * 32)
    teacher = load(folder / "student")
    encoded = count_encoded(teacher, monkeypatch)
    for passages in ([TEXTS[0], TEXTS[1]], [TEXTS[0]], [TEXTS[2]], [TEXTS[0], TEXTS[1]], TEXTS[:5]):
        teacher.judge([("q", passage) for passage in passages], "asymmetric")
    found = [texts for name, texts in encoded if name == "encode_passages"]
    # The third call drops TEXTS[1], used longest ago; the last one is more than what is kept, and works all the same.
    assert found == [[TEXTS[0], TEXTS[1]], [TEXTS[2]], [TEXTS[1]], TEXTS[2:5]]


def test_cut_pairs_are_counted_again_when_the_vector_is_kept(folder):
    teacher = load(folder / "student")
    long = " ".join(TEXTS)
    pairs = [(TEXTS[0], long), (TEXTS[0], TEXTS[1]), (long, long)]
    assert [teacher.judge(pairs, "asymmetric").num_truncated for _ in range(2)] == [2, 2]
    assert teacher.judge(pairs[1:2], "asymmetric").num_truncated == 0


def test_a_text_of_just_the_limit_is_not_cut(folder):
    teacher = load(folder / "student")
    limit = teacher.student.config.backbone.max_passage_tokens
    words = " ".join(TEXTS).split()
    fits = next(
        text
        for text in (" ".join(words[:n]) + "z" * m for n in range(len(words), 0, -1) for m in range(9))
        if (found := teacher.student.tokenize([text], "passage")).lengths == [limit] and not found.num_truncated
    )
    assert teacher.judge([("q", fits), ("q", " ".join(TEXTS))], "asymmetric").num_truncated == 1


@pytest.mark.parametrize("name", ["student", "bert"])
def test_its_identity_is_known_without_loading(folder, name):
    judge = load_judge(config(folder / name), device="cpu", dtype="float32")
    identity = identify_judge(config(folder / name))
    assert isinstance(judge, CosineTeacher)
    assert isinstance(judge, Judge)
    assert identity.fingerprint == judge.fingerprint
    assert identity.prompts == {task: judge.prompt_fingerprint(task) for task in ("asymmetric", "symmetric")}


def test_other_weights_are_another_teacher(folder, tmp_path):
    other = write_tiny_model(tmp_path / "other", "bert", seed=1)
    fingerprints = {identify_judge(config(model)).fingerprint for model in (folder / "student", folder / "bert", other)}
    assert len(fingerprints) == 3


def test_no_such_model(tmp_path):
    with pytest.raises(ModelNotFoundError):
        CosineTeacher.load(config(tmp_path / "nothing"))

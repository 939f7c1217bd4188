"""Several teachers combined into one: the formula, which members score, the saved folder, and what invalidates it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, InputError, MismatchError, ModelError
from d2llm.models.student import Student
from d2llm.models.teachers.ensemble import EnsembleMember, EnsembleTeacher, ensemble_queries, write_ensemble
from d2llm.models.teachers.pair_teacher import PairTeacher, TeacherScores, identify_teacher, load_teacher
from d2llm.ops.ensemble import Ensemble
from d2llm.recipe import TeacherConfig
from list_endpoint import KINDS, counts_words
from local_endpoint import Reply, local_endpoint
from tiny_models import TEXTS, tiny_student_config, tiny_teacher_config, write_tiny_model

PAIRS = [("a", "b"), ("c", "d"), ("e", "f")]
TASK = "asymmetric"


class Member:
    """Returns fixed log-odds, and on request its features, if it has any."""

    def __init__(self, name, log_odds, *, features=None):
        self.fingerprint = name
        self.log_odds = np.array(log_odds, np.float32)
        self.features = features
        self.asked = []

    def prompt_fingerprint(self, task):
        return f"{self.fingerprint}-{task}"

    def score_pairs(self, pairs, task, *, with_features=False, advance=None):
        self.asked.append(with_features)
        for _ in pairs:
            if advance is not None:
                advance(1)
        features = None if self.features is None or not with_features else np.array(self.features, np.float32)
        return TeacherScores(self.log_odds, features, 1, 10, 2, 3)


def ensemble(weights, bias=0.5, means=(1.0, -1.0), scales=(2.0, 4.0)):
    return Ensemble(means, scales, weights, bias)


def test_log_odds_by_hand():
    teacher = EnsembleTeacher([Member("x", [1, 3, 5]), Member("y", [-1, 3, -5])], {TASK: ensemble((1.0, 2.0))})
    # standard scores: 0, 1, 2 and 0, 1, -1
    finished = []
    scores = teacher.score_pairs(PAIRS, TASK, advance=finished.append)
    assert scores.log_odds.tolist() == [0.5, 3.5, 0.5]
    assert scores.log_odds.dtype == np.float32
    assert (scores.num_truncated, scores.num_tokens, scores.num_bounded, scores.num_undecided) == (1, 20, 4, 6)
    assert sum(finished) == len(PAIRS)
    assert isinstance(teacher, PairTeacher)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_first", [True, False])
def test_an_error_of_a_member_keeps_what_all_have_judged(kind, is_first):
    class Counting(Member):
        def score_pairs(self, pairs, task, *, with_features=False, advance=None):
            self.asked += pairs
            return TeacherScores(np.array([len(text) for _, text in pairs], np.float32), None, 0, 0)

    def until_the_key_expires(request, number):
        return counts_words(request, number) if number < 2 else Reply({"error": "expired"}, status=403)

    pairs = [(f"cats {n}", text) for n in range(4) for text in ("cats sleep", f"{n} dogs and cats")]
    with local_endpoint(until_the_key_expires) as endpoint:
        config = {"kind": kind, "model": "served", "remote": {"url": endpoint.url, "concurrency": 1}}
        remote = load_teacher(TeacherConfig.model_validate(config))  # the first request
        plain = Counting("x", [])
        members = [remote, plain] if is_first else [plain, remote]
        teacher = EnsembleTeacher(members, {TASK: ensemble((1.0, 1.0))})
        partly = teacher.score_until_error(pairs, TASK)
        with pytest.raises(ModelError, match="expired"):
            partly.require_all()
    assert partly.is_scored.tolist() == [True] * 2 + [False] * 6
    assert plain.asked == (pairs[:2] if is_first else pairs)
    assert len(endpoint.requests) == 3
    with local_endpoint(counts_words) as endpoint:
        whole = load_teacher(TeacherConfig.model_validate(config | {"remote": {"url": endpoint.url}}))
        members = [whole, plain] if is_first else [plain, whole]
        expected = EnsembleTeacher(members, teacher.ensembles).score_pairs(pairs, TASK)
    assert partly.scores.log_odds[:2].tolist() == pytest.approx(expected.log_odds[:2].tolist())


def test_a_member_without_weight_does_not_judge():
    members = [Member("x", [1, 3, 5]), Member("y", [-1, 3, -5])]
    teacher = EnsembleTeacher(members, {TASK: ensemble((0.0, 2.0)), "symmetric": ensemble((1.0, 0.0))})
    assert teacher.score_pairs(PAIRS, TASK).log_odds.tolist() == [0.5, 2.5, -1.5]
    assert [len(member.asked) for member in members] == [0, 1]
    assert teacher.score_pairs(PAIRS, "symmetric").log_odds.tolist() == [0.5, 1.5, 2.5]
    assert [len(member.asked) for member in members] == [1, 1]


def test_features_come_from_the_first_member_that_has_any():
    features = [[1.0, 0.0]] * 3
    members = [
        Member("x", [0, 0, 0]),
        Member("y", [0, 0, 0], features=features),
        Member("z", [0, 0, 0], features=[[9.0]]),
    ]
    weights = Ensemble((0.0,) * 3, (1.0,) * 3, (1.0,) * 3, 0.0)
    teacher = EnsembleTeacher(members, {TASK: weights})
    assert teacher.score_pairs(PAIRS, TASK, with_features=True).features.tolist() == features
    assert [member.asked for member in members] == [[True], [True], [False]]
    assert teacher.score_pairs(PAIRS, TASK).features is None
    assert (
        EnsembleTeacher(members[:1], {TASK: weights.only([0])}).score_pairs(PAIRS, TASK, with_features=True).features
        is None
    )


def test_a_task_that_was_not_fitted_is_refused():
    teacher = EnsembleTeacher(
        [Member("x", [1, 3, 5])], {TASK: Ensemble((0.0,), (1.0,), (1.0,), 0.0)}, name="runs/ensemble"
    )
    for call in (lambda: teacher.score_pairs(PAIRS, "symmetric"), lambda: teacher.prompt_fingerprint("symmetric")):
        with pytest.raises(InputError, match=r"runs/ensemble: was fitted for asymmetric .* for symmetric"):
            call()


def test_the_fingerprint_depends_on_members_and_weights():
    plain = {TASK: ensemble((1.0, 2.0))}
    x, y = Member("x", [0]), Member("y", [0])
    fingerprints = {
        EnsembleTeacher([x, y], plain).fingerprint,
        EnsembleTeacher([y, x], plain).fingerprint,
        EnsembleTeacher([x, y], {TASK: ensemble((1.0, 2.1))}).fingerprint,
        EnsembleTeacher([x, y], {TASK: ensemble((1.0, 2.0), bias=0.6)}).fingerprint,
        EnsembleTeacher([x, y], {"symmetric": ensemble((1.0, 2.0))}).fingerprint,
    }
    assert len(fingerprints) == 5
    assert EnsembleTeacher([x, y], dict(plain)).fingerprint in fingerprints


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with a decoder, a student, and an ensemble of both plus a member that no task needs."""
    folder = tmp_path_factory.mktemp("ensemble") / "run"
    write_tiny_model(folder / "llama", "llama")
    encoder = write_tiny_model(folder.parent / "bert", "bert")
    Student.create(tiny_student_config(encoder, tuning="frozen"), dtype="float32").save(folder / "student")
    configs = [
        tiny_teacher_config(folder / "llama"),
        TeacherConfig(model="no-such-model"),
        TeacherConfig(model=str(folder / "student"), kind="cosine"),
    ]
    fingerprints = [identify_teacher(configs[0]).fingerprint, "useless", identify_teacher(configs[2]).fingerprint]
    write_ensemble(
        folder / "ensemble",
        [EnsembleMember(*member) for member in zip(configs, fingerprints, strict=True)],
        {TASK: Ensemble((0.5, 7.0, 10.0), (2.0, 1.0, 5.0), (1.5, 0.0, 0.25), -2.0)},
        {"fitted_on": {"tiny": {"task": TASK, "dev_queries": ["q1", "q2"]}}},
    )
    return folder


def load(folder):
    return load_teacher(TeacherConfig(model=str(folder)), device="cpu", dtype="float32")


def test_a_saved_ensemble_loads_unchanged(run_folder):
    teacher = load(run_folder / "ensemble")
    assert isinstance(teacher, EnsembleTeacher)
    assert [type(member).__name__ for member in teacher.members] == ["CausalTeacher", "CosineTeacher"]
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    llm, cosine = (member.score_pairs(pairs, TASK).log_odds.astype(np.float64) for member in teacher.members)
    scores = teacher.score_pairs(pairs, TASK, with_features=True)
    assert scores.log_odds == pytest.approx(-2 + 1.5 * (llm - 0.5) / 2 + 0.25 * (cosine - 10) / 5, abs=1e-4)
    assert scores.features.shape == (2, 32)
    assert teacher.members[0].config.prompt == "short"


def test_identity_is_known_without_loading(run_folder):
    config = TeacherConfig(model=str(run_folder / "ensemble"), kind="ensemble")
    identity, teacher = identify_teacher(config), load(run_folder / "ensemble")
    assert identity.fingerprint == teacher.fingerprint
    assert identity.fingerprint == json.loads((run_folder / "ensemble" / "manifest.json").read_text())["fingerprint"]
    assert identity.prompts == {TASK: teacher.prompt_fingerprint(TASK)}


def test_ensemble_queries_are_those_the_ensemble_was_fitted_on(run_folder):
    assert ensemble_queries(TeacherConfig(model=str(run_folder / "ensemble"))) == {"tiny": {"q1", "q2"}}
    assert ensemble_queries(tiny_teacher_config(run_folder / "llama")) == {}


def test_a_run_can_be_moved(run_folder, tmp_path):
    fingerprint = load(run_folder / "ensemble").fingerprint
    shutil.copytree(run_folder, tmp_path / "moved")
    teacher = load(tmp_path / "moved" / "ensemble")
    assert teacher.fingerprint == fingerprint
    assert str(teacher.members[0].location).startswith(str(tmp_path))


def test_a_changed_member_is_refused(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "llama")
    write_tiny_model(tmp_path / "run" / "llama", "llama", seed=1)
    config = TeacherConfig(model=str(tmp_path / "run" / "ensemble"))
    for call in (identify_teacher, lambda config: load(config.model)):
        with pytest.raises(MismatchError, match=r"was fitted with .*llama.*combine.*again"):
            call(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("tasks"), "cannot be read as an ensemble"),
        (lambda manifest: manifest["members"].pop(), "more or fewer members"),
        (lambda manifest: manifest["tasks"][TASK].update(bias="high"), "cannot be read as an ensemble"),
    ],
)
def test_damaged_folders_are_rejected(run_folder, tmp_path, change, message):
    manifest = json.loads((run_folder / "ensemble" / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataFormatError, match=message):
        EnsembleTeacher.identify(TeacherConfig(model=str(tmp_path)))


def test_nothing_to_ensemble_and_foreign_folders_are_refused(tmp_path):
    member, unweighted = EnsembleMember(TeacherConfig(model="x"), "x"), {TASK: Ensemble((0.0,), (1.0,), (0.0,), 0.0)}
    with pytest.raises(InputError, match="nothing to combine"):
        write_ensemble(tmp_path / "new", [member], unweighted, {})
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="did not make"):
        write_ensemble(tmp_path / "mine", [member], {TASK: Ensemble((0.0,), (1.0,), (1.0,), 0.0)}, {})

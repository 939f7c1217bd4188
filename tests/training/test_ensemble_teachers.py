"""Combining teachers on dev lists: the measurements, the files written, and the page that shows them."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from d2llm.core.errors import InputError
from d2llm.models.teachers.pair_teacher import TeacherScores
from d2llm.ops.calibration import expected_calibration_error, log_loss, reliability_bins
from d2llm.ops.ensemble import Ensemble, out_of_fold_log_odds
from d2llm.recipe import TeacherConfig
from d2llm.reports.html import page as page_of
from d2llm.reports.training_tables import ensemble_table, stack_document
from d2llm.training import ensemble_teachers as verb
from d2llm.training.ensemble_teachers import ensemble_teachers
from fake_models import FakeStudent
from tiny_data import everyday


class Noisy:
    """Scores the answer ``sense`` and others 0, plus a fixed random error per pair, all times ``factor``."""

    def __init__(self, name, *, noise, factor=1.0, sense=1.0):
        self.fingerprint = name
        self.noise, self.factor, self.sense = noise, factor, sense
        self.asked = 0

    def prompt_fingerprint(self, task):
        return task

    def score_pairs(self, pairs, task, **_):
        self.asked += len(pairs)
        return TeacherScores(np.array([self._say(*pair) for pair in pairs], np.float32), None, 1, 0)

    def _say(self, query, passage):
        error = np.random.default_rng(zlib.crc32(f"{self.fingerprint} {query} {passage}".encode())).normal(
            0, self.noise
        )
        return self.factor * (self.sense * (query[0] == passage[0] and passage.endswith("2")) + error)


@pytest.fixture
def teachers(monkeypatch):
    by_name = {
        teacher.fingerprint: teacher
        for teacher in (
            Noisy("llm", noise=0.4, factor=20),
            Noisy("cosine", noise=0.4, factor=0.01),
            Noisy("noise", noise=1, sense=0),
            Noisy("contrary", noise=0.4, sense=-1),
        )
    }
    monkeypatch.setattr(verb, "load_teacher", lambda config, **_: by_name[config.model])
    return by_name


def ensemble(folder, *names, datasets=None, **settings):
    return ensemble_teachers(
        [(everyday(), "asymmetric")] if datasets is None else datasets,
        folder,
        members=[TeacherConfig(model=name) for name in names],
        student=FakeStudent(),
        **{"num_queries": 12, "depth": 8} | settings,
    )


def test_helpful_members_get_weights_and_others_are_left_out(tmp_path, teachers):
    report = ensemble(tmp_path / "ensemble", "llm", "cosine", "contrary")
    task_report = report.tasks["asymmetric"]
    rows = {row.name: row for row in task_report.rows}
    assert list(rows) == ["llm", "cosine", "contrary", "ensemble"]
    assert min(rows["llm"].weight, rows["cosine"].weight) > 0.5
    assert rows["contrary"].weight == 0
    assert rows["ensemble"].after.log_loss < min(rows["llm"].after.log_loss, rows["cosine"].after.log_loss)
    # Scores of about 20 are overconfident as log-odds, those of about 0.01 uninformative; calibration corrects both.
    assert rows["llm"].before.expected_error > 3 * rows["llm"].after.expected_error
    assert rows["cosine"].before.log_loss == pytest.approx(np.log(2), abs=0.02)
    assert rows["cosine"].after.log_loss < 0.9 * np.log(2)
    assert rows["ensemble"].before is None
    assert (task_report.num_queries, task_report.num_positives) == ({"everyday": 12}, 12)

    manifest = json.loads((tmp_path / "ensemble" / "manifest.json").read_text())
    assert manifest["fingerprint"] == report.fingerprint
    assert [member["fingerprint"] for member in manifest["members"]] == ["llm", "cosine"]
    assert manifest["tasks"]["asymmetric"]["weights"] == [rows["llm"].weight, rows["cosine"].weight]
    assert sorted(manifest["fitted_on"]["everyday"]["dev_queries"]) == sorted(f"q{letter}" for letter in "abcdefghijkl")


def test_one_member_is_calibrated_and_measured_out_of_fold(tmp_path, teachers):
    report = ensemble(tmp_path / "ensemble", "llm", l2=0.1, num_folds=4, seed=5)
    alone, together = report.tasks["asymmetric"].rows
    assert together.after == alone.after
    dataset = everyday()
    dev_set = verb.make_teacher_dev_set(
        dataset,
        "asymmetric",
        verb.dev_queries(dataset, num_queries=12, seed=5, from_end=True),
        student=FakeStudent(),
        depth=8,
        with_positives=True,
    )
    pairs = [(query, passage) for query, ids in dev_set.candidates.items() for passage in ids]
    texts = [(dataset.queries[query].text, dataset.passages[passage].full_text) for query, passage in pairs]
    scores = teachers["llm"].score_pairs(texts, "asymmetric").log_odds[:, None]
    labels = [passage == f"{query[1]}2" for query, passage in pairs]
    groups = [f"everyday:{query}" for query, _ in pairs]
    log_odds = out_of_fold_log_odds(scores, labels, groups, l2=0.1, num_folds=4, seed=5)
    assert alone.after.log_loss == pytest.approx(log_loss(log_odds, labels))
    assert alone.after.expected_error == pytest.approx(expected_calibration_error(reliability_bins(log_odds, labels)))
    assert alone.before.log_loss == pytest.approx(log_loss(scores[:, 0], labels))
    assert report.num_scored == len(pairs)


def test_combining_without_a_retrieval_set_is_rejected(tmp_path, teachers):
    with pytest.raises(InputError, match="no retrieval set has any"):
        ensemble(tmp_path / "ensemble", "llm", datasets=[])
    assert not (tmp_path / "ensemble").exists()


def test_weights_are_fitted_per_task(tmp_path, teachers):
    datasets = [(everyday(), "asymmetric"), (everyday("second"), "asymmetric"), (everyday("third"), "symmetric")]
    report = ensemble(tmp_path / "ensemble", "llm", "cosine", datasets=datasets, num_queries=6)
    assert {task: task_report.num_queries for task, task_report in report.tasks.items()} == {
        "asymmetric": {"everyday": 6, "second": 6},
        "symmetric": {"third": 6},
    }
    assert set(report.tasks["asymmetric"].rows[0].measures) == {"everyday", "second"}
    tasks = json.loads((tmp_path / "ensemble" / "manifest.json").read_text())["tasks"]
    assert Ensemble(**{k: tuple(v) if isinstance(v, list) else v for k, v in tasks["symmetric"].items()}).bias < 0


def test_judgements_are_reused_and_only_an_ensemble_is_replaced(tmp_path, teachers):
    first = ensemble(tmp_path / "ensemble", "llm")
    num_asked = teachers["llm"].asked
    second = ensemble(tmp_path / "ensemble", "llm", "cosine")
    assert teachers["llm"].asked == num_asked
    assert first.num_scored == second.num_scored == num_asked  # the second time by the other member
    assert second.fingerprint != first.fingerprint
    assert ensemble(tmp_path / "ensemble", "llm", "cosine").fingerprint == second.fingerprint
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"kind": "student", "format_version": 1}')
    with pytest.raises(InputError, match="'student', which a 'ensemble' would replace"):
        ensemble(tmp_path / "other", "llm")
    assert teachers["llm"].asked == num_asked


def test_invalid_members_are_rejected(tmp_path, teachers):
    with pytest.raises(InputError, match="at least one member"):
        ensemble(tmp_path / "ensemble")
    with pytest.raises(InputError, match="is the same teacher as another"):
        ensemble(tmp_path / "ensemble", "llm", "llm")
    with pytest.raises(InputError, match="nothing to combine"):
        ensemble(tmp_path / "ensemble", "contrary")
    assert not (tmp_path / "ensemble").exists()


def test_the_page_has_a_diagram_for_every_calibration(tmp_path, teachers):
    teachers["<b>llm</b>"] = teachers["llm"]
    report = ensemble(tmp_path / "ensemble", "<b>llm</b>", "cosine")
    page = page_of(stack_document(report))
    assert page.count("<svg") == 2 * 2 + 1
    assert "<b>llm" not in page
    assert "<script" not in page
    for cells in ensemble_table("asymmetric", report.tasks["asymmetric"]).texts():
        assert all(f"<td>{cell}</td>" in page for cell in cells[1:])

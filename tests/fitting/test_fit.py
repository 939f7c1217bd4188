"""A fit from documents to a served index, with a real endpoint on a local port, a tiny student and real files."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import d2llm.fitting.fit as fit_module
from d2llm.core.errors import InputError, OutOfTimeError
from d2llm.core.manifest import read_manifest
from d2llm.data.run_folder import is_finished
from d2llm.fitting.compare import START_NAME, TRAINED_NAMES
from d2llm.fitting.critic import CriticSettings
from d2llm.fitting.fit import Fit, fit
from d2llm.fitting.report import Stages, verdict_sentence
from d2llm.fitting.served_index import student_for
from d2llm.models.student import Student
from d2llm.ops.gating import better
from d2llm.recipe import Recipe
from d2llm.retrieval.index import Index
from d2llm.store.index_manifest import Chunking
from d2llm.training.mining import ranking
from d2llm.training.run import Run
from local_endpoint import local_endpoint
from tiny_fit import NUM_DOCUMENTS, ask_about_passage, settings_for, write_documents
from tiny_models import randomise, tiny_student_config, tiny_teacher_config, write_tiny_model

TRAINED = TRAINED_NAMES[False]  # dev has too few queries to fit weights


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    model = write_tiny_model(folder / "model", "bert")
    Student.create(tiny_student_config(model), device="cpu", dtype="float32").save(folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def endpoint():
    with local_endpoint(ask_about_passage) as served:
        yield served


@pytest.fixture(scope="module")
def finished(student, endpoint, tmp_path_factory):
    """A finished fit, and its report."""
    root = tmp_path_factory.mktemp("fit")
    documents = write_documents(root / "docs")
    done = Fit([documents], None, settings_for(student, endpoint.url), device="cpu", dtype="float32")
    return done, done.finish()


def test_a_fit_ends_with_everything_in_one_folder(finished):
    done, report = finished
    assert done.folder.path.name == "docs.search"
    assert report.num_passages == NUM_DOCUMENTS
    assert report.writing.num_queries == 2 * NUM_DOCUMENTS
    assert report.num_kept == sum(report.data["written"].queries.values()) + report.data["written"].num_shared
    names = [row.name for row in report.reports["written"].rows]
    assert START_NAME in names
    assert TRAINED in names
    assert "D2LLM" not in " ".join(names)
    assert report.verdict is not None
    assert report.kept == ("fitted" if report.verdict.passed else "start")
    assert read_manifest(done.folder.path, "search", 1)["kept"] == report.kept
    assert json.loads(done.folder.report.read_text())["num_kept"] == report.num_kept
    for page in (done.folder.report_page, done.folder.audit_page, done.folder.progress_page):
        assert "</html>" in page.read_text()


def test_the_page_says_who_is_who_and_shows_examples_of_the_student_that_is_served(finished):
    done, report = finished
    served = TRAINED if report.kept == "fitted" else START_NAME
    written = report.reports["written"]
    assert written.subject == served
    values = {name: written.details.values[name]["nDCG@10"] for name in (served, written.baseline)}
    gains = dict(zip(written.details.item_ids, np.subtract(*values.values()), strict=True))
    assert written.details.wins or written.details.losses
    for example in (*written.details.wins, *written.details.losses):
        assert example.value - example.baseline_value == pytest.approx(gains[example.id])
        assert [passage.id for passage in example.top] == [
            passage_id for passage_id, _ in written.details.rankings[served][example.id][: len(example.top)]
        ]
    page = done.folder.report_page.read_text()
    assert f"{served}: " in page
    assert "than the one it started from" in page or "different from the one it started from" in page


@pytest.mark.parametrize(
    ("shift", "noise", "sentence", "outcome"),
    [
        (0.2, 0.01, "is significantly better than the one it started from", "better"),
        (-0.2, 0.01, "is significantly worse than the one it started from", "significantly worse"),
        (0.0, 0.2, "is not significantly different from the one it started from", "not different"),
    ],
)
def test_the_verdict_says_better_worse_or_not_different_with_figures(finished, shift, noise, sentence, outcome):
    _, report = finished
    rng = np.random.default_rng(0)
    before = {str(number): value for number, value in enumerate(rng.uniform(0.4, 0.6, 60).tolist())}
    after = {name: value + shift + noise * (-1) ** int(name) for name, value in before.items()}
    judged = replace(report, verdict=better(before, after), kept="fitted" if outcome == "better" else "start")
    text = verdict_sentence(judged)
    assert sentence in text
    first, second = (sum(values.values()) / 60 for values in (before, after))
    assert f"nDCG@10 {first:.3f} to {second:.3f}, p" in text
    assert "60 held-out queries" in text
    assert judged.to_json()["verdict"]["outcome"] == outcome


def test_the_corpus_is_encoded_once_for_each_student(finished):
    done, report = finished
    untuned = [path.name for path in (done.folder.measured / "indexes").iterdir()]
    assert len(untuned) == 1  # those of the start and of the fitted student are made to be served
    not_served = list(done.folder.work.glob("index-*"))
    assert len(not_served) == (0 if report.kept == "fitted" else 1)


def test_dev_and_test_documents_have_no_training_query(finished):
    done, _ = finished
    split_of: dict[str, set[str]] = {}
    for split in ("train", "dev", "test"):
        for line in (done.folder.written / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
            split_of.setdefault(line.split("\t")[1], set()).add(split)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert set.union(*split_of.values()) == {"train", "dev", "test"}


def test_the_index_is_served_with_the_student_that_was_kept_and_can_be_moved(finished, tmp_path):
    done, _ = finished
    moved = tmp_path / "moved.search"
    done.folder.path.rename(moved)
    try:
        index = Index.open(moved, device="cpu", dtype="float32")
        assert len(index.search(["which zorb7 is it"])[0].passages) == 10
        assert index.student.fingerprint == Student.load(moved / "student", device="cpu").fingerprint
    finally:
        moved.rename(done.folder.path)


def test_a_second_call_reads_only_what_has_changed(finished, student, endpoint):
    done, _ = finished
    num_requests = len(endpoint.requests)
    (done.documents[0] / "0.md").write_text("# Device 0\n\nThe zorb0 has been replaced by something altogether new.\n")
    (done.documents[0] / "1.md").unlink()
    settings = settings_for(student, endpoint.url)
    assert fit(done.documents[0], settings=settings, device="cpu", dtype="float32") is None
    index = Index.open(done.folder.index)
    assert len(index) == NUM_DOCUMENTS - 1
    assert any("altogether new" in passage.text for passage in index.get_document("0.md"))
    assert len(endpoint.requests) == num_requests


def test_a_folder_with_something_else_is_refused(tmp_path, student, endpoint):
    documents = write_documents(tmp_path / "docs", 2)
    with pytest.raises(InputError, match="holds something else than a fit"):
        Fit([documents], documents, settings_for(student, endpoint.url))


def test_too_few_documents_are_an_error_that_says_what_is_missing(tmp_path, student, endpoint):
    documents = write_documents(tmp_path / "docs", 2)
    with pytest.raises(InputError, match="none of the three may be empty"):
        Fit([documents], None, settings_for(student, endpoint.url), device="cpu", dtype="float32").finish()


def test_a_folder_without_documents_leaves_nothing_behind(tmp_path, student, endpoint):
    documents = tmp_path / "docs"
    documents.mkdir()
    settings = settings_for(student, endpoint.url).replace(student=None)
    with pytest.raises(InputError, match="there are no documents"):
        Fit([documents], None, settings).finish()
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


@pytest.fixture(scope="module")
def half(student, endpoint, tmp_path_factory):
    """A fit up to its review, in a process that then ends."""
    documents = write_documents(tmp_path_factory.mktemp("half") / "docs")
    settings = settings_for(student, endpoint.url, chunking=Chunking(64))
    done = Fit([documents], None, settings, device="cpu", dtype="float32")
    done._begin()
    done.served.read()
    done.write(60)
    return done


def repeated(half, **changes):
    settings = half.settings.replace(**changes)
    return Fit(half.documents, None, settings, device="cpu", dtype="float32")


def test_a_run_keeps_the_recipe_that_it_began_with(half, monkeypatch):
    data = half.make_data(half.review())
    shorter = half.plan()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda _, **__: None)
        half.train(data, replace(shorter, max_queries=shorter.max_queries // 2, training=300.0))
    [begun] = half.folder.work.glob("run-*/recipe.json")
    recipes: list[Recipe] = []
    monkeypatch.setattr(Run, "finish", lambda run, **_: recipes.append(run.recipe))
    later = repeated(half)
    later.train(data, replace(shorter, max_queries=10 * shorter.max_queries, training=1_200.0))
    [recipe] = recipes
    assert recipe.model_dump(mode="json") == json.loads(begun.read_text())


@pytest.mark.parametrize("is_replaced", [False, True])
def test_mining_takes_its_vectors_from_the_index(student, endpoint, tmp_path, monkeypatch, is_replaced):
    """Unless another student made them, as when a finished fit learns anew."""
    settings = settings_for(student, endpoint.url)
    done = Fit([write_documents(tmp_path / "docs")], None, settings, device="cpu", dtype="float32")
    done._begin()
    done.served.read()
    done.write(60)
    data = done.make_data(done.review())
    if is_replaced:
        done.served.serve(other_student(done.served.index.student, tmp_path / "other"))
    assert done.served.is_of_start != is_replaced
    encoded: list[str] = []
    shard = ranking.TextShard
    monkeypatch.setattr(ranking, "TextShard", lambda texts, kind: (encoded.extend(texts), shard(texts, kind))[1])
    monkeypatch.setattr(Run, "finish", lambda run, **_: run.mine())
    done.train(data, done.plan())
    assert len(list(done.folder.work.glob("run-*/plans/written/audit.json"))) == 1
    assert len(encoded) == (NUM_DOCUMENTS if is_replaced else 0)


def other_student(student, folder):
    """One with the same settings and other weights."""
    other = Student.create(student.config, device="cpu", dtype="float32")
    other.prepare_training()
    randomise(other)
    other.save(folder)
    return folder


def test_an_index_and_a_student_that_do_not_fit_are_mended(half, tmp_path):
    other = Student.load(other_student(half.served.index.student, tmp_path / "other"), device="cpu", dtype="float32")
    assert other.fingerprint != half.served.index.student.fingerprint
    half.served.serve(tmp_path / "other")
    assert Index.open(half.folder.index).student.fingerprint == other.fingerprint
    assert Index.open(half.folder.index).chunking == Chunking(64)
    half.served.load(half.served.start).save(
        half.folder.student
    )  # as if the call had ended before the index was replaced
    mended = repeated(half)
    mended.served.read()
    assert mended.served.index.student.fingerprint == Student.load(half.served.start, device="cpu").fingerprint
    assert len(mended.served.index) == NUM_DOCUMENTS


def test_writing_is_finished_for_these_settings_and_hours_only(half):
    assert repeated(half)._finished_writing() is not None
    assert repeated(half, hours=0.5)._finished_writing() is not None
    for changes in ({"hours": 2.0}, {"examples": (("a", "b"),)}, {"max_queries": 3}, {"seed": 1}):
        assert repeated(half, **changes)._finished_writing() is None, changes


def test_the_progress_page_reloads_itself_until_the_end(tmp_path):
    stages = Stages(tmp_path / "progress.html", "docs", 60.0)
    with stages.run("read"):
        assert 'http-equiv="refresh"' in stages.page.read_text()
    assert 'http-equiv="refresh"' in stages.page.read_text()  # between two stages
    stages.finish()
    assert 'http-equiv="refresh"' not in stages.page.read_text()


@pytest.mark.parametrize("has_langid", [True, False])
@pytest.mark.parametrize(
    ("text", "student"),
    [
        ("How the pump is cleaned, repaired and stored in winter.", "d2llm-minilm"),
        ("如何在冬天清洁、修理和存放水泵。", "d2llm-multilingual"),
        ("Как чистить, чинить и хранить насос зимой.", "d2llm-multilingual"),
    ],
)
def test_the_student_to_start_from_follows_from_the_language(monkeypatch, has_langid, text, student):
    if not has_langid:
        monkeypatch.setitem(sys.modules, "py3langid", None)
    assert student_for([text, text]) == student


def test_a_fit_can_be_served_by_its_folder(finished):
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'd2llm[serve]'")
    from d2llm.server.settings import ServeSettings

    done, _ = finished
    assert ServeSettings(index=done.folder.path).index == {"docs.search": done.folder.index}


def test_a_teacher_judges_the_queries_that_the_first_half_of_the_training_changed(
    student, endpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(Run, "closed_gates", lambda _: [])  # a random teacher would not pass
    documents = write_documents(tmp_path / "docs")
    teacher = tiny_teacher_config(write_tiny_model(tmp_path / "teacher"))
    # A random teacher finds half of what it reads relevant: with more, all training queries would share some with dev.
    critic = CriticSettings(depth=NUM_DOCUMENTS, min_log_odds=-100.0, num_scored=1)
    settings = settings_for(student, endpoint.url, teacher=teacher, critic=critic)
    done = Fit([documents], None, settings, device="cpu", dtype="float32")
    assert done.finish() is not None
    [taught] = done.folder.work.glob("run-*-taught")
    [own] = set(done.folder.work.glob("run-*")) - {taught}
    assert is_finished(own / "student")
    assert not (own / "labels").exists()  # without a teacher
    assert is_finished(taught / "student")
    assert is_finished(taught / "labels")
    recipe = json.loads((taught / "student" / "manifest.json").read_text())["recipe"]
    [base] = done.folder.work.glob("base-*")
    assert recipe["labelling"]["compared_students"] == [str(base), str(own / "student")]
    assert recipe["training"]["start"] == str(own / "student")
    assert recipe["losses"]["list_imitation"] > 0
    assert recipe["data"][0]["max_labelled"] >= 1


def test_a_fit_whose_queries_all_share_passages_with_held_out_ones_trains_nothing(student, endpoint, tmp_path):
    documents = write_documents(tmp_path / "docs")
    teacher = tiny_teacher_config(write_tiny_model(tmp_path / "teacher"))
    critic = CriticSettings(depth=NUM_DOCUMENTS, min_log_odds=-100.0, num_scored=NUM_DOCUMENTS, max_positives=10_000)
    settings = settings_for(student, endpoint.url, teacher=teacher, critic=critic)
    done = Fit([documents], None, settings, device="cpu", dtype="float32")
    report = done.finish()
    assert report is not None
    assert report.kept == "start"
    assert report.verdict is None
    assert any("shares a relevant passage with a held-out one" in note for note in report.notes)
    assert not list(done.folder.work.glob("run-*"))
    assert len(Index.open(done.folder.index, device="cpu").view)


# The end in time ---------------------------------------------------------------------------------------------------


def fit_anew(student, endpoint, folder, **changes):
    """A fit, its report, and the names of the compared systems."""
    documents = write_documents(folder / "docs")
    done = Fit([documents], None, settings_for(student, endpoint.url, **changes), device="cpu", dtype="float32")
    report = done.finish()
    assert report is not None
    assert len(Index.open(done.folder.index, device="cpu").view) == NUM_DOCUMENTS
    return done, report, {row.name for row in report.reports["written"].rows}


def test_with_hardly_any_time_weights_are_fitted_and_nothing_is_encoded_again(student, endpoint, tmp_path):
    done, report, names = fit_anew(student, endpoint, tmp_path, hours=1e-6)
    assert report.kept == "start"
    assert report.num_kept > 0
    assert names >= {"BM25", START_NAME}
    assert not any("untuned" in name for name in names)
    assert not (done.folder.measured / "indexes").exists()
    assert any("index the documents took longer" in note for note in report.notes)
    assert any("no time for training: the student to start from remains as it is" in note for note in report.notes)
    assert any("no time to compare with the untuned student" in note for note in report.notes)
    missing = {row.kind: row.reason for row in report.reports["written"].missing}
    assert missing["cosine_untuned"] == "there was no time to encode the documents with it"
    assert "No trained student was compared" in done.folder.report_page.read_text()


def test_a_training_that_is_not_finished_in_time_is_left(student, endpoint, tmp_path, monkeypatch):
    plan = Fit.plan
    monkeypatch.setattr(Fit, "plan", lambda self, **options: replace(plan(self, **options), training=1e-3))
    done, report, names = fit_anew(student, endpoint, tmp_path)
    assert (report.kept, report.verdict) == ("start", None)
    assert any("the training was not finished in its time" in note for note in report.notes)
    assert any("untuned" in name for name in names)
    assert "not finished: out of time" in done.folder.report_page.read_text()
    assert [path.name for path in done.folder.work.glob("run-*")]
    assert not list(done.folder.work.glob("run-*/student"))


@pytest.mark.parametrize(
    ("zone", "ends"),
    [("UTC0", "2027-01-15 09:00"), ("XXX-24:59", "2027-01-16 09:59")],
    ids=["UTC", "further ahead than Python's own time zones may be"],
)
def test_the_page_says_when_a_fit_ends_by_the_clock_of_any_time_zone(tmp_path, monkeypatch, zone, ends):
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)  # 2027-01-15 08:00 UTC
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    stages = Stages(tmp_path / "report.html", "documents", 3_630)
    stages.write_page()
    monkeypatch.undo()
    time.tzset()
    assert f"Ends at about {ends}: 60 min left." in stages.page.read_text()


def test_a_student_that_there_is_no_time_to_compare_is_not_kept(student, endpoint, tmp_path, monkeypatch):
    train = Fit.train

    def slow(self, data, plan):
        trained = train(self, data, plan)
        self.stages._seconds -= self.stages.seconds_left  # none is left
        return trained

    monkeypatch.setattr(Fit, "train", slow)
    done, report, names = fit_anew(student, endpoint, tmp_path)
    assert (report.kept, report.verdict) == ("start", None)
    assert any("no time to compare the trained student" in note for note in report.notes)
    assert START_NAME in names
    assert TRAINED not in names
    assert not list(done.folder.work.glob("index-*"))


@pytest.mark.parametrize(("seconds_of_pass", "is_compared"), [(150, True), (300, False)])
def test_a_trained_student_is_compared_even_if_the_time_seems_too_short(
    student, endpoint, tmp_path, monkeypatch, seconds_of_pass, is_compared
):
    """Up to twice the time: nothing else can be done in it, and it may suffice."""
    train = Fit.train

    def slow(self, data, plan):
        trained = train(self, data, plan)
        self.stages._seconds -= self.stages.seconds_left - 100
        return trained

    monkeypatch.setattr(Fit, "train", slow)
    monkeypatch.setattr(fit_module, "passages_per_second", lambda _: NUM_DOCUMENTS / seconds_of_pass)
    _, report, names = fit_anew(student, endpoint, tmp_path)
    assert (report.verdict is not None) == is_compared
    assert START_NAME in names
    assert (TRAINED in names) == is_compared
    assert ("no time to compare the trained student" in " ".join(report.notes)) != is_compared
    assert any("no time to compare with the untuned student" in note for note in report.notes)


def test_the_untuned_student_is_left_out_of_a_comparison_first(student, endpoint, tmp_path, monkeypatch):
    compare = fit_module.compare_students

    def slow(*students, with_untuned):
        if with_untuned:
            raise OutOfTimeError  # as when encoding takes longer than planned
        return compare(*students, with_untuned=with_untuned)

    monkeypatch.setattr(fit_module, "compare_students", slow)
    _, report, names = fit_anew(student, endpoint, tmp_path)
    assert report.verdict is not None
    assert names >= {START_NAME, "BM25", TRAINED}
    assert not any("untuned" in name for name in names)
    assert report.notes == ("there was no time to compare with the untuned student",)


def test_a_teacher_without_time_leaves_the_student_of_the_first_half(student, endpoint, tmp_path, monkeypatch):
    finish = Run.finish

    def slow(run, **options):
        if run.recipe.losses.imitates:
            raise OutOfTimeError
        return finish(run, **options)

    monkeypatch.setattr(Run, "finish", slow)
    teacher = tiny_teacher_config(write_tiny_model(tmp_path / "teacher"))
    critic = CriticSettings(depth=NUM_DOCUMENTS, min_log_odds=-100.0, num_scored=1)
    _, report, names = fit_anew(student, endpoint, tmp_path, teacher=teacher, critic=critic)
    assert any("no time to train on the teacher's scores" in note for note in report.notes)
    assert START_NAME in names
    assert report.verdict is not None

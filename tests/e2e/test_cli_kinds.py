"""Kinds of teachers and writers that another package adds, as a user names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2llm import Index
from d2llm.core.errors import ModelError
from d2llm.data.labels import LabelStore
from d2llm.data.plan import read_plan
from d2llm.recipe import TeacherConfig, WriterConfig
from d2llm.retrieval.reranker import Reranker, open_reranker
from e2e.command_line import fail, succeed, succeed_with_report
from e2e.small_corpus import SENTENCES
from installed_package import install
from live_server import patient, served
from recipe.test_writers import THEIRS as WRITER
from tiny_server import write_tiny_index

TEACHER = """
import numpy as np

from d2llm.models.teachers.pair_teacher import TeacherScores
from d2llm.recipe import TeacherConfig


class Overlap:
    def __init__(self, slope):
        self.slope, self.fingerprint = slope, f"overlap-{slope}"

    def prompt_fingerprint(self, task):
        return f"words-{task}"

    def score_pairs(self, pairs, task, *, with_features=False, advance=None):
        shares = [len({*q.split()} & {*p.split()}) / len({*q.split()}) for q, p in pairs]
        if advance is not None:
            advance(len(pairs))
        return TeacherScores(self.slope * (np.array(shares, np.float32) - 0.5), None, num_truncated=0, num_tokens=0)


class Theirs(TeacherConfig, kind="overlap"):
    '''Words that query and passage share.'''

    slope: float = 4.0
    '''How much log-odds differ.'''

    def load(self, *, device=None, dtype=None):
        return Overlap(self.slope)
"""


RERANKER = """
import numpy as np

from d2llm.retrieval.reranker import OpenReranker, Reranker


class LongestFirst(Reranker, kind="longest"):
    '''Longer passages first.'''

    num_passages: int = 5
    '''How many are read.'''

    def open(self, *, device=None, dtype=None):
        return OpenLongestFirst(self)


class OpenLongestFirst(OpenReranker):
    def rerank(self, query, candidates):
        read = candidates.best_first[: self.settings.num_passages]
        return candidates.with_scores(read, [len(text) for text in candidates.texts(read)])


class Wrong(Reranker, kind="wrong"):
    '''Not what a search can use.'''

    answer: str = "short"

    def open(self, *, device=None, dtype=None):
        return OpenWrong(self)


class OpenWrong(OpenReranker):
    def rerank(self, query, candidates):
        answers = {
            "short": candidates.scores[1:],
            "columns": np.stack([candidates.scores] * 2),
            "nan": np.where(np.arange(len(candidates.scores)) == 1, np.nan, candidates.scores),
            "words": ["good"] * len(candidates.scores),
        }
        if self.settings.answer == "none":
            raise RuntimeError("out of order")
        return answers[self.settings.answer]
"""


@pytest.fixture
def rerankers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"longest": "LongestFirst", "wrong": "Wrong"}
    install(tmp_path / "site", RERANKER, Reranker.kinds, kinds, monkeypatch)


@pytest.mark.usefixtures("rerankers")
def test_a_reranker_of_another_package_reranks_in_python_in_a_terminal_and_over_http(tmp_path: Path) -> None:
    path = write_tiny_index(tmp_path)
    index = Index.open(path, dtype="float32")
    student = [hit.passage for hit in index.search("the cat by the sea", top_k=60)]
    lengths = {passage.id: len(passage.full_text) for passage in student}

    def expected(number: int) -> list[str]:
        first = sorted(student[:number], key=lambda passage: (-lengths[passage.id], passage.id))
        return [passage.id for passage in (*first, *student[number:])]

    ranking = index.search("the cat by the sea", rerank="longest", top_k=60)
    assert [hit.passage.id for hit in ranking] == expected(5) != [passage.id for passage in student]
    assert ranking.reranking is not None
    assert ranking.reranking.kind == "longest"
    assert [hit.score for hit in ranking][:5] == [lengths[each] for each in expected(5)[:5]]
    loaded = open_reranker(Reranker(kind="longest", num_passages=8))
    assert [hit.passage.id for hit in index.search("the cat by the sea", rerank=loaded, top_k=60)] == expected(8)

    (tmp_path / "longest.toml").write_text('[reranker]\nkind = "longest"\nnum_passages = 8\n')
    search = ("search", path, "the cat by the sea", "--top-k", 60, "--dtype", "float32", "--reranker")
    for number, named in (
        (5, ["longest"]),
        (8, [tmp_path / "longest.toml"]),
        (12, ["longest", "--reranker-set", "num-passages=12"]),
        (3, [tmp_path / "longest.toml", "--reranker-set", "num-passages=3"]),
    ):
        result, report = succeed_with_report(*search, *named, folder=tmp_path)
        (shown,) = report["result"]["rankings"]
        assert [hit["passage"]["id"] for hit in shown["passages"]] == expected(number)
        assert "longest: " in result.stderr
    assert "longest" in succeed("methods").output

    with served(path, reranker=str(tmp_path / "longest.toml")) as address:
        assert patient.get(f"{address}/v1/index").json()["rescore"] == ["none", "iem", "longest"]
        body = {"query": "the cat by the sea", "top_k": 60, "rescore": "longest"}
        answer = patient.post(f"{address}/v1/search", json=body).json()
        assert [hit["id"] for hit in answer["passages"]] == expected(8)
        assert answer["reranking"]["kind"] == "longest"
        for rescore, words in (("wrong", "no reranker 'wrong'"), ("listwise", "start it with --reranker listwise")):
            refused = patient.post(f"{address}/v1/search", json=body | {"rescore": rescore})
            assert (refused.status_code, words in refused.text) == (400, True)
        unknown = patient.post(f"{address}/v1/search", json=body | {"rescore": "longst"})
        assert (unknown.status_code, "longest" in unknown.text) == (422, True)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("short", r"shape \(59,\) for 60 candidates"),
        ("columns", r"shape \(2, 60\) for 60 candidates"),
        ("nan", "1 of 60 scores of the query 'cat' that are not finite"),
        ("words", "scores that are not numbers"),
        ("none", r"failed \(RuntimeError: out of order\) on 'cat'"),
    ],
)
@pytest.mark.usefixtures("rerankers")
def test_an_answer_that_does_not_score_every_candidate_is_refused(tmp_path: Path, answer: str, problem: str) -> None:
    index = Index.open(write_tiny_index(tmp_path), dtype="float32")
    with pytest.raises(ModelError, match=f"the reranker 'wrong' .*{problem}"):
        index.search("cat", rerank=Reranker(kind="wrong", answer=answer))


@pytest.fixture
def overlap_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", TEACHER, TeacherConfig.kinds, {"overlap": "Theirs"}, monkeypatch)


@pytest.mark.usefixtures("overlap_teacher")
def test_a_judge_of_another_package_judges_and_labels_and_is_tested(workspace: Path, tmp_path: Path) -> None:
    pair = ("judge", "green tea", "green leaves", "--teacher", "overlap:any")
    _, report = succeed_with_report(*pair, folder=tmp_path)
    assert report["result"]["scores"][0]["log_odds"] == pytest.approx(0.0)
    (tmp_path / "overlap.toml").write_text('[teacher]\nkind = "overlap"\nslope = 8\n')
    _, report = succeed_with_report("judge", "tea", "tea", "--teacher", tmp_path / "overlap.toml", folder=tmp_path)
    assert report["result"]["scores"][0]["log_odds"] == pytest.approx(4.0)

    text = (workspace / "tiny.toml").read_text()
    before, rest = text.split("[teacher]\n")
    recipe = tmp_path / "theirs.toml"
    recipe.write_text(f'{before}[teacher]\nkind = "overlap"\nslope = 2\n{rest[rest.index("[teacher_tuning]") :]}')
    recipe.write_text(recipe.read_text().replace("[teacher_tuning]\n", "[teacher_tuning]\nepochs = 0\n"))
    shown = " ".join(succeed("recipe", "check", recipe).output.split())
    assert "teacher.kind" in shown
    assert "teacher.slope" in shown
    arguments = (recipe, "--out", tmp_path / "run", "--dtype", "float32")
    succeed("mine", *arguments)
    _, report = succeed_with_report("gate", *arguments, folder=tmp_path)
    assert report["result"]["sets"][0]["name"] == "everyday"
    for teacher, is_another in (("overlap:other", False), (tmp_path / "overlap.toml", True)):  # slope is 2, then 8
        _, report = succeed_with_report("gate", *arguments, "--teacher", teacher, folder=tmp_path)
        assert (report["result"]["num_scored"] > 0) == is_another
    succeed("label", *arguments)
    key = {"teacher": "overlap-2.0", "prompt": "words-asymmetric"}
    store = LabelStore.open_for_reading(tmp_path / "run" / "labels", dataset="everyday", **key)
    for entry in read_plan(tmp_path / "run" / "plans" / "everyday").entries:
        log_odds = store.log_odds(entry.query_id)
        # A query is the first five words of its passage, so its words are all there.
        assert [log_odds[name] for name in entry.positives] == pytest.approx([1.0] * len(entry.positives))


@pytest.mark.usefixtures("overlap_teacher")
def test_a_wrong_kind_or_setting_names_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.toml"
    for text, parts in (
        ('kind = "overlaps"', ["teacher: no kind of teacher 'overlaps'; did you mean 'overlap'?"]),
        ('kind = "overlap"\nslop = 2', ["unknown key 'teacher.slop'; did you mean 'slope'?"]),
        ("slope = 2", ["unknown key 'teacher.slope' of kind auto; it is a setting of kind overlap"]),
        ('kind = "overlap"\nmax_tokens = 99', ["'teacher.max_tokens' of kind overlap; it is a setting of kind auto,"]),
    ):
        recipe.write_text(f"[teacher]\n{text}\n")
        fail("recipe", "check", recipe, containing=[str(recipe), *parts])
    schema = json.loads(succeed("recipe", "schema").stdout)
    assert '"overlap"' in json.dumps(schema["properties"]["teacher"])
    fail(
        "judge", "q", "p", "--teacher", "cosine:x", "--prompt", "short", containing=["kind cosine, which has no prompt"]
    )


def test_a_writer_of_another_package_expands_queries(index, tmp_path, monkeypatch):
    install(tmp_path / "site", WRITER, WriterConfig.kinds, {"theirs": "Theirs"}, monkeypatch)
    options = ("--expand", "hyde", "--writer", "theirs:any")
    _, report = succeed_with_report("search", index, SENTENCES[3], *options, folder=tmp_path)
    assert report["result"]["rankings"][0]["expansion"]["texts"] == [SENTENCES[3][::-1] + "?"]
    fail("search", index, "x", "--expand", "hyde", "--writer", "remote:m", containing=["writer.remote is missing"])

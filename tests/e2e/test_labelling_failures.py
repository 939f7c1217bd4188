"""``d2llm label`` with a model that grades or ranks lists: its endpoint goes away, is slow, or costs money; its answers
lack what was asked for.

Whatever ends a call, its labels are kept, and the same command asks only for what was not answered.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from d2llm.data.beir import read_beir
from d2llm.data.labels import LabelStore
from d2llm.data.plan import TrainingPlan, read_plan
from d2llm.evaluation import pool_scores
from d2llm.models.remote import endpoint as remote_endpoint
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.recipe.recipe import load_recipe
from e2e.command_line import d2llm, fail, succeed, succeed_with_report
from list_endpoint import KINDS, counts_words, grade, judged_lists, recipe_with_teacher, shared_words
from local_endpoint import LocalEndpoint, Reply, Request, chat, local_endpoint
from prepared_process import PreparedProcess, script
from waiting import PATIENCE, until

LEAVES_AFTER = 5


@dataclass
class Labelling:
    """A run with plans, whose teacher is at a port of this machine."""

    folder: Path
    recipe: Path
    plan: TrainingPlan
    kind: str = "graded"
    sections: dict[str, str] = field(default_factory=dict)

    def write(self, url: str, *, remote: str = "concurrency = 1\npatience_minutes = 0", settings: str = "") -> None:
        teacher = f'kind = "{self.kind}"\nmodel = "counts-words"\n[teacher.remote]\nurl = "{url}"\n{remote}'
        (self.folder / "recipe.toml").write_text(recipe_with_teacher(self.recipe, teacher, settings))

    @property
    def command(self) -> tuple[object, ...]:
        return "label", self.folder / "recipe.toml", "--out", self.folder / "run"

    def label(self) -> dict[str, Any]:
        return succeed_with_report(*self.command, folder=self.folder)[1]["result"]

    def labels(self) -> LabelStore:
        identity = identify_teacher(load_recipe(str(self.folder / "recipe.toml")).teacher)
        key = {"teacher": identity.fingerprint, "prompt": identity.prompts["asymmetric"], "dataset": "everyday"}
        return LabelStore(self.folder / "run" / "labels", **key)

    def assert_complete(self) -> None:
        labels = self.labels()
        assert labels.num_duplicates == 0
        assert labels.num_pairs == self.num_pairs
        for entry in self.plan.entries:
            log_odds = labels.log_odds(entry.query_id)
            assert max(log_odds, key=log_odds.__getitem__) in entry.positives  # a query is the start of its passage

    @property
    def num_pairs(self) -> int:
        return sum(len(entry.passage_ids) for entry in self.plan.entries)


@pytest.fixture(scope="module")
def mined(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has plans."""
    folder = tmp_path_factory.mktemp("mined")
    succeed("mine", workspace / "tiny.toml", "--out", folder / "run", "--dtype", "float32")
    return folder / "run"


@pytest.fixture
def labelling(mined: Path, workspace: Path, tmp_path: Path) -> Labelling:
    shutil.copytree(mined, tmp_path / "run")
    (plan,) = (tmp_path / "run" / "plans").glob("*")
    return Labelling(tmp_path, workspace / "tiny.toml", read_plan(plan))


def answered_pairs(requests: list[Request]) -> list[tuple[str, str]]:
    """The query and each passage of some requests, without that of the trial."""
    lists = [judged_lists(request) for request in requests]
    return [(query, text) for query, texts in lists for text in texts if text != "Cows drink water."]


@contextmanager
def leaving_endpoint(number: int) -> Iterator[tuple[LocalEndpoint, threading.Event]]:
    """An endpoint that answers so many requests and refuses connections from then on; and whether it is gone."""
    leaving, gone = threading.Event(), threading.Event()

    def reply(request: Request, index: int) -> Reply:
        if index < number:
            return counts_words(request, index)
        leaving.set()
        return Reply(hang_up=True)

    def leave() -> None:
        leaving.wait()
        stack.close()
        gone.set()

    with ExitStack() as stack:
        endpoint = stack.enter_context(local_endpoint(reply))
        threading.Thread(target=leave, daemon=True).start()
        yield endpoint, gone


def port_of(endpoint: LocalEndpoint) -> int:
    return int(endpoint.url.rpartition(":")[2].partition("/")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_an_endpoint_that_goes_away_costs_no_answer(labelling: Labelling, kind: str) -> None:
    labelling = replace(labelling, kind=kind)
    with leaving_endpoint(1 + LEAVES_AFTER) as (endpoint, gone):
        labelling.write(endpoint.url)
        error = fail(*labelling.command, containing=[endpoint.url, "no connection", "Run the command again"])
        assert "it continues where it stopped" in error
        first = answered_pairs(endpoint.requests[: 1 + LEAVES_AFTER])
        assert gone.wait(PATIENCE)
        fail(*labelling.command, containing=["cannot be reached", "start the server", "teacher.remote.url"])
    assert labelling.labels().num_pairs == len(first) > 0
    with local_endpoint(counts_words, port=port_of(endpoint)) as back:
        report = labelling.label()
        assert (report["pairs"], report["finished_pairs"]) == (labelling.num_pairs - len(first), len(first))
        second = answered_pairs(back.requests)
        labelling.label()
        assert answered_pairs(back.requests) == second  # nothing was left to ask
    assert len({*first, *second}) == len(first) + len(second) == labelling.num_pairs
    labelling.assert_complete()


def test_requests_on_their_way_are_answered_before_the_command_ends(labelling: Labelling) -> None:
    def refuses_one(request: Request, number: int) -> Reply:
        if number == 1:
            return Reply({"error": "the account is empty"}, status=403)
        return replace(counts_words(request, number), delay=0.3)

    with local_endpoint(refuses_one) as endpoint:
        labelling.write(endpoint.url, remote="concurrency = 4\npatience_minutes = 0")
        fail(*labelling.command, containing=["refuses access (403)", "the account is empty"])
        answered = answered_pairs([endpoint.requests[0], *endpoint.requests[2:]])
    assert labelling.labels().num_pairs == len(answered)
    assert len(endpoint.requests) in range(2, 6)  # the trial, and at most four at once


def test_an_endpoint_that_is_back_in_time_is_waited_for(labelling: Labelling) -> None:
    with ExitStack() as stack, leaving_endpoint(1 + LEAVES_AFTER) as (endpoint, gone):
        labelling.write(endpoint.url, remote="concurrency = 1\npatience_minutes = 1")

        def come_back() -> None:
            gone.wait(PATIENCE)
            stack.enter_context(local_endpoint(counts_words, port=port_of(endpoint)))

        waiting = threading.Thread(target=come_back)
        waiting.start()
        assert labelling.label()["pairs"] == labelling.num_pairs
        waiting.join()
    labelling.assert_complete()


def test_an_answer_that_cannot_be_used_costs_no_other(labelling: Labelling) -> None:
    odd = labelling.plan.entries[3].query_id

    def refuses_to_grade_one(request: Request, number: int) -> Reply:
        query, _ = judged_lists(request)
        if query in unusable:
            return Reply(chat("I would rather not say."))
        return counts_words(request, number)

    unusable: set[str] = set()
    with local_endpoint(counts_words) as endpoint:
        labelling.write(endpoint.url)
        endpoint.reply = refuses_to_grade_one
        unusable.add(read_beir(labelling.recipe.parent / "everyday").queries[odd].text)
        error = fail(*labelling.command, containing=["have no grade after 3 attempts", "I would rather not say."])
        assert 'teacher.remote.unanswered = "undecided"' in error
        num_odd = len(labelling.plan.entries[3].passage_ids)
        assert labelling.labels().num_pairs == labelling.num_pairs - num_odd
        unusable.clear()
        before = len(endpoint.requests)
        assert labelling.label()["pairs"] == num_odd
        assert len(endpoint.requests) == before + 2  # the trial, and the list that had no answer
    labelling.assert_complete()


def test_ctrl_c_keeps_what_was_answered(labelling: Labelling, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    waits = remote_endpoint.wait

    def waits_at_the_end(request: Request, number: int) -> Reply:
        if number > LEAVES_AFTER:
            released.wait(PATIENCE)
        return counts_words(request, number)

    def interrupted(running: Any, timeout: float) -> Any:
        until(lambda: running[0].done() or len(endpoint.requests) > 1 + LEAVES_AFTER)
        if not running[0].done():
            raise KeyboardInterrupt
        return waits(running, timeout=timeout)

    with local_endpoint(waits_at_the_end) as endpoint:
        labelling.write(endpoint.url)
        with monkeypatch.context() as patch:
            patch.setattr(remote_endpoint, "wait", interrupted)
            assert d2llm(*labelling.command).exit_code == 130
        released.set()
        first = answered_pairs(endpoint.requests[: 1 + LEAVES_AFTER])
        assert labelling.labels().num_pairs == len(first)


SLOW_TEACHER = """
import sys, time
from pathlib import Path
from d2llm.data.labels import LabelStore
from d2llm.models.teachers import causal, local
from d2llm.__main__ import main

causal._PREFIX_TOKENS, local._BATCH_PAIRS = 64, 4  # a few queries at a time, in small batches
put, write, events = local.Answers.put, LabelStore.write, Path(sys.argv.pop())

def note(event):
    with events.open("a") as file:
        file.write(event + " ")

def put_slowly(self, *scores):
    put(self, *scores)
    note("scored")
    time.sleep(0.2)

def write_slowly(self, labels, **options):
    note("writes")
    time.sleep(0.5)
    write(self, labels, **options)

local.Answers.put, LabelStore.write = put_slowly, write_slowly
main()
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_keeps_what_a_local_teacher_has_scored(labelling: Labelling, presses: int) -> None:
    """In a process of its own; the second Ctrl-C comes while the labels are written."""
    recipe, events = labelling.folder / "recipe.toml", labelling.folder / "events"
    model = f'model = "{labelling.recipe.parent / "decoder"}"\nprompt = "short"\nmax_tokens = 200'
    recipe.write_text(recipe_with_teacher(labelling.recipe, model))
    command = [*map(str, labelling.command), "--dtype", "float32"]

    def count(event: str) -> int:
        return events.read_text().split().count(event) if events.exists() else 0

    with PreparedProcess(script, SLOW_TEACHER, *command, str(events)) as process:
        process.until(lambda: count("scored") >= 8, "eight batches")
        process.send(signal.SIGINT)
        if presses == 2:
            process.until(lambda: count("writes"), "the labels")
            process.send(signal.SIGINT)
        assert process.wait() == 130
        said = process.errors.replace("\r", "\n")
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "stopped: run the same command again to continue; finished parts are kept"
    kept = labelling.labels().num_pairs
    assert 0 < kept < labelling.num_pairs
    result = succeed_with_report(*command, folder=labelling.folder)[1]["result"]
    assert (result["finished_pairs"], result["pairs"]) == (kept, labelling.num_pairs - kept)
    assert labelling.labels().num_duplicates == 0


# --- slow


def test_an_endpoint_slower_than_the_timeout_names_it_and_keeps_what_came_before(labelling: Labelling) -> None:
    def slow_in_the_middle(request: Request, number: int) -> Reply:
        return replace(counts_words(request, number), delay=1.0 if number == 1 + LEAVES_AFTER else 0.0)

    with local_endpoint(slow_in_the_middle) as endpoint:
        pace = "concurrency = 1\npatience_minutes = 0\ntimeout_seconds = "
        labelling.write(endpoint.url, remote=f"{pace}0.5")
        fail(*labelling.command, containing=["no answer within 0.5 seconds", "raise teacher.remote.timeout_seconds"])
        first = answered_pairs(endpoint.requests[: 1 + LEAVES_AFTER])
        assert labelling.labels().num_pairs == len(first)
        labelling.write(endpoint.url, remote=f"{pace}5")  # the same teacher
        report = labelling.label()
    assert report["finished_pairs"] == len(first)
    labelling.assert_complete()


def test_an_endpoint_that_is_slow_from_the_beginning_is_not_said_to_be_away(labelling: Labelling) -> None:
    with local_endpoint(lambda request, number: replace(counts_words(request, number), delay=0.6)) as endpoint:
        labelling.write(endpoint.url, remote="timeout_seconds = 0.2")
        fail(*labelling.command, containing=["no answer within 0.2 seconds", "teacher.remote.timeout_seconds"])
    assert labelling.labels().num_pairs == 0


# --- budgets


@pytest.mark.parametrize(
    "limit", ["max_tokens = 150", "max_cost = 0.2", "max_minutes = 0.000001"], ids=lambda limit: limit.split()[0]
)
def test_a_limit_says_what_is_left_and_the_same_command_goes_on(labelling, monkeypatch, limit: str):
    monkeypatch.setattr(pool_scores, "_PAIRS_AT_ONCE", 1)  # a query at a time
    prices = "price_per_million_prompt_tokens = 1000\nprice_per_million_written_tokens = 5000"
    with local_endpoint(counts_words) as endpoint:
        labelling.write(endpoint.url, remote=prices, settings=f"[labelling]\n{limit}")
        kept, calls = 0, 0
        while kept < labelling.num_pairs:
            result, report = succeed_with_report(*labelling.command, folder=labelling.folder)
            labelled = report["result"]
            assert labelled["finished_pairs"] == kept
            assert labelled["pairs"] > 0
            kept, calls = kept + labelled["pairs"], calls + 1
            assert labelled["unfinished_pairs"] == labelling.num_pairs - kept
            if kept < labelling.num_pairs:
                assert labelled["ended_by"] == f"labelling.{limit}".replace("0.000001", "1e-06")
                left = f"{labelling.num_pairs - kept:,} pairs are left, because {labelled['ended_by']} was reached"
                assert f"{left}: label again to go on, or raise the limit" in " ".join(result.stderr.split())
        assert calls > 2
        asked = answered_pairs(endpoint.requests)
    assert len({*asked}) == len(asked) == labelling.num_pairs
    labelling.assert_complete()


# --- answers that are not as asked


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_answer_lacks_is_asked_for_again(labelling: Labelling, kind: str) -> None:
    """``test_list_answers.py`` has all that an answer may lack."""
    answered: set[str] = set()
    between = "\n" if kind == "graded" else " > "

    def sloppy_at_first(request: Request, number: int) -> Reply:
        reply = counts_words(request, number)
        query, _ = judged_lists(request)
        if number == 0 or query in answered:
            return reply
        answered.add(query)
        text: str = reply.body["choices"][0]["message"]["content"]
        return Reply(chat(between.join(text.split(between)[:-1])))

    labelling = replace(labelling, kind=kind)
    with local_endpoint(sloppy_at_first) as endpoint:
        labelling.write(endpoint.url)
        report = labelling.label()
        lists = [judged_lists(request) for request in endpoint.requests[1:]]
    assert (report["pairs"], report["num_undecided"]) == (labelling.num_pairs, 0)
    assert len(lists) == 2 * len(labelling.plan.entries)
    labelling.assert_complete()
    labels = labelling.labels()
    dataset = read_beir(labelling.recipe.parent / "everyday")
    for entry in labelling.plan.entries:
        query, log_odds = dataset.queries[entry.query_id].text, labels.log_odds(entry.query_id)
        passages = {name: dataset.passages[name].full_text for name in entry.passage_ids}
        if kind == "graded":
            assert labels.grades(entry.query_id) == {name: grade(query, text) for name, text in passages.items()}
        else:
            ordered = sorted(log_odds, key=lambda name: -log_odds[name])
            shared = [shared_words(query, passages[name]) for name in ordered]
            assert shared == sorted(shared, reverse=True)

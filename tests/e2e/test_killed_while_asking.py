"""Processes that ask a model behind an API and are killed: the same work asks again only for what was on its way."""

from __future__ import annotations

import shutil
import signal
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from d2llm.data.labels import LabelStore
from d2llm.data.plan import read_plan
from d2llm.fitting.write_queries import DraftStore
from d2llm.methods.losses.soft_expansion import read_expansions
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.recipe.recipe import load_recipe
from e2e.command_line import fail, succeed, write_lines
from list_endpoint import KINDS, counts_words, recipe_with_teacher
from local_endpoint import LocalEndpoint, Reply, Request, always, chat, completion, local_endpoint
from prepared_process import PreparedProcess, program, script
from tiny_server import tiny_passages, write_tiny_index
from waiting import PATIENCE

ANSWERED, CONCURRENCY = 6, 2
PASSAGES = [f"the cat sleeps on mat number {n}" for n in range(9)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "d2llm"


def is_trial(request: Request) -> bool:
    return "Cows drink water." in request.prompt


def prompts(endpoint: LocalEndpoint) -> list[str]:
    return [request.prompt for request in endpoint.requests if not is_trial(request)]


def kill_while_asking(endpoint: LocalEndpoint, start: Callable[[], PreparedProcess]) -> None:
    """Kill a process that has so many answers, and is waiting for others."""
    reply, numbers, released = endpoint.reply, count(len(prompts(endpoint))), threading.Event()
    limit = len(prompts(endpoint)) + ANSWERED

    def stops(request: Request, number: int) -> Reply:
        if not is_trial(request) and next(numbers) >= limit:
            released.wait(PATIENCE)
            return Reply(hang_up=True)
        return reply(request, number)

    endpoint.reply = stops
    with start() as process:
        process.until(lambda: len(prompts(endpoint)) >= limit + CONCURRENCY, "it asked so often")
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    released.set()
    endpoint.reply = reply


# --- writers

WRITER = """
import sys
from pathlib import Path
from d2llm.recipe import WriterConfig
from d2llm.core.types import Passage
from d2llm.fitting.write_queries import DraftStore
from d2llm.fitting.write_queries import WritingBudget, write_queries
from d2llm.models.writers.writer import load_writer
from d2llm.methods.losses.soft_expansion import write_expansions

remote = {"url": sys.argv[1], "concurrency": 2}
config = WriterConfig.model_validate({"kind": "remote", "model": "served", "remote": remote})
folder, writer = Path(sys.argv[2]), load_writer(config)
"""
FIT = """
passages = [Passage(f"p{n}", f"This passage is about topic t{n} and its care in winter. " * 3) for n in range(40)]
store = DraftStore(folder, writer.fingerprint)
write_queries(passages, writer, store, config=config, budget=WritingBudget(), kinds={"question": 1.0})
"""
EXPANSIONS = """
write_expansions(folder / "passages.jsonl", [f"what about topic t{n} then" for n in range(70)], writer)
"""


def writes(request: Request, number: int) -> Reply:
    del number
    topic = request.prompt.split("topic ")[-1].split()[0]
    return Reply(chat(f"what is {topic} about?", usage=(50, 9)))


@pytest.mark.parametrize("work", [FIT, EXPANSIONS], ids=["fit", "expansions"])
def test_a_writer_that_is_killed_twice_loses_no_answer(work: str, tmp_path: Path) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    with local_endpoint(writes) as endpoint:
        for _ in range(2):
            kill_while_asking(endpoint, lambda: PreparedProcess(script, WRITER + work, endpoint.url, str(folder)))
        with PreparedProcess(script, WRITER + work, endpoint.url, str(folder)) as process:
            assert process.wait() == 0, process.errors
        assert (Counter(prompts(endpoint)) - Counter({*prompts(endpoint)})).total() == 2 * CONCURRENCY
    (file,) = folder.iterdir()  # nothing is left over
    if work == FIT:
        drafts = DraftStore(folder, file.stem.removeprefix("drafts-"))
        assert len(drafts) == 40
        assert drafts.num_tokens == (40 * 50, 40 * 9)
    else:
        written = read_expansions(file)
        assert written == {f"what about topic t{n} then": (f"what is t{n} about?",) for n in range(70)}


# --- teachers


def opinion(request: Request, number: int) -> Reply:
    """What a teacher of any kind says."""
    if "logprobs" not in request.body:
        return counts_words(request, number)
    value = zlib.crc32(request.prompt.encode()) % 1000 / 100
    return Reply(completion({" yes": -10 + value, " no": -5.0}, num_prompt_tokens=7))


Command = tuple[str, ...]


@pytest.fixture
def command(workspace: Path, tmp_path: Path) -> Callable[..., Command]:
    """The arguments of a verb of a run whose teacher is of a kind, at an address; mining uses its margin."""

    def arguments(verb: str, kind: str, url: str, settings: str = "teacher_margin = 0.5") -> Command:
        teacher = f'kind = "{kind}"\nmodel = "counts-words"\n'
        teacher += 'prompt = "short"\nmax_tokens = 350\n' if kind == "remote" else ""
        teacher += f'[teacher.remote]\nurl = "{url}"\nconcurrency = {CONCURRENCY}\n'
        teacher += "" if kind == "remote" else "[teacher.lists]\norders = 2\nsize = 2"
        teacher += "\nstep = 1" if kind == "listwise" else ""
        recipe = recipe_with_teacher(workspace / "tiny.toml", teacher)
        (tmp_path / "recipe.toml").write_text(recipe.replace("[mining]", f"[mining]\n{settings}"))
        return verb, str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"), "--dtype", "float32"

    return arguments


def results(folder: Path) -> object:
    """The plan of a run, and its labels."""
    identity = identify_teacher(load_recipe(str(folder / "recipe.toml")).teacher)
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts["asymmetric"], "dataset": "everyday"}
    labels, entries = LabelStore(folder / "run" / "labels", **key), read_plan(folder / "run/plans/everyday").entries
    assert labels.num_duplicates == 0
    return entries, [labels.log_odds(entry.query_id) for entry in entries]


@pytest.mark.parametrize("kind", ["remote", *KINDS])
@pytest.mark.parametrize("verb", ["mine", "label"])
def test_a_teacher_is_asked_again_only_for_what_was_on_its_way(verb: str, kind: str, command, tmp_path):
    """All lists are in one call, each is shown twice, and rankings have several windows."""
    with local_endpoint(opinion) as endpoint:
        if verb == "label":
            succeed(*command("mine", kind, endpoint.url, settings=""))
        arguments = command(verb, kind, endpoint.url, *([""] if verb == "label" else []))
        succeed(*arguments)
        usual, expected = Counter(prompts(endpoint)), results(tmp_path)
        shutil.rmtree(tmp_path / "run" / ("labels" if verb == "label" else ""))
        for _ in range(2):
            kill_while_asking(endpoint, lambda: PreparedProcess(program, *arguments))
            assert not [*(tmp_path / "run" / "labels").rglob("*.parquet")]
        succeed(*arguments)
        asked = Counter(prompts(endpoint)) - usual
        assert usual - asked == Counter()
        assert (asked - usual).total() == 2 * CONCURRENCY
        succeed(*arguments)
        assert Counter(prompts(endpoint)) == asked + usual  # nothing was left to ask
    assert not (tmp_path / "run" / "labels" / "answers").exists()
    assert results(tmp_path) == expected


def test_mine_keeps_the_answers_of_a_query_that_is_not_finished_when_labels_are_written(command, monkeypatch, tmp_path):
    """Labels are written as soon as they can be; the plan is interrupted after a few of the queries of one call."""
    from d2llm.evaluation import pool_scores
    from d2llm.training.mining.teacher import TeacherCheck

    monkeypatch.setattr(pool_scores, "_SHARD_SECONDS", 0.0)
    kept, keep = [0], TeacherCheck.keep

    def keep_and_copy(self: TeacherCheck, *arguments: object) -> None:
        keep(self, *arguments)  # type: ignore[arg-type]
        kept[0] += 1
        if kept[0] == 3:  # what a kill would leave here
            shutil.copytree(tmp_path / "run" / "labels", tmp_path / "left")

    monkeypatch.setattr(TeacherCheck, "keep", keep_and_copy)
    with local_endpoint(counts_words) as endpoint:
        arguments = command("mine", "graded", endpoint.url)
        succeed(*arguments)
        asked = prompts(endpoint)
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        shutil.copytree(tmp_path / "left", tmp_path / "run" / "labels")
        succeed(*arguments)
    assert prompts(endpoint) == asked


def test_mine_asks_again_for_answers_that_it_cannot_use(command: Callable[..., Command], tmp_path: Path) -> None:
    with local_endpoint(always(chat("I would rather not say."))) as endpoint:
        arguments = command("mine", "listwise", endpoint.url)
        fail(*arguments, containing=["after 3 attempts"])
        endpoint.reply = counts_words
        succeed(*arguments)


# --- verbs that store no labels


@pytest.fixture
def of_verb(tmp_path: Path) -> Iterator[tuple[LocalEndpoint, Callable[[str], Command]]]:
    """An endpoint, and the arguments of a verb with a teacher there that is asked often."""

    def arguments(verb: str) -> Command:
        file, settings = tmp_path / f"{verb}.toml", "orders = 2\nsize = 2"
        settings += "\nstep = 1" if verb == "search" else ""
        file.write_text(
            f'kind = "{"listwise" if verb == "search" else "graded"}"\nmodel = "counts-words"\n[remote]\n'
            f'url = "{endpoint.url}"\nconcurrency = {CONCURRENCY}\npatience_minutes = 0\n[lists]\n{settings}\n'
        )
        if verb == "judge":
            return "judge", "the cat sleeps", *PASSAGES, "--teacher", str(file)
        index = write_tiny_index(tmp_path)
        write_lines(tmp_path / "queries.jsonl", [{"_id": p.id, "text": p.text} for p in tiny_passages(40)])
        words = {
            "search": ("search", index, "the cat and the ship", "--reranker", f"teacher:{file}"),
            "calibrate": ("index", index, "calibrate", "--queries", tmp_path / "queries.jsonl", "--teacher", file),
        }
        return *map(str, words[verb]), *(("--reranker-set", "num_passages=12") if verb == "search" else ())

    with local_endpoint(counts_words) as endpoint:
        yield endpoint, arguments


@pytest.mark.parametrize("verb", ["judge", "search", "calibrate"])
def test_a_verb_without_labels_asks_again_only_for_what_was_on_its_way(verb: str, of_verb, cache):
    endpoint, arguments = of_verb[0], of_verb[1](verb)
    expected = succeed(*arguments).stdout
    usual = Counter(prompts(endpoint))
    kill_while_asking(endpoint, lambda: PreparedProcess(program, *arguments))
    assert (cache / "answers" / "answers.db").exists()
    assert succeed(*arguments).stdout == expected
    assert (Counter(prompts(endpoint)) - usual - usual).total() == CONCURRENCY
    assert not (cache / "answers").exists()
    assert succeed(*arguments).stdout == expected
    assert Counter(prompts(endpoint)).total() == 3 * usual.total() + CONCURRENCY  # each call asks


def test_judge_goes_on_after_an_error_of_the_endpoint(of_verb: tuple[LocalEndpoint, Callable[[str], Command]]) -> None:
    endpoint, arguments = of_verb[0], of_verb[1]("judge")
    succeed(*arguments)
    usual = len(prompts(endpoint))

    def refuses(request: Request, number: int) -> Reply:
        is_paid = len(prompts(endpoint)) <= usual + ANSWERED
        return counts_words(request, number) if is_paid else Reply({"error": "the account is empty"}, 403)

    endpoint.reply = refuses
    fail(*arguments, containing=["the account is empty"])
    refused = len(prompts(endpoint)) - usual - ANSWERED
    endpoint.reply = counts_words
    succeed(*arguments)
    assert len(prompts(endpoint)) == 2 * usual + refused


def test_a_cache_folder_that_cannot_be_written_is_a_warning(of_verb, cache):
    cache.parent.mkdir()
    cache.write_text("not a folder")
    result = succeed(*of_verb[1]("judge"))
    assert result.stderr.count("answers of the endpoint cannot be kept") == 1

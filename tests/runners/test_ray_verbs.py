"""``label`` and ``encode`` on workers of a real local Ray: the same labels and the same index as in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

import ray_work
from d2llm.core.errors import InputError
from d2llm.core.types import Passage
from d2llm.data.labels import LabelStore
from d2llm.evaluation.pool_scores import LabelWriter
from d2llm.models.student import Student
from d2llm.models.teachers.identity import identify_local_teacher
from d2llm.models.token_vectors import TokenProjection
from d2llm.recipe import RemoteConfig, TeacherConfig
from d2llm.retrieval import encode as encode_verb
from d2llm.retrieval import upserting
from d2llm.retrieval.chunking import default_chunking
from d2llm.retrieval.encode import encode
from d2llm.retrieval.index import Index
from d2llm.runners.ray_runner import RayRunner
from d2llm.store.index_manifest import Chunking
from d2llm.store.index_store import IndexStore
from d2llm.training import label as label_verb
from d2llm.training.label import LabelReport
from tiny_data import topics
from tiny_models import DIM, TEXTS, tiny_student_config, tiny_teacher_config, write_tiny_model
from waiting import until

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'd2llm[ray]'")
ONE = RayRunner(num_workers=1)


def document(number: int) -> Passage:
    text = ". ".join(TEXTS[(number + n) % len(TEXTS)] for n in range(number % 12 + 1))
    return Passage(f"d{number}", f"{text}.", f"title {number}", metadata={"year": number} if number > 40 else {})


DOCUMENTS = [document(number) for number in range(60)]


@pytest.fixture(scope="module", autouse=True)
def connected(cluster):
    """This process is connected to a cluster."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> TeacherConfig:
    return tiny_teacher_config(write_tiny_model(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory) -> Path:
    """A student that reads late chunks and has token embeddings."""
    folder = tmp_path_factory.mktemp("student")
    model = write_tiny_model(folder / "model", "bert")
    student = Student.create(tiny_student_config(model), device="cpu", dtype="float32")
    student.token_projection = TokenProjection(DIM, 8, [1.0] * 400)
    student.save(folder / "student")
    return folder / "student"


@pytest.fixture(scope="module")
def student(student_folder) -> Student:
    return Student.load(student_folder, device="cpu", dtype="float32")


def label(source, store, teacher, **options) -> LabelReport:
    return label_verb.label([source], store, teacher=teacher, device="cpu", dtype="float32", **options)


def labels_of(folder, teacher, source):
    """The log-odds of every pair and the Gram matrix of every query, as Python numbers."""
    identity = identify_local_teacher(teacher)
    key = {"teacher": identity.fingerprint, "prompt": identity.prompts[source.task], "dataset": source.dataset.name}
    store = LabelStore.open_for_reading(folder, **key)
    assert store.num_duplicates == 0
    grams = {query_id: store.gram(query_id) for query_id in store.query_ids}
    return {query_id: store.log_odds(query_id) for query_id in store.query_ids}, {
        query_id: (gram[0], gram[1].tolist()) for query_id, gram in grams.items() if gram is not None
    }


def test_labels_are_the_local_ones_bit_for_bit(tmp_path, teacher, monkeypatch, two):
    """Shards are the calls to the teacher that are made here too, also if a worker is killed in the middle.

    This process was interrupted after two of seven.
    """
    source = topics(num_train=160)
    here = label(source, tmp_path / "here", teacher)
    with monkeypatch.context() as patch:
        patch.setattr(LabelWriter, "add", write_and_stop(2))
        with pytest.raises(KeyboardInterrupt):
            label(source, tmp_path / "there", teacher)
    killed = tmp_path / "killed"
    load = partial(ray_work.load_and_die, str(killed), label_verb.load_work)
    monkeypatch.setattr(label_verb, "load_work", load)
    there = label(source, tmp_path / "there", teacher, runner=two)
    assert killed.exists()
    assert there.pairs + there.finished_pairs == here.pairs
    assert there.finished_pairs > 2 * 256
    assert labels_of(tmp_path / "there", teacher, source) == labels_of(tmp_path / "here", teacher, source)


class InTurn:
    """A runner in this process whose workers take shards in turn; like Ray's, some are done ahead of the results."""

    is_local = False

    def __init__(self, num_workers):
        self.num_workers = num_workers

    @contextmanager
    def workers(self, load, *, device=None, gpus=1):
        self.teachers = [load() for _ in range(self.num_workers)]
        yield self

    def map(self, shards, advance):
        shards = iter(shards)
        while batch := list(islice(shards, 2 * self.num_workers)):
            results = [self.teachers[number % self.num_workers](shard, advance) for number, shard in enumerate(batch)]
            yield from results


def test_labels_survive_a_change_of_the_number_of_workers(tmp_path, teacher, monkeypatch, two):
    """Begun by two workers of Ray, continued by one and finished by three; what is stored is never judged again."""
    first, second, third = two, InTurn(1), InTurn(3)
    source = topics(num_train=160)
    here = label(source, tmp_path / "here", teacher)
    expected, grams = labels_of(tmp_path / "here", teacher, source)
    store = tmp_path / "there"
    for runner, num_shards in ((first, 2), (second, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(LabelWriter, "add", write_and_stop(num_shards))
            with pytest.raises(KeyboardInterrupt):
                label(source, store, teacher, runner=runner)
    stored = sum(map(len, labels_of(store, teacher, source)[0].values()))
    last = label(source, store, teacher, runner=third)
    assert (last.finished_pairs, last.pairs) == (stored, here.pairs - stored)
    assert 3 * 256 <= stored < here.pairs
    assert label(source, store, teacher, runner=first).pairs == 0
    labels, other_grams = labels_of(store, teacher, source)  # with no pair stored twice
    assert labels.keys() == expected.keys()
    assert other_grams.keys() == grams.keys()
    for query_id, log_odds in expected.items():
        assert labels[query_id] == pytest.approx(log_odds, rel=1e-4, abs=1e-4)


def write_and_stop(num_shards):
    """``LabelWriter.add`` that writes every shard, and is interrupted after some."""
    written = []

    def add(writer, labels):
        writer.labels.write(labels)
        written.append(labels)
        if len(written) == num_shards:
            raise KeyboardInterrupt

    return add


def contents(folder):
    """What a search reads, row by row: passages, codes of vectors and of their parts, and words."""
    index = Index.open(folder)
    view, store = index.view, index.store
    rows = view.live_rows()
    parts = {kind: [part.tolist() for part in store.parts(store.table(), kind).take(rows)] for kind in view.part_kinds}
    words = {path.name: path.read_bytes() for path in sorted(folder.glob("words-*"))}
    return rows.tolist(), view.passages(rows), view.vectors(rows).tolist(), parts, words


def test_the_index_is_the_local_one_bit_for_bit(tmp_path, student, student_folder, monkeypatch, two):
    """Also if a worker is killed in the middle: whole texts, late chunks, windows, tokens and new metadata fields."""
    monkeypatch.setattr(upserting, "BLOCK_PASSAGES", 16)
    monkeypatch.setattr(upserting, "_BLOCK_WITH_TOKENS", 16)
    options = {
        "chunking": Chunking(24, late=True),
        "window_vectors": "int4",
        "token_vectors": "int4",
        "student_source": str(student_folder),
    }
    here = encode(DOCUMENTS, student, tmp_path / "here", **options)
    killed = tmp_path / "killed"
    monkeypatch.setattr(encode_verb, "load_work", partial(ray_work.load_and_die, str(killed), encode_verb.load_work))
    there = encode(DOCUMENTS, student, tmp_path / "there", runner=two, device="cpu", dtype="float32", **options)
    assert killed.exists()
    rows, _, _, parts, words = contents(tmp_path / "here")
    assert len(rows) > 60
    assert parts.keys() == {"window", "token"}
    assert words
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    for name in ("num_documents", "num_passages", "num_tokens", "num_truncated", "num_resumed"):
        assert getattr(there, name) == getattr(here, name), name


def test_shards_are_the_local_ones_bit_for_bit(tmp_path, student, student_folder, monkeypatch, two):
    monkeypatch.setattr(upserting, "_BLOCK_WITH_TOKENS", 8)
    options = {"token_vectors": "int4", "student_source": str(student_folder), "num_shards": 3}
    encode(DOCUMENTS, student, tmp_path / "here", **options)
    encode(DOCUMENTS, student, tmp_path / "there", runner=two, device="cpu", dtype="float32", **options)
    for number in range(3):
        shards = [tmp_path / name / f"shard-{number:04}" for name in ("there", "here")]
        assert contents(shards[0]) == contents(shards[1])
    assert Index.open(tmp_path / "there").verify().problems == []


def test_ctrl_c_leaves_an_index_that_can_be_continued(tmp_path, student, student_folder, room):
    """Ctrl-C in a terminal reaches the program and what it has started."""
    corpus, index = tmp_path / "corpus.jsonl", tmp_path / "index"
    lines = [json.dumps({"_id": passage.id, "title": passage.title, "text": passage.text}) for passage in DOCUMENTS]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    code = """
import sys
from functools import partial

import ray_work
from d2llm.cli.main import main
from d2llm.retrieval import encode, upserting

upserting.BLOCK_PASSAGES = 4
encode.load_work = partial(ray_work.load_slowly, encode.load_work)
main(sys.argv[1:])
"""
    arguments = ["encode", str(corpus), "--student", str(student_folder), "--out", str(index), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--runner", f"ray:{room}", "--workers", "1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    until(lambda: process.poll() is not None or num_written(tmp_path) > 8, "the first blocks", pause=0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert "stopped: run the same command again to continue" in errors
    assert not index.exists()
    options = {"chunking": default_chunking(student), "student_source": str(student_folder)}
    report = encode(corpus, student, index, **options)
    assert 8 < report.num_resumed < report.num_passages
    encode(corpus, student, tmp_path / "whole", **options)
    assert [passage.id for passage in contents(index)[1]] == [passage.id for passage in contents(tmp_path / "whole")[1]]


def num_written(folder) -> int:
    """The passages in the unfinished index."""
    drafts = [path.parent for path in folder.glob(".index.work-*/manifest.json")]
    return len(IndexStore.open(drafts[0]).table()) if drafts else 0


def test_a_remote_teacher_is_asked_from_here(tmp_path):
    teacher = TeacherConfig(model="judge", kind="remote", remote=RemoteConfig(url="http://127.0.0.1:1/v1"))
    with pytest.raises(InputError, match="label locally"):
        label(topics(num_train=4), tmp_path, teacher, runner=ONE)


def test_workers_must_know_where_the_student_is(tmp_path, student, monkeypatch):
    monkeypatch.setattr(student, "source", None)  # as of one that was trained and not saved
    with pytest.raises(InputError, match="student_source"):
        encode(DOCUMENTS, student, tmp_path / "index", runner=ONE)

"""Rounds of writing where a student fails: a real writer at an endpoint is shown what was missed, and how it ends."""

from __future__ import annotations

import json

import pytest
from written_rounds import Missed, recorded, rounds, written_by

from d2llm.core.errors import InputError
from d2llm.models.writers.writer import load_writer
from d2llm.recipe import WriterConfig, WriterEndpointConfig
from local_endpoint import Reply, chat, local_endpoint
from tiny_data import topics

DATASET = topics().dataset
MISSED = [Missed("how is it lost", "p03", "p05", 2.0), Missed("where is it", "p01", "p05", 1.0)]


class Learner:
    """Has the given dev measures, and gets wrong what nothing was written for."""

    def __init__(self, measures):
        self.measures, self.trained = iter(measures), []

    def untrained(self):
        return "untrained"

    def train(self, queries, ranked_by):
        self.trained.append((list(queries), ranked_by))
        return f"student {len(self.trained)}", next(self.measures)

    def missed(self, student, queries):
        written = {passage_id for _, passage_id in self.trained[-1][0]}
        return [each for each in MISSED if each.passage_id not in written]


def test_a_writer_is_shown_what_was_missed_and_its_passage():
    with local_endpoint(lambda request, number: Reply(chat("1. who lost it\n2. why was it lost\n"))) as served:
        config = WriterConfig(kind="remote", model="m", remote=WriterEndpointConfig(url=served.url))
        write = written_by(load_writer(config), DATASET)
        learner = Learner([0.5, 0.6, 0.6, 0.9])
        results = rounds(learner, [("first", "p00")], [], write, added=1, number=3)
    prompts = [request.prompt for request in served.requests[1:]]  # the first is a trial
    for prompt, missed in zip(prompts, MISSED, strict=True):
        assert prompt.count(DATASET.passages[missed.passage_id].text) == 2  # as an example, then to be asked about
        assert f"Question that fits it: {missed.query}" in prompt
    assert [each["dev"] for each in results] == [0.5, 0.6, 0.6]  # no third round, as the second gained nothing
    assert [each["missed"] for each in results] == [None, 2, 1]
    last, ranked_by = learner.trained[-1]
    new = [("who lost it", "p03"), ("why was it lost", "p03"), ("who lost it", "p01"), ("why was it lost", "p01")]
    assert last == [("first", "p00"), *new]
    assert ranked_by == "student 2"


def test_what_is_not_recorded_is_put_into_a_packet(tmp_path):
    write = recorded(tmp_path / "rounds.jsonl", DATASET, tmp_path / "packet.jsonl")
    (tmp_path / "rounds.jsonl").write_text(json.dumps({"id": "p03", "queries": ["one", "other"]}) + "\n")
    with pytest.raises(InputError, match="no queries for 1 passages"):
        write(MISSED)
    (line,) = (tmp_path / "packet.jsonl").read_text().splitlines()
    texts = {"passage": DATASET.passages["p01"].text, "taken": DATASET.passages["p05"].text}
    assert json.loads(line) == {"id": "p01", "missed": "where is it"} | texts
    assert write(MISSED[:1]) == [("one", "p03"), ("other", "p03")]

"""What a large language model really wrote, replayed through the endpoint protocol, is parsed, kept and stored."""

from __future__ import annotations

import json

import pytest
from recorded_writer import read_recorded, recorded_writer

from d2llm.data.beir import read_beir
from d2llm.fitting.critic import query_fault
from d2llm.fitting.write_queries import DraftStore, WritingBudget, write_queries
from d2llm.models.writers.writer import load_writer
from d2llm.recipe import WriterConfig, WriterEndpointConfig

NUM_QUERIES = 64


@pytest.mark.parametrize("name", ["stackfaq", "covidqa"])
def test_recorded_answers_become_queries(shared_data, tmp_path, name):
    corpus = read_beir(shared_data / name, splits=["test"]).passages
    passages = sorted(corpus.values(), key=lambda passage: passage.id)
    with recorded_writer(shared_data / name) as url:
        config = WriterConfig(kind="remote", model="recorded", remote=WriterEndpointConfig(url=url))
        writer = load_writer(config)
        store = DraftStore(tmp_path / "drafts", writer.fingerprint)
        report = write_queries(passages, writer, store, config=config, budget=WritingBudget(queries=NUM_QUERIES))
    recorded = {query for queries in read_recorded(name).values() for query in queries}
    written = [query for line in store.path.read_text().splitlines() for query in json.loads(line)["queries"]]
    assert report.num_problems == 0
    assert report.num_queries == len(written) >= NUM_QUERIES
    assert set(written) <= recorded
    first = list(read_recorded(name).items())[:NUM_QUERIES]
    faults = [query_fault(query, corpus[passage_id].text) for (passage_id, _), queries in first for query in queries]
    assert sum(fault is not None for fault in faults) <= 0.05 * len(faults)

"""What the expansion of queries by a language model gains and costs: plain search, other queries (multi), HyDE.

    python benchmarks/expansion.py                  the shipped student and smollm2, half an hour
    python benchmarks/expansion.py --writer MODEL --endpoint URL

nDCG@10 of 100 dev queries of each of two data sets, with the difference from the plain search, and seconds per query.
What the model writes is kept in the result file, 25 queries at a time, so that an interrupted run continues; delete the
file to write anew. covidqa (Apache 2.0, texts CC BY and similar) and stackfaq (research only) are only measured on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scaling.corpus import write_json
from scaling.data_sets import DATA, require

from d2llm import Index, Query
from d2llm.core.inputs import strings_of
from d2llm.core.types import ExpansionMethod, QueryExpansion
from d2llm.data.beir import read_beir
from d2llm.models.writers.writer import load_writer
from d2llm.ops.measures import per_query_measures
from d2llm.ops.significance import bootstrap_interval, paired_randomisation
from d2llm.recipe import RemoteWriterConfig, WriterConfig, WriterEndpointConfig
from d2llm.retrieval.expansion import Expansion

SETS = ("covidqa", "stackfaq")
METHODS: tuple[ExpansionMethod, ...] = ("multi", "hyde")
QUERIES, AT_ONCE = 100, 25
RESULT = Path("expansion.json")  # holds queries of the data sets, so it is not kept with other results


class WrittenBefore(Expansion):
    """An expansion whose texts have been written."""

    def __init__(self, method: ExpansionMethod, written: dict[str, Any]) -> None:
        self.method = method
        self.written = written

    @overload
    def expand(self, queries: str) -> QueryExpansion: ...  # pyright: ignore[reportOverlappingOverload] - no list of letters
    @overload
    def expand(self, queries: Iterable[str]) -> list[QueryExpansion]: ...
    def expand(self, queries: Iterable[str] | str) -> QueryExpansion | list[QueryExpansion]:
        if isinstance(queries, str):
            return QueryExpansion(**self.written[queries] | {"texts": tuple(self.written[queries]["texts"])})
        return [self.expand(query) for query in strings_of(queries, "queries")]


def write(expansion: Expansion, queries: list[str], written: dict[str, Any], save: Any) -> None:
    """Expand the queries that are not in ``written`` yet."""
    left = [query for query in queries if query not in written]
    for start in range(0, len(left), AT_ONCE):
        part = left[start : start + AT_ONCE]
        written |= {query: asdict(one) for query, one in zip(part, expansion.expand(part), strict=True)}
        save()
        print(f"{expansion.method}: {len(written)} of {len(queries)} queries", flush=True)


def measure(data: Path, index: Index, written: dict[str, Any], queries: list[Query]) -> dict[str, Any]:
    """All figures of one data set."""
    dataset = read_beir(data, splits=["dev"])
    qrels = {query.id: dataset.qrels["dev"][query.id] for query in queries}
    figures: dict[str, Any] = {}
    plain: np.ndarray | None = None
    for method in (None, *METHODS):
        expansion = None if method is None else WrittenBefore(method, written[method])
        rankings = index.search(queries, expansion=expansion)
        runs = {ranking.query.id: [result.passage.id for result in ranking.passages] for ranking in rankings}
        values = np.array(list(per_query_measures(runs, qrels)["nDCG@10"].values()))
        seconds = dict.fromkeys(("expansion", "search"), 0.0)
        for ranking in rankings:
            for stage, one in ranking.seconds.items():
                seconds["expansion" if stage == "expansion" else "search"] += one / len(rankings)
        figures[method or "plain"] = {"nDCG@10": round(float(values.mean()), 4)} | {
            f"seconds {stage}": round(value, 3) for stage, value in seconds.items()
        }
        if plain is None:
            plain = values
            continue
        interval = bootstrap_interval(values - plain)
        expansions = [ranking.expansion for ranking in rankings if ranking.expansion is not None]
        figures[method or "plain"] |= {
            "difference": [round(float(value), 4) for value in ((values - plain).mean(), interval.low, interval.high)],
            "p": round(paired_randomisation(values, plain), 4),
            "better, worse": [int((values > plain).sum()), int((values < plain).sum())],
            "without a text": sum(one.problem is not None for one in expansions),
            "texts": sum(len(one.texts) for one in expansions),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--writer", default="smollm2")
    parser.add_argument("--endpoint")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    require(*(options.data / name for name in SETS))
    config = WriterConfig(model=options.writer)
    if options.endpoint is not None:
        config = RemoteWriterConfig(model=options.writer, remote=WriterEndpointConfig(url=options.endpoint))
    content: dict[str, Any] = {"student": options.student, "writer": options.writer, "figures": {}, "written": {}}
    if options.json.is_file():
        content |= json.loads(options.json.read_text())
    writer = load_writer(config)
    for name in SETS:
        dataset = read_beir(options.data / name, splits=["dev"])
        ids = random.Random(0).sample(sorted(dataset.qrels["dev"]), QUERIES)
        queries = [dataset.queries[query_id] for query_id in ids]
        written = content["written"].setdefault(name, {method: {} for method in METHODS})
        for method in METHODS:
            texts = [query.text for query in queries]
            write(Expansion(writer, method), texts, written[method], lambda: write_json(options.json, content))
        with TemporaryDirectory() as folder:
            index = Index.create(Path(folder) / "index", options.student)
            index.upsert(dataset.passages.values())
            content["figures"][name] = measure(options.data / name, index, written, queries)
        write_json(options.json, content)
        print(name, json.dumps(content["figures"][name], indent=1), flush=True)


if __name__ == "__main__":
    main()

"""Bytes and milliseconds that `d2llm size` predicts, beside those of real indexes: the goal is within 25 %.

    python benchmarks/size.py                                     10,000 and 20,000 passages
    python benchmarks/size.py --passages 1000000 --real 5000 --queries 100 --index INDICES/engine-1000000
    python benchmarks/size.py --ship      write the figures that ship with d2llm

An index is built for each number of passages, as `score_features.py` does it: texts are variations of real ones,
doubled in length, vectors of windows are random, those of tokens are variations too. With `--index`, it is the one that
`engine.py` has left; results/size.json has those of 100,000 and 1,000,000 passages. Then the speeds of this machine
are measured, as `d2llm size --measure` does, and facts about texts are taken from some of the passages. The prediction
knows nothing of these indexes. With `--written`, larger indexes are filled up with copies of so many passages: other
ids and vectors, the same texts.

One thread, one query at a time, without encoding it; the kinds of search are interleaved for each query. Times are
those of the processor; still, other work on the machine takes some of the memory's speed from one part or the other.

What ships with d2llm are the speeds of the machine on which `--ship` is run, which must be idle, and what other
benchmarks have found of teachers, of the approximate index and of BM25. Licences of the texts: squad-sent CC BY-SA 4.0,
medquad CC BY 4.0, quora for research only; only facts such as their lengths are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and FAISS are imported

import numpy as np
import torch
from scaling.corpus import FRACTIONS, Corpus, KnownVectors, Queries, read_real, write_json
from scaling.data_sets import DATA, require
from scaling.stores import build

from d2llm import Student
from d2llm.core.errors import InputError
from d2llm.core.types import Passage, Query, ScoreFeature
from d2llm.data.beir import read_beir
from d2llm.models.score_features import FeatureWeights
from d2llm.retrieval.build_ann import MIN_PASSAGES, build_ann
from d2llm.retrieval.local_segment import open_view
from d2llm.retrieval.search import Searcher, SearchSettings
from d2llm.retrieval.shard import shard
from d2llm.sizing.index_bytes import StudentFacts, index_parts
from d2llm.sizing.measure import measure_speeds
from d2llm.sizing.plan import SizePlan
from d2llm.sizing.search_time import AnnFacts, MaxScoreFacts, search_stages, total_ms
from d2llm.sizing.speeds import Speed, Speeds, TeacherSpeed
from d2llm.sizing.texts import read_text_facts
from d2llm.store.index_store import IndexStore
from d2llm.store.shards import Storage

STUDENT = "d2llm-minilm"
RESULTS = Path(__file__).parent / "results"
SHIPPED = Path(__file__).parents[1] / "src" / "d2llm" / "sizing"
WORDS: dict[ScoreFeature, float] = {"bm25": 0.1, "bm25_fraction": 2.0, "window_bm25": 0.05, "window_bm25_fraction": 1.0}
KINDS: dict[str, dict[ScoreFeature, float]] = {
    "vectors alone": {},
    "words, also of windows": WORDS,
    "words and vectors of windows": {**WORDS, "window_vectors": 0.5},
    "words and vectors of tokens": {**WORDS, "maxsim": 30.0},
}
GOAL = 1.25
MACHINE = "servers of two cores with AVX512-BF16"  # on which what ships is measured


class Predictions:
    """What `d2llm size` says about indexes of a corpus."""

    def __init__(
        self, student: Student, corpus: Corpus, queries: Queries, seconds: float, *, window_vectors: bool
    ) -> None:
        passages, _ = next(corpus.blocks())
        self.texts = read_text_facts(passages, student, "a sample of the corpus", queries=queries.texts)
        windows, tokens = "int3" if window_vectors else "none", round(self.texts.tokens)
        self.plan = SizePlan(passages=corpus.size, tokens=tokens, window_vectors=windows, token_vectors="int4")
        self.student = StudentFacts.of_student(student, self.plan)
        self.speeds = measure_speeds(student, passages[:4_000], queries=queries.texts, seconds=seconds)

    def bytes(self, num_passages: int, *, approximate: bool) -> dict[str, int]:
        parts = index_parts(self.plan, self.student, self.texts, num_passages, approximate=approximate)
        return {part.part.split(",")[0]: part.disk for part in parts}

    def ms(
        self, num_passages: int, terms: dict[ScoreFeature, float], ann: AnnFacts | None = None, num_shards: int = 1
    ) -> float:
        """Without encoding the query; of all shards together."""
        student, of_shard = replace(self.student, weights=FeatureWeights(terms=terms)), num_passages // num_shards
        stages = search_stages(self.plan, student, self.texts, self.speeds, of_shard, num_shards=num_shards, ann=ann)
        return total_ms(stages[1:]) + (num_shards - 1) * total_ms(stage for stage in stages if stage.per_shard)


def measure(
    student: Student, corpus: Corpus, known: KnownVectors, queries: Queries, args: argparse.Namespace
) -> dict[str, Any]:
    """Predicted and measured bytes and milliseconds for a corpus."""
    size, kinds = corpus.size, KINDS
    with tempfile.TemporaryDirectory() as work_folder:
        folder, ann = args.index or Path(work_folder) / "index", None
        if args.index is None:
            build(folder, corpus, known, "bfloat16", 2, "int3", "int4", args.written)
        store, measured = IndexStore.open(folder), bytes_of(folder)
        if "window" not in store.part_formats:
            kinds = {name: terms for name, terms in KINDS.items() if "window_vectors" not in terms}
            del measured["vectors of windows"]
        if size >= MIN_PASSAGES:
            try:
                ann, measured["approximate index"] = built_ann(store, student)
            except InputError as error:  # too many of these passages are variations of few
                print(f"no approximate index: {error}")
        # Speeds are measured just before the searches, since what else the machine does changes them.
        predictions = Predictions(student, corpus, queries, args.seconds, window_vectors="window" in store.part_formats)
        ms = times(Storage.single(store), student, known, queries, kinds, approximate=ann is not None)
        in_shards: dict[str, float] = {}
        if args.shards:
            shards = Path(work_folder) / "shards"
            shard(folder, shards, args.shards)
            in_shards = times(Storage.open(shards), student, known, queries, kinds, approximate=False)
    predicted = predictions.bytes(size, approximate=ann is not None)
    rows = {name: row(predicted[name], measured[name]) for name in measured}
    rows["in all"] = row(sum(predicted.values()), sum(measured.values()))
    compared = {name: row(predictions.ms(size, terms), ms[name]) for name, terms in kinds.items()}
    for name in in_shards:
        predicted_ms = predictions.ms(size, kinds[name], num_shards=args.shards)
        compared[f"{name}, {args.shards} shards"] = row(predicted_ms, in_shards[name])
    if ann is not None:
        compared["approximate"] = row(predictions.ms(size, {}, ann), ms["approximate"])
    inputs = {"texts": predictions.texts, "speeds": predictions.speeds, **({"ann": ann} if ann is not None else {})}
    dumped = {name: model.model_dump(mode="json") for name, model in inputs.items()}
    return {"passages": size, "bytes": rows, "ms": compared, "predicted from": dumped}


def built_ann(store: IndexStore, student: Student) -> tuple[AnnFacts, int]:
    """Build an approximate index; what it reads, and its bytes.

    How many rows must be compared depends on the texts: that is an input, as it is for `d2llm size`.
    """
    report = build_ann(store, student)
    facts = AnnFacts(
        source="this index",
        passages=report.num_passages,
        first_ten=min(report.first_ten, 0.997),  # passages served as queries there and may find all ten
        candidates=report.depth,
        visited=report.num_visited,
    )
    return facts, report.num_bytes


def row(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "ratio": predicted / measured}


def bytes_of(folder: Path) -> dict[str, int]:
    """Bytes on disk by part, under the names that `d2llm size` gives them."""

    def files(pattern: str) -> int:
        return sum(path.stat().st_size for path in folder.glob(pattern))

    vectors = files("vectors-*")  # once more in the table
    table = files("passages.db*")
    others = files("manifest.json")
    return {
        "texts and ids": table - vectors + others,
        "vectors": 2 * vectors,
        "words": files("words-*"),
        "vectors of windows": files("window-*"),
        "vectors of tokens": files("token-*"),
    }


def times(
    storage: Storage,
    student: Student,
    known: KnownVectors,
    queries: Queries,
    kinds: dict[str, dict[ScoreFeature, float]],
    *,
    approximate: bool,
) -> dict[str, float]:
    """Median milliseconds of a core for each kind of search of an encoded query, with reading the texts of results."""
    view = open_view(storage)
    settings = {
        name: SearchSettings(
            task="asymmetric", score_features=terms, sources=("vectors", "bm25") if terms else ("vectors",)
        )
        for name, terms in kinds.items()
    }
    if approximate:
        settings["approximate"] = SearchSettings(task="asymmetric", score_features={}, sources=("ann",))
    searchers = {name: Searcher(view, known, each) for name, each in settings.items()}
    kept: dict[str, list[float]] = {name: [] for name in searchers}
    for searcher in searchers.values():
        searcher.rank([Query("0", queries.texts[0])])  # one-time work is not counted
    for number, text in enumerate(queries.texts):
        for name, searcher in searchers.items():
            read = student.encode_with_tokens([text], "query")  # for each: a scan would leave vectors in the caches
            assert read.tokens is not None
            begin = time.process_time()
            searcher.rank([Query(str(number), text)], vectors=read.vectors, tokens=read.tokens.split())
            kept[name].append(1e3 * (time.process_time() - begin))
    return {name: float(np.median(values)) for name, values in kept.items()}


def read_result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def benchmark_passages() -> tuple[list[Passage], list[str]]:
    """Passages of squad-sent, quora and medquad, and questions of squad-sent."""
    passages: list[Passage] = []
    for name, fraction in FRACTIONS.items():
        content = read_beir(DATA / name, splits=["dev"])
        passages += list(content.passages.values())[: round(4_000 * fraction)]
    dev = read_beir(DATA / "squad-sent", splits=["dev"])
    return passages, [dev.queries[query_id].text for query_id in list(dev.qrels["dev"])[:100]]


def sentence_tokens(student: Student) -> float:
    """Mean tokens of the passages that `teacher.py` was run with."""
    passages = read_beir(DATA / "squad-sent", splits=["dev"]).passages.values()
    return float(np.mean(student.tokenize([passage.full_text for passage in passages], "passage").lengths))


def shipped_speeds(student: Student, passages: list[Passage], questions: list[str], seconds: float) -> Speeds:
    """Those of this machine, as a user measures them, and those of the teacher of `teacher.py`."""
    measured = measure_speeds(student, passages, queries=questions, seconds=seconds)
    content = measured.model_dump_json().replace("measured on this machine", f"`d2llm size --measure` on {MACHINE}")
    teacher = read_result("teacher")
    judged = teacher["rows"]["paper, bfloat16"]
    smollm2 = TeacherSpeed(
        value=judged["judge_pairs_per_second"] / teacher["threads"],
        source="benchmarks/results/teacher.json, prompt paper in bfloat16",
        pair_tokens=judged["tokens_per_pair"],
        passage_tokens=sentence_tokens(student),
    )
    # The student has an interaction for the other task only.
    dot = next(
        one
        for one in read_result("scoring")["heads"]
        if (one["head"], one["features"], one["hidden"]) == ("dot", "rich", 512)
    )
    source = "benchmarks/results/scoring.json, dot, rich, 512 wide"
    pairs = Speed(value=1e6 / dot["candidates_ms_one_thread"], source=source)
    update = {"machine": MACHINE, "teachers": {"smollm2": smollm2}, "interaction_pairs": pairs}
    return Speeds.model_validate_json(content).model_copy(update=update)


def shipped_maxscore() -> MaxScoreFacts:
    """How much BM25 reads."""
    bm25 = read_result("bm25")
    return MaxScoreFacts(
        source=f"benchmarks/results/bm25.json, {bm25['passages']:,} passages",
        read=tuple((int(depth) / bm25["passages"], read) for depth, read in bm25["of which are read"].items()),
    )


def shipped_ann() -> AnnFacts:
    """What the approximate index of 100,000 passages visited here."""
    measured = next(one["predicted from"]["ann"] for one in read_result("size")["sizes"] if one["passages"] == 100_000)
    return AnnFacts.model_validate(measured | {"source": "benchmarks/results/size.json, 98% of the first 200"})


def ship(student: Student, seconds: float) -> None:
    """Write what ships with d2llm."""
    passages, questions = benchmark_passages()
    texts = read_text_facts(passages, student, f"4,000 passages of {', '.join(FRACTIONS)}", queries=questions)
    shipped = {
        # Of a user's passages only the mean length is known; as parts of documents, they differ less than these.
        "texts": texts.model_copy(update={"lengths": (1.0,)}),
        "speeds": shipped_speeds(student, passages, questions, seconds),
        "ann": shipped_ann(),
        "maxscore": shipped_maxscore(),
    }
    for name, content in shipped.items():
        text = json.dumps(content.model_dump(mode="json"), indent=1)
        (SHIPPED / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(text)


def main() -> None:
    """Measure, print and optionally write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=[10_000, 20_000])
    parser.add_argument("--real", type=int, default=1_000, help="real passages among them; the rest are variations")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each speed is measured")
    parser.add_argument(
        "--written", type=int, help="passages written as a user does; the rest are copies; default: all"
    )
    parser.add_argument("--index", type=Path, help="the index of these passages, as engine.py --work leaves it")
    parser.add_argument("--shards", type=int, help="also search the index in so many shards, in one process")
    parser.add_argument("--cache", type=Path, help="folder in which to cache the real passages' vectors")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--ship", action="store_true", help="write the figures that ship with d2llm instead")
    args = parser.parse_args()
    require(*(DATA / name for name in FRACTIONS))
    torch.set_num_threads(1)
    student = Student.load(STUDENT)
    if args.ship:
        ship(student, args.seconds)
        return
    real, vectors, queries, _ = read_real(student, DATA, args.real, args.queries, args.cache)
    results: list[dict[str, Any]] = []
    for passages in args.passages:
        corpus = Corpus(real, vectors, passages, longer=2)
        known = KnownVectors(student, list(queries.values()), real)
        result = measure(student, corpus, known, queries["asymmetric"], args)
        results.append(result)
        print(f"\n{passages:,} passages{'':<32} predicted     measured   ratio")
        for unit in ("bytes", "ms"):
            for name, one in result[unit].items():
                missed = "" if 1 / GOAL <= one["ratio"] <= GOAL else "   beyond 25 %"
                figures = f"{one['predicted']:13,.1f} {one['measured']:12,.1f}   {one['ratio']:.2f}"
                print(f"{unit + ', ' + name:<44} {figures}{missed}")
    if args.json:
        write_json(args.json, {"student": STUDENT, "threads": 1, "sizes": results})


if __name__ == "__main__":
    main()

"""Heads that see tokens, on the lists and dev queries on which `d2llm ablate` compares heads that see vectors.

Each design of `token_interaction.py` is added to the cosine z of the recipe's backbone before training, whose tokens
are compared by their own states: z + B tanh(g) for the first 50 passages of a query. Two more:

- `maxsim`: the mean, over the query's tokens, of the highest cosine with a token of the passage, with one weight.
- `knrm`: a linear function of eleven kernels in place of z (Xiong et al., "End-to-End Neural Ad-hoc Ranking with Kernel
  Pooling", SIGIR 2017, with tokens that stand still).

Targets are half the teacher's distribution over a list and half the judgements, as in the recipe's losses. Each data
set has a head of its own, as a task has a branch. What fraction of g is added is chosen on dev, as training chooses the
weight of an interaction.

    python benchmarks/recorded_lists.py benchmarks/graded_lists/static-interaction.toml DATA RUN --queries 240
    python benchmarks/token_heads.py benchmarks/graded_lists/static-interaction.toml DATA RUN \
        --json benchmarks/results/token-heads.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recorded_judge import RECORDED
from token_interaction import (
    BOUND,
    DESIGNS,
    FIRST,
    MAX_TOKENS,
    Lists,
    Training,
    changes,
    join,
    ndcg,
    pooled_kernels,
    token_idfs,
    token_inputs,
    train,
)
from torch import Tensor, nn

from d2llm import Run, Student
from d2llm.core.types import Qrels
from d2llm.data.labels import LabelStore
from d2llm.data.plan import TrainingSource
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.models.tokens import TextKind
from d2llm.ops.bm25_words import terms, tokens_of_terms
from d2llm.recipe import untuned_config
from d2llm.store.bm25 import WordIndex
from d2llm.store.word_segment import WordSegment
from d2llm.training.ablate import DEV_QUERIES, MEASURING_SEED
from d2llm.training.dev_sets import make_dev_set

Row = tuple[str, str, list[str]]
"""A query's id and text, and the ids of the passages of its list."""


class MaxSim(nn.Module):
    """One weight of the mean of the tokens' best cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 1, bias=False)

    def forward(self, lists: Lists) -> Tensor:
        return self.last(10 * lists.scores[:, :, 4:])


class KNRM(nn.Module):
    """A linear function of eleven kernels; what is added to z takes z away."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(11, 1)

    def forward(self, lists: Lists) -> Tensor:
        return self.last(10 * lists.kernels[:, :, :11]) - lists.scores[:, :, :1]


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "maxsim": lambda _: MaxSim(),
    "knrm": lambda _: KNRM(),
    **{name: DESIGNS[name] for name in ("tokens", "kernels", "transformer", "generated")},
}
ALONE = "knrm"
_NO_BOUND = 1e6


class Reader:
    """What the heads read of the queries and passages of one data set, by a student that stands still."""

    def __init__(self, source: TrainingSource, student: Student) -> None:
        self.source, self.student = source, student
        self.words = WordIndex([WordSegment.from_texts([each.full_text for each in source.dataset.passages.values()])])
        self.read: dict[str, tuple[NDArray[np.float32], NDArray[np.float32], set[str]]] = {}

    def ids_of(self, text: str, kind: TextKind) -> list[int]:
        """The ids of a text's tokens."""
        return self.student.backbone.tokenize([text], kind).ids[0]

    def states(self, text: str, kind: TextKind) -> tuple[NDArray[np.float32], NDArray[np.float32], list[int]]:
        """The vector [dim] of a text, the unit vectors [tokens, dim] of its tokens, and their places in its ids."""
        ids = self.ids_of(text, kind)
        special = {*map(int, self.student.backbone.tokenizer.all_special_ids)}
        kept = [place for place, token in enumerate(ids) if token not in special]
        with torch.inference_mode():
            states, mask = self.student.backbone(*self.student.backbone.pad([ids]))
            vector = self.student.pooling(states, mask)[0].float().numpy()
        tokens = states[0, kept].float().numpy()
        return vector, tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-6), kept

    def passage(self, passage_id: str) -> tuple[NDArray[np.float32], NDArray[np.float32], set[str]]:
        """Its vector, those of its tokens, and its words."""
        if passage_id not in self.read:
            text = self.source.passage_text(passage_id)
            vector, tokens, _ = self.states(text, "passage")
            tokens = tokens if len(tokens) else np.zeros((1, len(vector)), np.float32)
            self.read[passage_id] = vector, tokens, set(terms(text))
        return self.read[passage_id]

    def lists(self, rows: Sequence[Row], targets: Mapping[str, NDArray[np.float32]], qrels: Qrels) -> Lists:
        """The inputs of lists of at most ``FIRST`` passages; those of longer ones are the first by z."""
        made = [self._one(query, text, ids, targets, qrels) for query, text, ids in rows]
        return join(made)

    def _one(
        self, query: str, text: str, ids: Sequence[str], targets: Mapping[str, NDArray[np.float32]], qrels: Qrels
    ) -> Lists:
        vector, tokens, places = self.states(text, "query")
        tokens, places = tokens[:MAX_TOKENS], places[:MAX_TOKENS]
        vectors = np.stack([self.passage(each)[0] for each in ids])
        own = self.student.score(vector, vectors, self.source.task)
        order: list[int] = np.argsort(-own, kind="stable").tolist()
        kept = order[:FIRST] if len(ids) > FIRST else [*range(len(ids))]
        passages = [self.passage(ids[row]) for row in kept]
        counts = np.array([len(each[1]) for each in passages])
        spans = self.student.backbone.token_spans(text, len(self.ids_of(text, "query")), "query")
        of_token: list[set[str]] = [set() for _ in places]
        for term, owners in tokens_of_terms(text, [spans[place] for place in places]).items():
            for owner in owners:
                of_token[owner].add(term)
        idf = token_idfs(self.words, of_token, len(self.source.dataset.passages))
        matches = np.array([[bool(own_terms & each[2]) for own_terms in of_token] for each in passages])
        cosines = tokens @ np.concatenate([each[1] for each in passages]).T
        best = np.maximum.reduceat(cosines, np.cumsum(counts) - counts, axis=1).mean(axis=0)
        scores, inputs = np.zeros((len(kept), 5), np.float32), np.zeros((len(kept), MAX_TOKENS, 8), np.float32)
        scores[:, 0] = scores[:, 1] = own[kept]
        scores[:, 4] = best
        inputs[:, : len(places)] = token_inputs(cosines, counts, idf, matches)
        judged = qrels.get(query, {})
        ideal = sorted((grade for grade in judged.values() if grade > 0), reverse=True)[:10]
        return Lists(
            torch.ones(1, len(kept), dtype=torch.bool),
            torch.from_numpy(scores)[None],
            torch.from_numpy(inputs)[None],
            (torch.arange(MAX_TOKENS) < len(places))[None],
            torch.from_numpy(pooled_kernels(cosines, counts, idf))[None],
            torch.from_numpy(vector)[None],
            torch.from_numpy(np.stack([each[0] for each in passages])).half()[None],
            torch.from_numpy(targets[query] if query in targets else np.zeros(len(kept), np.float32))[None],
            torch.tensor([[float(judged.get(ids[row], 0)) for row in kept]]),
            torch.tensor([sum(gain / np.log2(rank + 2) for rank, gain in enumerate(ideal))]),
        )


def train_lists(reader: Reader, store: LabelStore) -> Lists:
    """The train lists of a plan that have labels, with half the teacher's distribution and half the judgements."""
    rows: list[Row] = []
    targets: dict[str, NDArray[np.float32]] = {}
    for entry in reader.source.plan.entries:
        log_odds, ids = store.log_odds(entry.query_id), [*entry.positives, *entry.hard_negatives]
        if not log_odds:
            continue
        taught = np.exp(np.array([log_odds[each] for each in ids]) - max(log_odds.values()))
        judged = np.array([each in entry.positives for each in ids]) / len(entry.positives)
        rows.append((entry.query_id, reader.source.query_text(entry.query_id), ids))
        targets[entry.query_id] = np.log(0.5 * taught / taught.sum() + 0.5 * judged + 1e-9).astype(np.float32)
    return reader.lists(rows, targets, reader.source.dataset.qrels["train"])


def dev_lists(reader: Reader, num_passages: int) -> Lists:
    """The dev queries, with the first passages of the corpus on which `d2llm ablate` measures."""
    dev = make_dev_set(reader.source, num_queries=DEV_QUERIES, num_passages=num_passages, seed=MEASURING_SEED)
    rows = [(query, text, [*dev.candidates[query]]) for query, text in dev.queries.items()]
    return reader.lists(rows, {}, dev.qrels)


def measure(head: str, lists: Mapping[str, tuple[Lists, Lists]], seed: int) -> dict[str, float]:
    """nDCG@10 of a head on each data set, with the fraction that is best there."""
    found: dict[str, float] = {}
    for name, (taught, dev) in lists.items():
        bound = _NO_BOUND if head == ALONE else BOUND
        model, _ = train(HEADS[head], Training(taught, seed, epochs=20, bound=bound))
        before = float(ndcg(dev.scores[:, :, 0], dev).mean())
        by_fraction = {fraction: float(each.mean()) for fraction, each in changes(model, dev).items()}
        found[name] = before + (by_fraction[1.0] if head == ALONE else max(by_fraction.values()))
    return found


def main() -> None:
    """Train and measure every head with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(given.recipe, given.run, data=str(given.data), recorded=RECORDED)
    student = Student.create(untuned_config(run.recipe.student), device="cpu", dtype="float32")
    identity = identify_teacher(run.teacher)
    lists: dict[str, tuple[Lists, Lists]] = {}
    for source in run.folder.sources(run.recipe):
        name, reader = source.dataset.name, Reader(source, student)
        prompt = identity.prompts[source.task]
        store = LabelStore(run.folder.labels, teacher=identity.fingerprint, prompt=prompt, dataset=name)
        lists[name] = train_lists(reader, store), dev_lists(reader, run.recipe.training.dev_passages)
    before = {name: float(ndcg(dev.scores[:, :, 0], dev).mean()) for name, (_, dev) in lists.items()}
    counts = {name: [len(taught), len(dev)] for name, (taught, dev) in lists.items()}
    results: dict[str, Any] = {
        "recipe": run.recipe.name,
        "lists and dev queries": counts,
        "cosine": before,
        "heads": {},
    }
    print("| head | " + " | ".join(lists) + " | mean |\n" + "|---" * (len(lists) + 2) + "|")
    for head in HEADS:
        by_seed = [measure(head, lists, seed) for seed in range(given.seeds)]
        results["heads"][head] = by_seed
        means = [fmean(each[name] for each in by_seed) for name in lists]
        print(f"| {head} | " + " | ".join(f"{value:.4f}" for value in [*means, fmean(means)]) + " |", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Every head on the same lists: nDCG@10 of heads that see vectors, and of heads that see tokens.

All begin with the cosine z of the recipe's backbone, which stands still, learn from the recorded lists of two data sets
with one loss, and rank the first 50 passages of z again. Targets are half the teacher's distribution over a list and
half the judgements. Each data set has a head of its own, as a task has a branch.

Of vectors, as students have them: the inner product with two maps (`inner product`); two of these, of which one learns
the judgements and one the teacher (`two heads`, after DHO: their scores are mixed, or, as there, their `probabilities`;
"whole" is half of either, "chosen" the share that is best on dev); with the IEM of four kinds of features, and with
gates; the published head (`paper`, three layers as in its code); weights that the query generates (Hypencoder); mean
and variance (`multivariate`). Of tokens, compared by the backbone's own states: `maxsim` (one weight beside z), `knrm`
(a linear function of eleven kernels in place of z; Xiong et al., "End-to-End Neural Ad-hoc Ranking with Kernel
Pooling", SIGIR 2017, with tokens that stand still), and the designs of `token_interaction.py`. SPLADE is no head: it
makes words of a text's states before any other text is seen (`learned_words.py`, on the same lists).

    d2llm distill-static DATA/wikiqa/corpus.jsonl.gz --out runs/static --dim 256
    python benchmarks/recorded_lists.py benchmarks/graded_lists/static-interaction.toml DATA RUN --queries 240
    python benchmarks/heads.py benchmarks/graded_lists/static-interaction.toml DATA RUN --json FILE
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recorded_judge import RECORDED
from recorded_lists import run_parser
from token_interaction import (
    BOUND,
    DESIGNS,
    FIRST,
    FRACTIONS,
    MAX_TOKENS,
    Added,
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
from d2llm.core.types import TASKS, Qrels, Task
from d2llm.data.labels import LabelStore
from d2llm.data.plan import TrainingSource
from d2llm.methods.poolings.multivariate import MultivariatePooling
from d2llm.models.interaction import DivergenceHead, Interaction, make_head
from d2llm.models.pooling import TextPooling
from d2llm.models.teachers.pair_teacher import identify_teacher
from d2llm.models.tokens import TextKind
from d2llm.ops.bm25_words import terms, tokens_of_terms
from d2llm.recipe import InteractionConfig, untuned_config
from d2llm.store.bm25 import WordIndex
from d2llm.store.word_segment import WordSegment
from d2llm.training.ablate import MEASURING_SEED
from d2llm.training.dev_sets import make_dev_set
from d2llm.training.settings import DEV_QUERIES

Row = tuple[str, str, list[str]]
"""A query's id and text, and the ids of the passages of its list."""
Parts = tuple[Task, Lists, Lists]
"""The task of a data set, its train lists and its dev lists."""


class MaxSim(nn.Module):
    """One weight of the mean of the tokens' best cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 1)

    def forward(self, lists: Lists) -> Tensor:
        return self.last(10 * lists.scores[:, :, 4:])


class KNRM(nn.Module):
    """A linear function of eleven kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(11, 1)

    def forward(self, lists: Lists) -> Tensor:
        return self.last(10 * lists.kernels[:, :, :11]).squeeze(2)


class OfVectors(nn.Module):
    """A student's head."""

    def __init__(self, dim: int, task: Task, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.task: Task = task
        head = make_head(InteractionConfig.model_validate({"head": "dot", "tasks": [task], **settings}), dim)
        assert isinstance(head, Interaction)
        self.head = head

    def forward(self, lists: Lists) -> Tensor:
        return self.head.score_lists(lists.queries, lists.passages.float(), self.task).logits


class Given(TextPooling):
    """Vectors that are there, as states of one token each."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        del mask
        return states[:, 0]


class Multivariate(nn.Module):
    """A mean and a variance of every vector, compared by their divergence."""

    def __init__(self, dim: int, task: Task) -> None:
        super().__init__()
        self.task: Task = task
        self.pooling = MultivariatePooling(Given(dim))
        self.head = DivergenceHead(self.pooling.dim)

    def forward(self, lists: Lists) -> Tensor:
        passages = lists.passages.float()
        mask = torch.ones(len(passages) * passages.shape[1], 1, dtype=torch.bool)
        made = self.pooling(passages.flatten(0, 1)[:, None], mask).unflatten(0, passages.shape[:2])
        queries = self.pooling(lists.queries[:, None], mask[: len(passages)])
        return (made @ self.head.query_vectors(queries, self.task).unsqueeze(2)).squeeze(2)


class Whole(Added):
    """What scores in place of z."""

    def __init__(self, head: nn.Module) -> None:
        nn.Module.__init__(self)
        self.design = head
        self.log_scale = nn.Parameter(torch.tensor(-0.7))

    def forward(self, lists: Lists) -> Tensor:
        return self.design(lists)


class TwoHeads(Whole):
    """Two inner products, one of which learns the judgements and one the teacher; the score is a share of either.

    With ``probabilities``, their distributions over a list are mixed, as in the paper, in place of their scores.
    """

    def __init__(self, dim: int, task: Task, *, probabilities: bool = False) -> None:
        of_vectors = OfVectors(dim, task, {"tasks": []})
        of_vectors.head.split_heads()
        super().__init__(of_vectors)
        self.interaction, self.probabilities = of_vectors.head, probabilities

    def of_head(self, lists: Lists, share: float) -> Tensor:
        """The scores of a mixture of the two inner products, which is one inner product again."""
        self.interaction.label_weight = share
        return self.design(lists)

    def log_distribution(self, lists: Lists, share: float) -> Tensor:
        """Logarithms of the probabilities of a list's passages by such a mixture."""
        scores = self.log_scale.exp() * self.of_head(lists, share)
        return scores.masked_fill(~lists.mask, -1e9).log_softmax(dim=1)

    def scores_of(self, lists: Lists, share: float) -> Tensor:
        """The scores with this share of the head that learns the judgements."""
        if not self.probabilities:
            return self.of_head(lists, share)
        judged, taught = (self.log_distribution(lists, whose).exp() for whose in (1.0, 0.0))
        return (share * judged + (1 - share) * taught).clamp(min=1e-30).log()

    def forward(self, lists: Lists) -> Tensor:
        return self.scores_of(lists, 0.5)

    def loss(self, lists: Lists, *, pairwise: bool = False) -> Tensor:
        """The cross-entropies of the two, added; ``targets`` are half of either."""
        assert not pairwise
        relevant = (lists.gains > 0) & lists.mask
        judged = relevant / relevant.sum(dim=1, keepdim=True)
        taught = (2 * lists.targets.exp() - judged).clamp(min=0)
        logs = [self.log_distribution(lists, share) for share in (1.0, 0.0)]
        return -(judged * logs[0] + taught * logs[1]).sum(dim=1).mean()

    def changes(self, lists: Lists) -> dict[float, NDArray[np.float64]]:
        """What it changes in nDCG@10 of each list, by the share."""
        before = ndcg(lists.scores[:, :, 0], lists)
        with torch.inference_mode():
            return {share: ndcg(self.scores_of(lists, share), lists) - before for share in FRACTIONS}


Make = Callable[[int, Task], Added]
"""Makes an untrained head for vectors of a width and a task."""


def of_vectors(**settings: Any) -> Make:
    """A student's head with these settings."""
    return lambda dim, task: Whole(OfVectors(dim, task, settings))


def beside(make: Callable[[int], nn.Module]) -> Make:
    """A design that is added to z."""
    return lambda dim, _: Added(make(dim), BOUND)


HEADS: dict[str, tuple[Make, float]] = {
    "inner product": (of_vectors(tasks=[]), 3e-4),
    "IEM, rich": (of_vectors(), 3e-4),
    "IEM, product": (of_vectors(features="product"), 3e-4),
    "IEM, difference": (of_vectors(features="difference"), 3e-4),
    "IEM, concat": (of_vectors(features="concat"), 3e-4),
    "IEM, rich, gates": (of_vectors(gates=True), 3e-4),
    "two heads": (TwoHeads, 3e-4),
    "two heads, probabilities": (partial(TwoHeads, probabilities=True), 3e-4),
    "maxsim": (beside(lambda _: MaxSim()), 2e-3),
    "knrm": (lambda _, __: Whole(KNRM()), 2e-2),
    **{f"tokens, {name}": (beside(DESIGNS[name]), 2e-3) for name in ("tokens", "kernels", "transformer", "generated")},
    "generated": (of_vectors(features="generated", hidden_dim=16, feature_dim=16), 3e-4),
    "paper": (of_vectors(head="paper", features="concat", layers=3, tasks=TASKS), 1e-3),
    "multivariate": (lambda dim, task: Whole(Multivariate(dim, task)), 3e-4),
}
"""Each head with its learning rate: those of students have that of their second stage, `paper` that of its variant."""


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


def measure(head: str, lists: Mapping[str, Parts], seed: int) -> dict[str, dict[str, float]]:
    """nDCG@10 of a head on each data set, whole and with the fraction of what it changes that is best there."""
    make, rate = HEADS[head]
    found: dict[str, dict[str, float]] = {}
    for name, (task, taught, dev) in lists.items():
        how = Training(taught, seed, epochs=10, rate=rate)
        model, epoch = train(partial(make, taught.queries.shape[1], task), how)
        before = float(ndcg(dev.scores[:, :, 0], dev).mean())
        changed = model.changes(dev) if isinstance(model, TwoHeads) else changes(model, dev)
        by_fraction = {fraction: float(each.mean()) for fraction, each in changed.items()}
        best = max(by_fraction, key=lambda fraction: (by_fraction[fraction], -fraction))
        found[name] = {
            "whole": before + by_fraction[0.5 if isinstance(model, TwoHeads) else 1.0],
            "chosen": before + by_fraction[best],
            "fraction": best,
            "epoch": epoch,
        }
    return found


def read_parts(run: Run, cache: Path) -> dict[str, Parts]:
    """The task, the train lists and the dev lists of each data set; read once, which takes a minute."""
    parts: dict[str, Parts] = {}
    student = Student.create(untuned_config(run.recipe.student), device="cpu", dtype="float32")
    identity = identify_teacher(run.teacher)
    for source in run.folder.sources(run.recipe):
        name = source.dataset.name
        kept = [cache / f"{name}-{part}.pt" for part in ("train", "dev")]
        if not kept[1].is_file():
            reader, prompt = Reader(source, student), identity.prompts[source.task]
            store = LabelStore(run.folder.labels, teacher=identity.fingerprint, prompt=prompt, dataset=name)
            made = train_lists(reader, store), dev_lists(reader, run.recipe.training.dev_passages)
            for file, one in zip(kept, made, strict=True):
                torch.save({field: getattr(one, field) for field in Lists.__dataclass_fields__}, file)
        taught, dev = (Lists(**torch.load(file)) for file in kept)
        parts[name] = source.task, taught, dev
    return parts


def main() -> None:
    """Train and measure every head with every seed, but those that the file has already."""
    parser = run_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(given.recipe, given.run, data=str(given.data), recorded=RECORDED)
    lists = read_parts(run, given.run)
    before = {name: float(ndcg(dev.scores[:, :, 0], dev).mean()) for name, (_, _, dev) in lists.items()}
    counts = {name: [len(taught), len(dev)] for name, (_, taught, dev) in lists.items()}
    results: dict[str, Any] = {"lists and dev queries": counts, "cosine": before, "heads": {}}
    if given.json is not None and given.json.is_file():
        results = json.loads(given.json.read_text(encoding="utf-8"))
    print("| head | " + " | ".join(f"{name}, whole | chosen" for name in lists) + " |")
    print("|" + "---|" * (2 * len(lists) + 1))
    print("| cosine | " + " | ".join(f"{value:.4f} | " for value in before.values()) + " |", flush=True)
    for head in HEADS:
        by_seed = results["heads"].setdefault(head, [])
        by_seed += [measure(head, lists, seed) for seed in range(len(by_seed), given.seeds)]
        cells = [fmean(each[name][key] for each in by_seed) for name in lists for key in ("whole", "chosen")]
        print(f"| {head} | " + " | ".join(f"{value:.4f}" for value in cells) + " |", flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

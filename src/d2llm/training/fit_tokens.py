"""The verb ``fit-tokens``: trains the projection that makes the token embeddings, on a student that does not change.

The states of the backbone are computed once. A step then needs no pass through it: the tokens of a batch of queries are
compared with the tokens of all its passages, and the loss is the cross-entropy of a query's relevant passage among
them. The others are its hard negatives, by words and by the student's vectors, and the passages of the other queries;
those that are also relevant to the query are left out. Source: Khattab and Zaharia, "ColBERT", SIGIR 2020, and
Santhanam et al., "ColBERTv2", NAACL 2022.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.core.inputs import objects_of, strings_of
from d2llm.core.progress import progress_bar, remarks
from d2llm.data.beir import Dataset
from d2llm.data.same_text import SameText
from d2llm.models.device import inference
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection, skipped_tokens
from d2llm.models.tokens import TextKind
from d2llm.ops.batching import even_batches, token_budget_batches
from d2llm.ops.scoring import mean_best_cosines
from d2llm.ops.selection import nearest_rows
from d2llm.recipe import TokensConfig
from d2llm.store.bm25 import WordIndex
from d2llm.training.checkpoints import warmup_steps
from d2llm.training.trainer import Trainable, Trainer

_BATCH_TEXTS, _LEAST_BATCH_TOKENS = 256, 2_048
_PCA_TOKENS = 40_000
_INITIAL_SCALE = 20.0  # of the mean cosine, as in the dot head
_COUNTED_PASSAGES = 5_000  # of each data set, to see which tokens are rare
_MIN_RARITY = 0.01  # of tokens that all passages have


@dataclass(frozen=True)
class _Examples:
    """Queries of one data set with a relevant passage and negatives, all as rows of ``passages``.

    Attributes:
        name: name of the data set.
        queries: states [tokens, dim] of the tokens of each query that have vectors, in float16.
        passages: the same for each passage.
        positives: for each query the relevant passages that were read for it.
        relevant: for each query all its relevant passages among ``passages``, and those with the same text.
        negatives: for each query its hard negatives.
    """

    name: str
    queries: list[Tensor]
    passages: list[Tensor]
    positives: list[list[int]]
    relevant: list[list[int]]
    negatives: list[list[int]]


@dataclass(frozen=True, slots=True)
class FitTokensReport:
    """What ``fit_tokens`` did: by data set the number of queries, and the mean loss of each epoch."""

    fingerprint: str
    token_dim: int
    queries: dict[str, int]
    losses: tuple[float, ...]


def fit_tokens(
    student: Student,
    datasets: Sequence[Dataset] | Dataset,
    config: TokensConfig | None = None,
    *,
    queries: Mapping[str, Collection[str]] | None = None,
    start: TokenProjection | None = None,
    seed: int = 0,
) -> FitTokensReport:
    """Train a student's token embeddings on the train splits of data sets; nothing else of it changes.

    The weight of the tokens in the student's score is fitted afterwards (``training.fit_score_features``); it may be 0.
    Until then the score does not count them.
    Memory: two bytes for each dimension of the state of each token that is read.

    Args:
        student: the student.
        datasets: data sets with judged train queries.
        config: width of the vectors, at most that of the backbone's states, and settings of the training.
        queries: for each data set, by name, the ids of the train queries to choose from; by default all that share no
            relevant passage with another split.
        start: continue from this projection, whose width is kept; by default the training starts from the directions
            in which the states differ most.
        seed: seed of the choice of queries, and of the training.

    Raises:
        InputError: there are no data sets, or one has no such train queries.
    """
    student.backbone.require_tokens("training token embeddings")
    datasets = objects_of(datasets, "datasets", Dataset)
    if queries is not None:
        queries = {name: strings_of(ids, f"queries[{name!r}]") for name, ids in queries.items()}
    if not datasets:
        raise InputError(
            "token embeddings are trained on data sets with a corpus and judged queries; give at least one"
        )
    config = config or TokensConfig()
    chosen = [_choose(dataset, queries, config, seed) for dataset in datasets]  # refused before anything is read
    dim = student.backbone.dim
    token_dim = min(config.dim, dim) if start is None else start.dim
    student.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rarity = token_rarity(student, datasets, seed=seed)
        projection = TokenProjection(dim, token_dim, rarity, max_query_tokens=config.max_query_tokens)
        examples = [
            _read(student, dataset, query_ids, projection, config, seed)
            for dataset, query_ids in zip(datasets, chosen, strict=True)
        ]
        if start is None:
            _start_from_principal_components(projection, examples)
        else:
            projection.weight.data = start.weight.detach().cpu().clone()
        run = _Training(projection.to(student.backbone.device), examples, config, seed)
        trainer = Trainer(run, seed=seed, warmup_steps=warmup_steps(config, run.total_steps))
        trainer.train()
    losses = np.reshape(trainer.losses, (config.epochs, -1)).mean(axis=1).tolist() if trainer.losses else []
    student.token_projection = projection.eval().requires_grad_(False)
    student.score_features = (
        student.score_features.without_tokens()
    )  # those weights were fitted for another projection, if any
    return FitTokensReport(
        projection.fingerprint,
        projection.dim,
        {example.name: len(example.queries) for example in examples},
        tuple(losses),
    )


def token_rarity(student: Student, datasets: Sequence[Dataset], *, seed: int = 0) -> list[float]:
    """How rare each token of the vocabulary is: its inverse document frequency in the data sets.

    It is 0 for special tokens and tokens without a letter or digit.
    """
    tokenizer = student.backbone.tokenizer
    having, total = np.zeros(len(tokenizer)), 0
    for dataset in datasets:
        ids = list(dataset.passages)
        if len(ids) > _COUNTED_PASSAGES:
            ids = random.Random(f"{seed}:rarity:{dataset.name}").sample(ids, _COUNTED_PASSAGES)
        for token_ids in student.tokenize(
            [dataset.passages[passage_id].full_text for passage_id in ids], "passage"
        ).ids:
            having[np.unique(token_ids)] += 1
        total += len(ids)
    rarity = np.maximum(np.log((total + 1) / (having + 0.5)), _MIN_RARITY)
    rarity[skipped_tokens(tokenizer)] = 0
    return rarity.tolist()


def _choose(
    dataset: Dataset, queries: Mapping[str, Collection[str]] | None, config: TokensConfig, seed: int
) -> list[str]:
    """The ids of the train queries to learn from."""
    judged = dataset.unshared_positives("train") if "train" in dataset.qrels else {}
    if not judged:
        raise InputError(
            f"{dataset.name}: token embeddings are trained on judged queries of a train split; it has none"
        )
    if queries is not None and dataset.name in queries:
        usable = sorted(judged.keys() & set(queries[dataset.name]))
    else:
        usable = sorted(dataset.unshared_positives("train", [split for split in dataset.qrels if split != "train"]))
        if len(usable) < len(judged):
            remarks.info(
                "%s: %d of %d train queries are left out, because they share relevant passages with another split",
                dataset.name,
                len(judged) - len(usable),
                len(judged),
            )
    if not usable:
        raise InputError(
            f"{dataset.name}: no train query is left to train token embeddings on; each shares its relevant passages "
            "with another split"
        )
    return random.Random(f"{seed}:{dataset.name}").sample(usable, min(config.max_queries, len(usable)))


def _read(
    student: Student,
    dataset: Dataset,
    chosen: Sequence[str],
    projection: TokenProjection,
    config: TokensConfig,
    seed: int,
) -> _Examples:
    """Choose passages for queries, and compute the states of their tokens."""
    judged = dataset.positives("train")
    rng = random.Random(f"{seed}:passages:{dataset.name}")
    ids = list(dataset.passages)
    row_of = {passage_id: row for row, passage_id in enumerate(ids)}
    same_text = SameText(dataset.passages)
    words = WordIndex.from_texts(passage.full_text for passage in dataset.passages.values())
    targets: list[set[int]] = []
    by_words: list[list[int]] = []
    for query_id in chosen:
        positives = list(judged[query_id])
        own_ids = dataset.own_passages.of(query_id)
        excluded = {row_of[p] for p in {*positives, *same_text.duplicates_of(positives), *own_ids} if p in row_of}
        best = words.best(words.query(dataset.queries[query_id].text), config.depth + len(excluded))[0].tolist()
        near = [row for row in best if row not in excluded]
        by_words.append(rng.sample(near, min(config.num_hard, len(near))))
        targets.append(excluded)
    read_positives = [
        rng.sample(rows, min(config.num_positives, len(rows)))
        for rows in ([row_of[p] for p in judged[query_id] if p in row_of] for query_id in chosen)
    ]
    pool = sorted({row for rows in (*read_positives, *by_words) for row in rows})
    index_of = {row: index for index, row in enumerate(pool)}
    passages, vectors = _states(student, projection, [dataset.passages[ids[row]].full_text for row in pool], "passage")
    texts = [dataset.queries[query_id].text for query_id in chosen]
    queries, dot_queries = _states(student, projection, texts, "query")
    if student.has_dot:
        dot_queries = student.query_vectors(dot_queries)
    nearest = nearest_rows(dot_queries, vectors, min(config.depth, len(pool)))
    negatives: list[list[int]] = []
    for lexical, near, excluded in zip(by_words, nearest, targets, strict=True):
        similar = [index for index in near.tolist() if pool[index] not in excluded]
        negatives.append(
            [*(index_of[row] for row in lexical), *rng.sample(similar, min(config.num_hard, len(similar)))]
        )
    positives_read = [[index_of[row] for row in rows] for rows in read_positives]
    relevant = [[index_of[row] for row in rows if row in index_of] for rows in targets]
    return _Examples(dataset.name, queries, passages, positives_read, relevant, negatives)


def _states(
    student: Student, projection: TokenProjection, texts: Sequence[str], kind: TextKind
) -> tuple[list[Tensor], NDArray[np.float32]]:
    """The states [tokens, dim] of the tokens of each text that have vectors, in float16, and the texts' vectors."""
    tokenized = student.tokenize(texts, kind)
    positions = [
        projection.query_positions(ids) if kind == "query" else projection.positions(ids) for ids in tokenized.ids
    ]
    states: list[Tensor] = [torch.zeros(0)] * len(texts)
    vectors = np.empty((len(texts), student.vector_dim), np.float32)
    max_tokens = max(_LEAST_BATCH_TOKENS, student.batch_tokens)
    batches = token_budget_batches(tokenized.lengths, max_tokens=max_tokens, max_items=_BATCH_TEXTS)
    with (
        inference(student),
        progress_bar(f"reading {'queries' if kind == 'query' else 'passages'}", len(texts)) as done,
    ):
        for batch in batches:
            ids = [tokenized.ids[index] for index in batch]
            read, mask = student.backbone(*student.backbone.pad(ids))
            vectors[batch] = student.pool(read, mask).cpu().numpy()
            for row, index in enumerate(batch):
                states[index] = read[row, positions[index]].to(torch.float16).cpu()
            done(len(batch))
    return states, vectors


def _start_from_principal_components(projection: TokenProjection, examples: Sequence[_Examples]) -> None:
    """Start with the directions in which the states of tokens differ most."""
    passages = [states for example in examples for states in example.passages]
    random.Random(0).shuffle(passages)
    sample: list[Tensor] = []
    for states in passages:
        sample.append(states)
        if sum(map(len, sample)) >= _PCA_TOKENS:
            break
    tokens = torch.cat(sample).float()
    if len(tokens) > 2 * projection.dim:
        _, _, directions = torch.pca_lowrank(tokens, q=projection.dim, center=True)
        projection.weight.data = directions.T.contiguous()


class _Training(Trainable):
    """A projection, and the batches of all epochs, which share the random numbers of their epoch."""

    title = "training token embeddings"

    def __init__(self, projection: TokenProjection, sets: Sequence[_Examples], config: TokensConfig, seed: int) -> None:
        self.projection, self.config = projection, config
        self.log_scale = torch.nn.Parameter(torch.tensor(_INITIAL_SCALE, device=projection.weight.device).log())
        self.parameters = {"weight": projection.weight, "log_scale": self.log_scale}
        self.groups = [([*self.parameters.values()], config.learning_rate, 0.0)]
        usable = [[i for i in range(len(s.queries)) if len(s.queries[i]) and s.positives[i]] for s in sets]
        self.batches: list[tuple[_Examples, list[int], random.Random]] = []
        for epoch in range(config.epochs):
            rng, batches = random.Random(f"{seed}:{epoch}"), self.batches[:0]
            for examples, rows in zip(sets, usable, strict=True):
                order = rng.sample(rows, len(rows))
                size = even_batches(len(order), config.batch_queries)[1]
                batches += [(examples, order[start : start + size], rng) for start in range(0, len(order), size)]
            rng.shuffle(batches)
            self.batches += batches
        self.total_steps = len(self.batches)

    def step(self, step: int) -> dict[str, Any]:
        loss = _loss(self.projection, self.log_scale, *self.batches[step][:2], self.config, self.batches[step][2])
        loss.backward()
        return {"loss": loss.detach()}


def _loss(
    projection: TokenProjection,
    log_scale: Tensor,
    examples: _Examples,
    positions: Sequence[int],
    config: TokensConfig,
    rng: random.Random,
) -> Tensor:
    """Cross-entropy of each query's relevant passage among all passages of the batch."""
    targets = [rng.choice(examples.positives[position]) for position in positions]
    drawn = [
        rng.sample(examples.negatives[position], min(config.num_hard, len(examples.negatives[position])))
        for position in positions
    ]
    column_of: dict[int, int] = {}
    for passage in (*targets, *(passage for listed in drawn for passage in listed)):
        column_of.setdefault(passage, len(column_of))
    device = projection.weight.device
    queries = [examples.queries[position].to(device) for position in positions]
    passages = [examples.passages[passage].to(device) for passage in column_of]
    vectors = projection(torch.cat([*queries, *passages])).split([len(tokens) for tokens in (*queries, *passages)])
    scores = log_scale.exp() * mean_best_cosines(vectors[: len(queries)], vectors[len(queries) :])
    also_relevant = torch.zeros_like(scores, dtype=torch.bool)
    for row, (position, target) in enumerate(zip(positions, targets, strict=True)):
        for passage in examples.relevant[position]:
            if passage != target and passage in column_of:
                also_relevant[row, column_of[passage]] = True
    labels = torch.tensor([column_of[target] for target in targets], device=device)
    return functional.cross_entropy(scores.masked_fill(also_relevant, -torch.inf), labels)

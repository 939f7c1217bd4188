r"""Four interactions that see tokens, each added to the score of a shipped student that stands still.

The score of `d2llm-minilm` in an index (vectors, words, tokens) is z; a design adds B tanh(g) to it, and g is 0 at the
start. A design sees what an index stores of a passage, and the query, which is read once:

- `words`: a control. The weights of the score's own parts are fitted again.
- `tokens`: for each token of the query, its best cosine with a token of the passage, the second best, the mean of the
  best five, the best one standardised within the list, the list's mean and deviation, its idf, and whether the word
  itself occurs; a small network for each token, mean and maximum over tokens.
- `kernels`: the cosines pooled by kernels (Xiong et al., "End-to-End Neural Ad-hoc Ranking with Kernel Pooling", SIGIR
  2017), beside [a * b; |a - b|; parts of the score].
- `transformer`: one layer of attention over the query's tokens, with the inputs of `tokens`.
- `generated`: the query's vector generates the weights of a small network that reads what `tokens` pools (after
  Killingback et al., "Hypencoder", SIGIR 2025).

Trained on the graded lists of `judgements/SET.jsonl`, measured by nDCG@10 on the first 50 passages of dev queries by
the data set's judgements: trained on all other sets (`others`), and on the train lists of the set itself (`own`). The
epoch is chosen by the loss of train lists that are held out.

    python benchmarks/token_interaction.py DATA [SET ...] --cache FOLDER \
        --json benchmarks/results/token-interaction.json

The first run of a set encodes its corpus, which takes minutes; the cache keeps what the lists need.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported

import numpy as np
import torch
from numpy.typing import NDArray
from recorded_judge import mean_grades, read_graded_lists
from torch import Tensor, nn

from d2llm import Student
from d2llm.core.types import Query, Task
from d2llm.data.beir import Dataset, read_beir
from d2llm.models.row_features import mean_of_cosines
from d2llm.models.teachers.lists import GRADES_PER_LOGIT
from d2llm.ops.bm25_words import terms, tokens_of_terms
from d2llm.ops.significance import bootstrap_interval, paired_randomisation
from d2llm.retrieval.open_index import PART_FORMATS
from d2llm.store.bm25 import WordIndex
from d2llm.store.part_vectors import PartVectors
from d2llm.store.vector_formats import make_format
from d2llm.store.word_segment import QueryWords, WordSegment
from d2llm.training.dev_sets import dev_queries
from d2llm.training.mining.choose import key_of

STUDENT = "d2llm-minilm"
FIRST, SHORTLIST, DEV_QUERIES, JUDGED_QUERIES = 50, 200, 150, 1500
MAX_TOKENS = 16  # of a query that have vectors
_TEXTS_AT_ONCE = 2_000


def encode_set(dataset: Dataset, task: Task, student: Student) -> dict[str, NDArray[Any]]:
    """Everything that the designs read, of the lists of one data set.

    Lists: `graded` (train queries with the grades of 20 passages), `judged` (train queries with the student's first 50
    passages) and `dev` (dev queries with their first 50). Token vectors are as an index stores them.
    """
    ids = list(dataset.passages)
    row_of = {name: row for row, name in enumerate(ids)}
    texts = [passage.full_text for passage in dataset.passages.values()]
    segment = WordSegment.from_texts(texts)
    words = WordIndex([segment])
    assert student.token_dim is not None
    stored = make_format(PART_FORMATS["token"], student.token_dim)
    codes, counts, parts = [], [], []
    begin = time.perf_counter()
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        read = student.encode_with_tokens(texts[start : start + _TEXTS_AT_ONCE], "passage")
        assert read.tokens is not None
        names = [str(number) for number in range(len(read.tokens.vectors))]
        codes.append(stored.encode(read.tokens.vectors, names))
        counts.append(read.tokens.counts)
        parts.append(read.vectors)
        print(
            f"{dataset.name}: {start + len(read.vectors)} of {len(texts)}, {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    vectors, count = np.concatenate(parts), np.concatenate(counts)
    firsts = np.cumsum(count) - count
    tokens = PartVectors(np.stack([firsts, count], axis=1), np.concatenate(codes), stored)

    graded = mean_grades([each for each in read_graded_lists(dataset.name) if each.split == "train"])
    positives = dataset.positives("train")
    judged = sorted((name for name, own in positives.items() if own), key=lambda name: key_of(1, name))[:JUDGED_QUERIES]
    dev = [query.id for query in dev_queries(dataset, num_queries=DEV_QUERIES, seed=0)]
    asked = list(dict.fromkeys([*graded, *judged, *dev]))
    queries = [dataset.queries[name] for name in asked]
    read = student.encode_with_tokens([query.text for query in queries], "query")
    assert read.tokens is not None
    query_tokens = read.tokens.split()
    own_passages = dataset.own_passages

    kinds, owners, rows, gains, grades, scores, matches = [], [], [], [], [], [], []
    idfs: list[NDArray[np.float32]] = []
    words_of: dict[int, set[str]] = {}
    for number, query in enumerate(queries):
        query_words = words.query(query.text)
        of_token = _terms_of_tokens(student, query)
        assert len(of_token) == len(query_tokens[number])
        idfs.append(token_idfs(words, of_token, len(ids)))
        score = partial(
            _scores,
            student=student,
            task=task,
            vector=read.vectors[number],
            vectors=vectors,
            words=words,
            query_words=query_words,
            tokens=tokens,
            query_tokens=query_tokens[number],
        )
        left_out = np.array([row_of[each] for each in own_passages.of(query.id)], np.int64)
        lists: list[tuple[str, NDArray[np.int64]]] = []
        if query.id in graded:
            lists.append(("graded", np.array([row_of[name] for name in graded[query.id]], np.int64)))
        if query.id in judged or query.id in dev:
            own = student.score(read.vectors[number], vectors, task)
            near = np.argsort(-own, kind="stable")[:SHORTLIST]
            pool = np.setdiff1d(np.union1d(near, words.best(query_words, SHORTLIST)[0]), left_out)
            order = np.lexsort((pool, -score(pool)[:, 0]))[:FIRST]
            lists += [
                (kind, pool[order]) for kind, members in (("judged", judged), ("dev", dev)) if query.id in members
            ]
        qrels = _judgements(dataset, query)
        for kind, some in lists:
            kinds.append(kind)
            owners.append(number)
            rows.append(some)
            scores.append(score(some))
            gains.append(np.array([qrels.get(ids[row], 0) for row in some], np.float32))
            own_grades = graded.get(query.id, {}) if kind == "graded" else {}
            grades.append(np.array([own_grades.get(ids[row], np.nan) for row in some], np.float32))
            for row in some.tolist():
                if row not in words_of:
                    words_of[row] = set(terms(texts[row]))
            matches.append(
                np.array([[bool(own & words_of[row]) for own in of_token] for row in some.tolist()], np.bool_).reshape(
                    len(some), -1
                )
            )
    needed = np.unique(np.concatenate(rows))
    ideal = np.array([_ideal(dataset, queries[owner]) for owner in owners], np.float32)
    return {
        "kinds": np.array(kinds),
        "owners": np.array(owners),
        "sizes": np.array([len(each) for each in rows]),
        "rows": np.searchsorted(needed, np.concatenate(rows)),
        "scores": np.concatenate(scores).astype(np.float32),
        "gains": np.concatenate(gains),
        "grades": np.concatenate(grades),
        "ideal": ideal,
        "matches": np.concatenate([each.ravel() for each in matches]),
        "query_vectors": read.vectors.astype(np.float16),
        "query_tokens": read.tokens.vectors.astype(np.float16),
        "query_counts": read.tokens.counts,
        "idfs": np.concatenate(idfs),
        "vectors": vectors[needed].astype(np.float16),
        "tokens": np.concatenate(
            [stored.decode(tokens.codes[firsts[row] : firsts[row] + count[row]]) for row in needed.tolist()]
        ).astype(np.float16),
        "counts": count[needed],
    }


def _scores(
    rows: NDArray[np.int64],
    *,
    student: Student,
    task: Task,
    vector: NDArray[np.float32],
    vectors: NDArray[np.float32],
    words: WordIndex,
    query_words: QueryWords,
    tokens: PartVectors,
    query_tokens: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The score of some passages in an index with tokens, and its parts, [n, 5]."""
    score_features = student.feature_weights(task)
    passage_weight, window_weight = score_features.word_weights(query_words.limit, query_words.statistics)
    passages, windows = words.score(query_words, rows)
    own = student.score(vector, vectors[rows], task)
    best = tokens.sum_of_best(mean_of_cosines(query_tokens), rows)
    token_weight = score_features.terms.get("maxsim", 0.0)
    total = own + passage_weight * passages + window_weight * windows + token_weight * best
    limit = query_words.limit or 1.0
    return np.stack([total, own, passages / limit, windows / limit, best], axis=1)


def _terms_of_tokens(student: Student, query: Query) -> list[set[str]]:
    """The terms of BM25 that each of a query's tokens with a vector belongs to."""
    projection = student.token_projection
    assert projection is not None
    (token_ids,) = student.tokenize([query.text], "query").ids
    positions = projection.query_positions(token_ids)
    spans = student.backbone.token_spans(query.text, len(token_ids), "query")
    found: list[set[str]] = [set() for _ in positions]
    for term, own in tokens_of_terms(query.text, [spans[index] for index in positions]).items():
        for index in own:
            found[index].add(term)
    return found


def token_idfs(words: WordIndex, of_token: Sequence[set[str]], num_passages: int) -> NDArray[np.float32]:
    """The idf of each token's rarest term, as a fraction of the largest possible."""
    largest = np.log(1 + (num_passages + 0.5) / 0.5)
    values = []
    for own in of_token:
        limits = [words.query(term).limit for term in own]
        values.append(max(limits, default=0.0) / largest)
    return np.array(values, np.float32)


def _judgements(dataset: Dataset, query: Query) -> dict[str, int]:
    return {name: grade for split in ("train", "dev") for name, grade in dataset.qrels[split].get(query.id, {}).items()}


def _ideal(dataset: Dataset, query: Query) -> float:
    """The best possible DCG@10 of the whole corpus."""
    best = sorted((grade for grade in _judgements(dataset, query).values() if grade > 0), reverse=True)[:10]
    return float(sum(gain / np.log2(index + 2) for index, gain in enumerate(best)))


@dataclass(frozen=True)
class Lists:
    """Lists of one kind, padded to the same number of passages n; queries are padded to ``MAX_TOKENS`` tokens.

    Attributes:
        mask: which passages are real, [lists, n].
        scores: the student's score, and its parts: vectors, words, words of windows, tokens, [lists, n, 5].
        tokens: the inputs of each query token, [lists, n, tokens, 8].
        token_mask: which tokens are real, [lists, tokens].
        kernels: the cosines pooled by kernels, plain and weighted by idf, [lists, n, 22].
        queries: the queries' vectors, [lists, dim].
        passages: the passages' vectors, [lists, n, dim], float16.
        targets: log-probabilities that the labels give the passages, [lists, n].
        gains: grades of the data set's judgements, [lists, n], and the best possible DCG@10 of each query, [lists].
    """

    mask: Tensor
    scores: Tensor
    tokens: Tensor
    token_mask: Tensor
    kernels: Tensor
    queries: Tensor
    passages: Tensor
    targets: Tensor
    gains: Tensor
    ideal: Tensor

    def take(self, positions: Tensor) -> Lists:
        """Some of the lists."""
        return Lists(*(getattr(self, name)[positions] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.mask)


def join(parts: Sequence[Lists]) -> Lists:
    """The lists of all parts, padded to the longest."""
    most = max(part.mask.shape[1] for part in parts)
    joined: list[Tensor] = []
    for name in Lists.__dataclass_fields__:
        values = [getattr(part, name) for part in parts]
        if name in ("mask", "scores", "tokens", "kernels", "passages", "targets", "gains"):
            padded = []
            for value in values:
                wider = value.new_full((len(value), most, *value.shape[2:]), -1e9 if name == "targets" else 0)
                wider[:, : value.shape[1]] = value
                padded.append(wider)
            values = padded
        joined.append(torch.cat(values))
    return Lists(*joined)


_CENTRES = np.array([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9], np.float32)
_WIDTHS = np.array([0.01, *[0.1] * 10], np.float32)
CLEAR_GRADES = 15.0


def token_inputs(
    cosines: NDArray[np.float32], counts: NDArray[np.int64], idf: NDArray[np.float32], matches: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Inputs [n, m, 8] of a query's m tokens, from their cosines [m, sum of counts] with those of n passages."""
    top = np.full((len(counts), 5, len(cosines)), -1.0, np.float32)
    kept = np.arange(int(counts.max(initial=1)))
    padded = np.full((len(cosines), len(counts), len(kept)), -1.0, np.float32)
    padded[:, kept < counts[:, None]] = cosines
    depth = min(5, len(kept))
    top[:, :depth] = np.moveaxis(-np.sort(-np.partition(padded, -depth, axis=2)[:, :, -depth:], axis=2), 0, 2)
    best = top[:, 0]
    taken = np.maximum(np.minimum(counts, 5), 1)[:, None]
    mean_five = np.where((np.arange(5) < taken)[:, :, None], top, 0).sum(axis=1) / taken
    mean, deviation = best.mean(axis=0), best.std(axis=0)
    standard = (best - mean) / (deviation + 0.02)
    constant = np.broadcast_to(np.stack([mean, 5 * deviation, idf], axis=1), (len(counts), len(idf), 3))
    return np.concatenate(
        [np.stack([best, top[:, 1], mean_five, 0.5 * standard], axis=2), constant, matches[:, :, None]], axis=2
    ).astype(np.float32)


def pooled_kernels(
    cosines: NDArray[np.float32], counts: NDArray[np.int64], idf: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Kernel features [n, 22]: log of the pooled cosines of each token, mean over tokens, plain and weighted by idf."""
    firsts = np.cumsum(counts) - counts
    found = np.empty((len(counts), 2 * len(_CENTRES)), np.float32)
    weights = idf / max(float(idf.sum()), 1e-6)
    for index, (centre, width) in enumerate(zip(_CENTRES, _WIDTHS, strict=True)):
        counted = np.add.reduceat(np.exp(-((cosines - centre) ** 2) / (2 * width**2)), firsts, axis=1)
        logs = 0.1 * np.log(np.maximum(counted, 1e-4))
        found[:, index], found[:, index + len(_CENTRES)] = logs.mean(axis=0), weights @ logs
    return found


def read_lists(file: Path, kind: str) -> Lists:
    """The lists of one kind (``encode_set``) with all inputs; kept beside the file, because it takes a minute."""
    kept = file.with_name(f"{file.stem}-{kind}.pt")
    if kept.is_file():
        return Lists(**torch.load(kept))
    data = dict(np.load(file))
    offsets = np.concatenate([[0], np.cumsum(data["sizes"])])
    query_ends, token_ends = np.cumsum(data["query_counts"]), np.cumsum(data["counts"])
    match_sizes = data["sizes"] * data["query_counts"][data["owners"]]
    match_ends = np.cumsum(match_sizes)
    chosen = np.flatnonzero(data["kinds"] == kind)
    most, dim = int(data["sizes"][chosen].max()), data["vectors"].shape[1]
    shape = (len(chosen), most)
    lists = Lists(
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(*shape, 5),
        torch.zeros(*shape, MAX_TOKENS, 8),
        torch.zeros(len(chosen), MAX_TOKENS, dtype=torch.bool),
        torch.zeros(*shape, 2 * len(_CENTRES)),
        torch.zeros(len(chosen), dim),
        torch.zeros(*shape, dim, dtype=torch.float16),
        torch.full(shape, -1e9),
        torch.zeros(shape),
        torch.zeros(len(chosen)),
    )
    tokens = data["tokens"].astype(np.float32)
    tokens /= np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-6)
    for at, number in enumerate(chosen.tolist()):
        owner, span = int(data["owners"][number]), slice(int(offsets[number]), int(offsets[number + 1]))
        rows = data["rows"][span]
        num = len(rows)
        count = data["query_counts"][owner]
        query = data["query_tokens"][query_ends[owner] - count : query_ends[owner]].astype(np.float32)
        query /= np.maximum(np.linalg.norm(query, axis=1, keepdims=True), 1e-6)
        idf = data["idfs"][query_ends[owner] - count : query_ends[owner]]
        matches = data["matches"][match_ends[number] - match_sizes[number] : match_ends[number]].reshape(num, count)
        counts = np.maximum(data["counts"][rows], 1)
        parts = [tokens[token_ends[row] - data["counts"][row] : token_ends[row]] for row in rows.tolist()]
        own = np.concatenate([part if len(part) else np.zeros((1, tokens.shape[1]), np.float32) for part in parts])
        if count:
            cosines = query @ own.T
            lists.tokens[at, :num, :count] = torch.from_numpy(token_inputs(cosines, counts, idf, matches))
            lists.kernels[at, :num] = torch.from_numpy(pooled_kernels(cosines, counts, idf))
        lists.mask[at, :num] = True
        lists.token_mask[at, :count] = True
        lists.scores[at, :num] = torch.from_numpy(data["scores"][span])
        lists.queries[at] = torch.from_numpy(data["query_vectors"][owner].astype(np.float32))
        lists.passages[at, :num] = torch.from_numpy(data["vectors"][rows])
        lists.gains[at, :num] = torch.from_numpy(data["gains"][span])
        lists.ideal[at] = float(data["ideal"][number])
        if kind == "graded":
            lists.targets[at, :num] = torch.from_numpy(data["grades"][span] / GRADES_PER_LOGIT).log_softmax(dim=0)
        else:
            gains = data["gains"][span]
            if gains.sum():
                lists.targets[at, :num] = torch.from_numpy(np.log(np.maximum(gains / gains.sum(), 1e-9)))
    torch.save({name: getattr(lists, name) for name in Lists.__dataclass_fields__}, kept)
    return lists


class Words(nn.Module):
    """The control: the weights of the score's parts, anew."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 1)

    def forward(self, lists: Lists) -> Tensor:
        return self.last(lists.scores[:, :, 1:] / torch.tensor([10.0, 0.3, 0.3, 0.3]))


class Tokens(nn.Module):
    """A network of width 24 for each token of the query, mean and maximum over tokens."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.last = nn.Linear(2 * width, 1)

    def pooled(self, lists: Lists) -> Tensor:
        return pool(self.each(lists.tokens), lists.token_mask)

    def forward(self, lists: Lists) -> Tensor:
        return self.last(self.pooled(lists))


class Kernels(nn.Module):
    """A network of width 32 that sees the kernels beside [a * b; |a - b|; parts of the score]."""

    def __init__(self, dim: int, width: int = 32) -> None:
        super().__init__()
        self.vectors = nn.Linear(2 * dim, width)
        self.kernels = nn.Linear(2 * len(_CENTRES) + 4, width)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(width, 1)

    def forward(self, lists: Lists) -> Tensor:
        a, b = lists.queries.unsqueeze(1), lists.passages.float()
        parts = lists.scores[:, :, 1:] / torch.tensor([10.0, 0.3, 0.3, 0.3])
        hidden = self.vectors(torch.cat([a * b, (a - b).abs()], dim=2))
        return self.last(self.dropout(hidden + self.kernels(torch.cat([lists.kernels, parts], dim=2))).relu())


class Transformer(nn.Module):
    """One layer of attention over the query's tokens of each pair."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.last = nn.Linear(2 * width, 1)

    def forward(self, lists: Lists) -> Tensor:
        num, length = lists.tokens.shape[:2]
        most = max(int(lists.token_mask.sum(dim=1).max()), 1)
        mask = lists.token_mask[:, :most].clone()
        mask[:, 0] = True  # a query without tokens attends to zeros
        states = self.first(lists.tokens[:, :, :most]).flatten(0, 1)
        states = self.layer(states, src_key_padding_mask=~mask.repeat_interleave(length, dim=0))
        return self.last(pool(states.unflatten(0, (num, length)), mask))


class Generated(nn.Module):
    """What the tokens pool is read by a network of width 8, whose weights the query's vector generates."""

    def __init__(self, dim: int, width: int = 12, hidden: int = 8) -> None:
        super().__init__()
        self.tokens = Tokens(width)
        self.width, self.hidden = 2 * width + 4, hidden
        self.code = nn.Linear(dim, 16)
        self.weights = nn.Linear(16, self.width * hidden + hidden)
        self.mixed = nn.Linear(16, hidden)
        self.last = nn.Linear(1, 1)
        nn.init.zeros_(self.mixed.weight)
        nn.init.ones_(self.mixed.bias)

    def forward(self, lists: Lists) -> Tensor:
        code = torch.tanh(self.code(lists.queries))
        made = self.weights(code)
        weight = made[:, : -self.hidden].unflatten(1, (self.width, self.hidden))
        parts = lists.scores[:, :, 1:] / torch.tensor([10.0, 0.3, 0.3, 0.3])
        inputs = torch.cat([self.tokens.pooled(lists), parts], dim=2)
        hidden = (inputs @ weight + made[:, None, -self.hidden :]).relu()
        return self.last((hidden * self.mixed(code).unsqueeze(1)).mean(dim=2, keepdim=True))


def pool(states: Tensor, token_mask: Tensor) -> Tensor:
    """Mean and maximum [lists, n, 2 width] over the real tokens of states [lists, n, tokens, width]."""
    mask = token_mask[:, None, :, None]
    mean = (states * mask).sum(dim=2) / mask.sum(dim=2).clamp(min=1)
    highest = states.masked_fill(~mask, -1e4).amax(dim=2)
    return torch.cat([mean, torch.where(mask.any(dim=2), highest, 0)], dim=2)


DESIGNS: dict[str, Callable[[int], nn.Module]] = {
    "words": lambda _: Words(),
    "tokens": lambda _: Tokens(),
    "kernels": Kernels,
    "transformer": lambda _: Transformer(),
    "generated": Generated,
}
SETS = ("wikiqa", "squad-sent", "stackfaq", "covidqa", "nfcorpus", "medquad", "banking77")
KNOWN_SETS = ("squad-sent", "covidqa", "medquad", "banking77")
"""Those whose train queries the student has seen, so that its score is better on them than on new ones."""
TRIES = (
    *(("grades of new sets", design) for design in ("tokens", "generated", "kernels", "words", "transformer")),
    *((name, "tokens") for name in ("pairs", "small steps", "judgements", "both")),
    *(("grades", design) for design in ("words", "tokens", "generated", "kernels", "transformer")),
)
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
_BATCH = 32
Values = NDArray[np.float64]
BOUND = 4.0  # the most that g adds, in units of the student's score


@dataclass(frozen=True)
class Training:
    """How a design is trained; ``pairwise`` takes a loss over pairs of passages in place of one over the list."""

    lists: Lists
    seed: int = 0
    epochs: int = 12
    rate: float = 2e-3
    bound: float = BOUND
    pairwise: bool = False


class Added(nn.Module):
    """z + B tanh(g), and the temperature of its distribution over a list, which changes no order."""

    def __init__(self, design: nn.Module, bound: float) -> None:
        super().__init__()
        self.design, self.bound = design, bound
        last = design.last
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.log_scale = nn.Parameter(torch.tensor(-0.7))

    def forward(self, lists: Lists) -> Tensor:
        return lists.scores[:, :, 0] + self.bound * torch.tanh(self.design(lists).squeeze(2) / self.bound)

    def loss(self, lists: Lists, *, pairwise: bool = False) -> Tensor:
        """Cross-entropy of the labels' distribution over each list and the score's, or RankNet's over clear pairs."""
        scores = (self.log_scale.exp() * self(lists)).masked_fill(~lists.mask, -1e9)
        if not pairwise:
            return -(lists.targets.exp() * scores.log_softmax(dim=1)).sum(dim=1).mean()
        both = lists.mask[:, :, None] & lists.mask[:, None, :]
        clear = both & (lists.targets[:, :, None] - lists.targets[:, None, :] > CLEAR_GRADES / GRADES_PER_LOGIT)
        worse = torch.nn.functional.softplus(scores[:, None, :] - scores[:, :, None])
        return torch.where(clear, worse, 0).sum() / clear.sum().clamp(min=1)


def train(make: Callable[[], Added], how: Training) -> tuple[Added, int]:
    """A trained model, and the epoch of which it is; the epoch is chosen on a seventh of the lists, held out."""
    torch.manual_seed(how.seed)
    order = torch.randperm(len(how.lists))
    held_out, rest = how.lists.take(order[: len(order) // 7]), order[len(order) // 7 :]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=0.01)
    steps = how.epochs * -(-len(rest) // _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / (steps + 1)))
    best, chosen, state = float("inf"), 0, dict[str, Tensor]()
    for epoch in range(1, how.epochs + 1):
        model.train()
        for batch in rest[torch.randperm(len(rest))].split(_BATCH):
            optimizer.zero_grad()
            model.loss(how.lists.take(batch), pairwise=how.pairwise).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            parts = torch.arange(len(held_out)).split(200)
            loss = fmean(model.loss(held_out.take(part), pairwise=how.pairwise).item() for part in parts)
        if loss < best:
            best, chosen, state = loss, epoch, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval(), chosen


def added(design: str, how: Training) -> Added:
    """An untrained design for these lists."""
    return Added(DESIGNS[design](how.lists.queries.shape[1]), how.bound)


def ndcg(scores: Tensor, lists: Lists) -> Values:
    """nDCG@10 of each list, by the judgements of the whole corpus."""
    order = torch.argsort(scores.masked_fill(~lists.mask, -1e9), dim=1, descending=True, stable=True)[:, :10]
    gains = lists.gains.gather(1, order).double().numpy()
    return (gains / np.log2(np.arange(gains.shape[1]) + 2)).sum(axis=1) / lists.ideal.double().numpy()


def changes(model: Added, lists: Lists) -> dict[float, Values]:
    """What a trained design changes in nDCG@10 of each list, by the fraction of it that is added."""
    own = lists.scores[:, :, 0]
    with torch.inference_mode():
        added = torch.cat([model(lists.take(part)) for part in torch.arange(len(lists)).split(50)]) - own
    before = ndcg(own, lists)
    return {fraction: ndcg(own + fraction * added, lists) - before for fraction in FRACTIONS}


def try_of(name: str, sets: Mapping[str, Mapping[str, Lists]], others: Sequence[str], seed: int) -> Training:
    """One way of training on the lists of other data sets."""
    fresh = [other for other in others if other not in KNOWN_SETS]
    if name == "grades":
        return Training(join([sets[other]["graded"] for other in others]), seed)
    if name == "grades of new sets":
        return Training(join([sets[other]["graded"] for other in fresh]), seed, epochs=20)
    if name == "judgements":
        return Training(join([judged(sets[other]["judged"]) for other in others]), seed)
    if name == "both":
        parts = [sets[other]["graded"] for other in others] + [judged(sets[other]["judged"]) for other in others]
        return Training(join(parts), seed)
    if name == "pairs":
        return Training(join([sets[other]["graded"] for other in others]), seed, pairwise=True)
    assert name == "small steps"
    return Training(join([sets[other]["graded"] for other in others]), seed, rate=5e-4, bound=1.0)


def judged(lists: Lists, most: int = 600) -> Lists:
    """The first lists with a relevant passage."""
    return lists.take(torch.nonzero((lists.gains * lists.mask).sum(dim=1))[:most, 0])


def summary(values: Sequence[Values]) -> dict[str, Any]:
    """The change of the mean, by seed and over seeds, with its interval over queries, and p."""
    mean = np.mean(values, axis=0)
    interval = bootstrap_interval(mean)
    return {
        "seeds": [round(float(value.mean()), 5) for value in values],
        "mean": round(float(mean.mean()), 5),
        "low": round(interval.low, 5),
        "high": round(interval.high, 5),
        "p": round(paired_randomisation(mean, np.zeros(len(mean))), 5),
    }


def on_others(
    name: str, design: str, sets: Mapping[str, Mapping[str, Lists]], held_out: str, seeds: int
) -> dict[str, Any]:
    """A design trained on the other data sets, measured on one that is left out.

    ``full``: all of what it adds. ``chosen``: the fraction of it that is best on the dev queries of the other sets.
    ``train``: the same share on the train queries of the set that is left out, if the student was not trained on them.
    """
    others = [other for other in sets if other != held_out]
    full, chosen, train_queries, fractions, epochs = [], [], [], [], []
    for seed in range(seeds):
        how = try_of(name, sets, others, seed)
        model, epoch = train(partial(added, design, how), how)
        by_set = [changes(model, sets[other]["dev"]) for other in others]
        fraction = max(FRACTIONS, key=lambda tried: (fmean(float(own[tried].mean()) for own in by_set), -tried))
        own = changes(model, sets[held_out]["dev"])
        full.append(own[1.0])
        chosen.append(own[fraction])
        fractions.append(fraction)
        epochs.append(epoch)
        if held_out not in KNOWN_SETS:
            train_queries.append(changes(model, judged(sets[held_out]["judged"], JUDGED_QUERIES))[fraction])
    found = {"full": summary(full), "chosen": summary(chosen), "shares": fractions, "epochs": epochs}
    return found | ({"train": summary(train_queries)} if train_queries else {})


def on_own(design: str, lists: Mapping[str, Lists], seeds: int) -> dict[str, Any]:
    """A design trained on the train lists of the data set itself."""
    values, epochs = [], []
    for seed in range(seeds):
        how = Training(lists["graded"], seed, epochs=20)
        model, epoch = train(partial(added, design, how), how)
        values.append(changes(model, lists["dev"])[1.0])
        epochs.append(epoch)
    return {"full": summary(values), "epochs": epochs}


def cost(file: Path, lists: Lists) -> dict[str, float]:
    """Milliseconds for 100 passages: the products of tokens, and what each design takes in addition to them."""
    data = dict(np.load(file))
    span = slice(0, int(data["counts"][:100].sum()))
    counts, tokens = np.maximum(data["counts"][:100], 1), data["tokens"][span].astype(np.float32)
    tokens = tokens[: int(counts.sum())]
    query = data["query_tokens"][:11].astype(np.float32)  # the usual number of tokens
    idf, matches = np.full(11, 0.5, np.float32), np.zeros((len(counts), 11), np.bool_)
    cosines = query @ tokens.T / 64
    times = {
        "products": _milliseconds(lambda: query @ tokens.T),
        "inputs of tokens": _milliseconds(lambda: token_inputs(cosines, counts, idf, matches)),
        "inputs of kernels": _milliseconds(lambda: pooled_kernels(cosines, counts, idf)),
    }
    hundred = join([lists.take(torch.arange(1))])
    wide = {name: getattr(hundred, name) for name in Lists.__dataclass_fields__}
    for name in ("mask", "scores", "tokens", "kernels", "passages", "targets", "gains"):
        wide[name] = torch.cat([wide[name]] * (100 // lists.mask.shape[1] + 1), dim=1)[:, :100]
    for name, make in DESIGNS.items():
        model = make(lists.queries.shape[1]).eval()
        with torch.inference_mode():
            times[f"network of {name}"] = _milliseconds(lambda model=model: model(Lists(**wide)))
    return {name: round(value, 2) for name, value in times.items()} | {
        "tokens a passage": round(float(counts.mean()), 1)
    }


def _milliseconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(15):
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin))
    return float(np.median(times))


def main() -> None:
    """Encode what is not in the cache, then train, measure and print; the figures are written after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("sets", nargs="*", default=SETS)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what the lists need of each data set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.cache.mkdir(parents=True, exist_ok=True)
    student: Student | None = None
    tasks: dict[str, Task] = {name: read_graded_lists(name)[0].task for name in given.sets}
    for name, task in tasks.items():
        if not (given.cache / f"{name}.npz").is_file():
            student = student or Student.load(STUDENT)
            dataset = read_beir(given.data / name, splits=["train", "dev"])
            np.savez(given.cache / f"{name}.npz", allow_pickle=False, **encode_set(dataset, task, student))
    sets = {
        name: {kind: read_lists(given.cache / f"{name}.npz", kind) for kind in ("graded", "judged", "dev")}
        for name in given.sets
    }
    results: dict[str, Any] = {
        "student": STUDENT,
        "before": {
            name: round(float(ndcg(own["dev"].scores[:, :, 0], own["dev"]).mean()), 5) for name, own in sets.items()
        },
        "queries": {name: len(own["dev"]) for name, own in sets.items()},
        "milliseconds": {name: cost(given.cache / f"{name}.npz", own["dev"]) for name, own in sets.items()},
        "others": {},
        "own": {},
    }
    asymmetric = {name: own for name, own in sets.items() if tasks[name] == "asymmetric"}
    for name, design in TRIES:
        rows: dict[str, Any] = results["others"].setdefault(name, {}).setdefault(design, {})
        for held_out in asymmetric:
            rows[held_out] = on_others(name, design, asymmetric, held_out, given.seeds)
            _print(f"others, {name}", design, held_out, rows[held_out]["chosen"])
            _write(given.json, results)
    for design in DESIGNS:
        rows = results["own"].setdefault(design, {})
        for name, own in sets.items():
            rows[name] = on_own(design, own, given.seeds)
            _print("own", design, name, rows[name]["full"])
            _write(given.json, results)
    print(table(results))


def table(results: Mapping[str, Any]) -> str:
    """The changes of nDCG@10 in thousandths, with a star where p is below .05, as Markdown."""
    names = list(results["before"])
    lines = ["| trained on | design | " + " | ".join(names) + " | mean |", "|---" * (len(names) + 3) + "|"]
    before = [f"{results['before'][name]:.3f}".lstrip("0") for name in names]
    lines.append("| - | today's score | " + " | ".join(before) + " | |")
    rows = [(name, design, own, "chosen") for name, by in results["others"].items() for design, own in by.items()]
    rows += [("the set itself", design, own, "full") for design, own in results["own"].items()]
    for name, design, own, fraction in rows:
        found = [own[each][fraction] if each in own else None for each in names]
        cells = ["" if each is None else f"{1e3 * each['mean']:+.1f}{'*' * (each['p'] < 0.05)}" for each in found]
        # The mean of the sets that every row has.
        mean = fmean(own[each][fraction]["mean"] for each in names if each in results["others"]["grades"]["tokens"])
        lines.append(f"| {name} | {design} | " + " | ".join(cells) + f" | {1e3 * mean:+.1f} |")
    return "\n".join(lines)


def _print(kind: str, design: str, name: str, found: Mapping[str, Any]) -> None:
    interval = f"{found['low']:+.4f} to {found['high']:+.4f}"
    print(f"{kind:<28} {design:<12} {name:<11} {found['mean']:+.4f} ({interval}), p {found['p']:.3f}", flush=True)


def _write(file: Path | None, results: Mapping[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

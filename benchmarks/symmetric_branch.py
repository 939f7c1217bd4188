"""Trains what a student has for symmetric search alone, on vectors that are read once: its inner product and its IEM.

The backbone stays as it is, so the vectors of passages and all of asymmetric search do too. Four losses, in every step:

- cross-entropy of banking77's intents, by the score over a positive, 30 near and 20 random passages, and half as much
  by the inner product over all passages;
- of pairs that a large language model graded (`judgements/*-passages.jsonl`, `*-queries.jsonl`): cross-entropy of the
  inner product with the grades, with a scale and an offset for each set;
- penalties for changing other texts (those pairs and `written_pairs/contrasts`): the squared change, relative to the
  other passages of a list of near texts, that the interaction makes to the inner product, and that the new inner
  product makes to the one before.

    python benchmarks/judged_sets.py DATA JUDGED
    python benchmarks/symmetric_branch.py DATA JUDGED --out STUDENT
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from d2llm.core.progress import progress_bar
from d2llm.data.beir import read_beir
from d2llm.models.hub import find_student
from d2llm.models.interaction import Interaction
from d2llm.models.student import Student
from d2llm.models.student_files import read_student_manifest

GRADED = ("squad-sent-passages", "squad-sent-queries", "covidqa-queries")
_BATCH, _GRADED_BATCH, _NEAR, _RANDOM, _LISTED = 32, 128, 30, 20, 20
_POOL_DEPTH, _DEPTH = 40, 100
_NEVER = -1e9


@dataclass(frozen=True, slots=True)
class Options:
    """Learning rates, weights of the losses, and how long."""

    epochs: int = 3
    queries: int = 6000
    warmup_steps: int = 50
    interaction_rate: float = 3e-4
    map_rate: float = 1e-4
    interaction_penalty: float = 10.0
    map_penalty: float = 5.0
    graded: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Intents:
    """banking77's train queries [q, d], all passages [p, d], and which are relevant [q, p]."""

    queries: Tensor
    passages: Tensor
    relevant: Tensor


@dataclass(frozen=True, slots=True)
class Pool:
    """Texts of one kind [n, d], and the nearest of each by the inner product before the training [n, depth]."""

    texts: Tensor
    near: Tensor


@dataclass(frozen=True, slots=True)
class GradedPairs:
    """Vectors of both texts of each pair [n, d], and grades from 0 to 1 [n]."""

    first: Tensor
    second: Tensor
    grades: Tensor


def read_intents(student: Student, data: Path) -> Intents:
    """The vectors of banking77."""
    dataset = read_beir(data / "banking77", splits=["train"])
    rows = {name: row for row, name in enumerate(dataset.passages)}
    judged = dataset.qrels["train"]
    relevant = torch.zeros(len(judged), len(rows), dtype=torch.bool)
    for row, passages in enumerate(judged.values()):
        relevant[row, [rows[name] for name, grade in passages.items() if grade > 0]] = True
    queries = student.encode_query([dataset.queries[name].text for name in judged])
    passages = student.encode_document([passage.full_text for passage in dataset.passages.values()])
    return Intents(torch.from_numpy(queries), torch.from_numpy(passages), relevant)


def read_graded(student: Student, folder: Path) -> GradedPairs:
    """The vectors and grades of the train pairs of a data set that ``judged_sets.py`` wrote."""
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs: list[dict[str, Any]] = [json.loads(line) for line in file]
    first = _encode(student.encode_query, [pair["query"] for pair in pairs])
    second = _encode(student.encode_document, [pair["document"] for pair in pairs])
    return GradedPairs(first, second, torch.tensor([pair["score"] / 100 for pair in pairs]))


def _encode(encode: Any, texts: Sequence[str]) -> Tensor:
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    vectors = encode([*rows])
    return torch.from_numpy(vectors[[rows[text] for text in texts]])


class Training:
    """The parameters that are trained, and what a step is."""

    def __init__(self, student: Student, intents: Intents, graded: Sequence[GradedPairs], options: Options) -> None:
        head = student.interaction
        assert isinstance(head, Interaction)
        self.head, self.intents, self.graded, self.options = head, intents, graded, options
        self.rng = np.random.default_rng(options.seed)
        self.before = self._query_map().detach()
        self.near = self._nearest(intents.queries, intents.passages, _DEPTH)
        self.offsets = torch.tensor([float(self._dots(one).detach().mean()) for one in graded], requires_grad=True)
        self.scales = torch.zeros(len(graded), requires_grad=True)

    def pool(self, texts: Tensor) -> Pool:
        """A pool of different texts."""
        unique = torch.unique(texts, dim=0)
        return Pool(unique, self._nearest(unique, unique, _POOL_DEPTH))

    def loss(self, rows: NDArray[np.int64], pools: Sequence[Pool]) -> Tensor:
        """The loss of some queries of banking77, of a pool and of graded pairs."""
        return self._of_intents(rows) + self._of_change(pools) + self.options.graded * self._of_grades()

    def _query_map(self) -> Tensor:
        return self.head.query_vectors(torch.eye(self.head.dim), "symmetric")

    def _nearest(self, queries: Tensor, passages: Tensor, depth: int) -> Tensor:
        return (queries @ self.before @ passages.T).topk(min(depth, len(passages)), dim=1).indices

    def _dots(self, pairs: GradedPairs, rows: Any = slice(None)) -> Tensor:
        return (self.head.query_vectors(pairs.first[rows], "symmetric") * pairs.second[rows]).sum(dim=1)

    def _of_intents(self, rows: NDArray[np.int64]) -> Tensor:
        intents, rng = self.intents, self.rng
        lists = [
            [
                rng.choice(np.flatnonzero(intents.relevant[row].numpy())),
                *rng.choice(self.near[row].numpy(), _NEAR, replace=False),
                *rng.integers(len(intents.passages), size=_RANDOM),
            ]
            for row in rows.tolist()
        ]
        chosen, queries = torch.tensor(np.array(lists)), intents.queries[rows]
        scores = self.head.score_lists(queries, intents.passages[chosen], "symmetric").logits
        relevant = intents.relevant[rows]
        others = relevant.gather(1, chosen)
        others[:, 0] = False
        listed = cross_entropy(scores.masked_fill(others, _NEVER), torch.zeros(len(rows), dtype=torch.long))
        dots = self.head.query_vectors(queries, "symmetric") @ intents.passages.T
        negatives = dots.masked_fill(relevant, _NEVER).logsumexp(dim=1, keepdim=True)
        by_positive = (torch.logaddexp(dots, negatives) - dots) * relevant
        return listed + 0.5 * (by_positive.sum(dim=1) / relevant.sum(dim=1)).mean()

    def _of_change(self, pools: Sequence[Pool]) -> Tensor:
        pool = pools[int(self.rng.integers(len(pools)))]
        rows = torch.from_numpy(self.rng.integers(len(pool.texts), size=_BATCH))
        columns = np.stack([self.rng.permutation(pool.near.shape[1])[:_LISTED] for _ in rows])
        passages = pool.texts[pool.near[rows].gather(1, torch.from_numpy(columns))]
        scores = self.head.score_lists(pool.texts[rows], passages, "symmetric")
        assert scores.dot is not None
        dots_before = (passages @ (pool.texts[rows] @ self.before).unsqueeze(2)).squeeze(2)
        of_interaction = _spread(scores.logits - scores.dot)
        return self.options.interaction_penalty * of_interaction + self.options.map_penalty * _spread(
            scores.dot - dots_before
        )

    def _of_grades(self) -> Tensor:
        index = int(self.rng.integers(len(self.graded)))
        pairs = self.graded[index]
        rows = torch.from_numpy(self.rng.integers(len(pairs.grades), size=_GRADED_BATCH))
        logits = (self._dots(pairs, rows) - self.offsets[index]) * self.scales[index].exp() * 0.5
        return binary_cross_entropy_with_logits(logits, pairs.grades[rows])


def _spread(change: Tensor) -> Tensor:
    return (change - change.mean(dim=1, keepdim=True)).square().mean()


def train(student: Student, intents: Intents, graded: Sequence[GradedPairs], other: Tensor, options: Options) -> None:
    """Train the symmetric inner product and a new interaction of a student, in place."""
    torch.manual_seed(options.seed)
    training = Training(student, intents, graded, options)
    head = training.head
    new = Interaction(head.config, head.dim)
    fresh = {name: tensor for name, tensor in new.state_dict().items() if not name.startswith("dots.")}
    head.load_state_dict({**head.state_dict(), **fresh})
    maps = [parameter for name, parameter in head.named_parameters() if name.startswith("dots.symmetric.")]
    rest = [*head.residual_parameters().values()]
    for parameter in [*maps, *rest]:
        parameter.requires_grad_(True)
    rates = [options.interaction_rate, options.map_rate, 3e-2]
    groups = zip([rest, maps, [training.offsets, training.scales]], rates, [0.02, 0.0, 0.0], strict=True)
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate, "weight_decay": decay} for p, rate, decay in groups])
    pools = [training.pool(other), *(training.pool(torch.cat([one.first, one.second])) for one in graded)]
    number = min(options.queries, len(intents.queries))
    steps = number // _BATCH * options.epochs
    head.train()
    epochs = [training.rng.permutation(len(intents.queries))[:number] for _ in range(options.epochs)]
    batches = [batch for rows in epochs for batch in np.array_split(rows, number // _BATCH)]
    with progress_bar("training the symmetric branch", steps) as advance:
        for step, batch in enumerate(batches):
            factor = min(1.0, (step + 1) / options.warmup_steps) * max(0.05, 1 - step / steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()
            training.loss(batch, pools).backward()
            torch.nn.utils.clip_grad_norm_([*maps, *rest], 1.0)
            optimizer.step()
            advance(1)
    head.eval().requires_grad_(False)


def main() -> None:
    """Train and write the student; what was fitted to its symmetric scores has to be fitted again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("judged", type=Path)
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    student = Student.load(given.student, dtype="float32")
    tokens, features, calibration = student.token_projection, student.score_features, student.calibration
    graded = [read_graded(student, given.judged / name) for name in GRADED]
    written = read_graded(student, given.judged / "written-contrasts")
    intents = read_intents(student, given.data)
    content, _ = read_student_manifest(find_student(given.student))
    student.prepare_training(backbone=False)
    train(student, intents, graded, torch.cat([written.first, written.second]), Options(seed=given.seed))
    student.token_projection, student.score_features, student.calibration = tokens, features, calibration
    student.save(given.out, content=content)
    print(f"{given.out}: {student.fingerprint}")


if __name__ == "__main__":
    main()

"""A student that is there in training scores all pairs of a batch, none of which needs a label (TCT-ColBERT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.progress import remarks
from d2llm.core.types import TASKS, Task
from d2llm.data.beir import Dataset
from d2llm.models.pooling import to_sphere
from d2llm.models.student import Student
from d2llm.models.tokens import TextKind
from d2llm.ops.losses import list_imitation
from d2llm.ops.scoring import mean_best_cosines
from d2llm.recipe.losses import Loss
from d2llm.recipe.sections import StudentName
from d2llm.training.losses import LossInput, Preparation
from d2llm.training.processes import own_device

LiveScores = Literal["all", "vectors", "tokens"]


class InBatchImitation(Loss, kind="in_batch_imitation"):
    """The distribution of a live teacher over all candidates of the batch."""

    paper = "Lin et al., RepL4NLP 2021, https://aclanthology.org/2021.repl4nlp-1.17 (TCT-ColBERT)"
    needs = frozenset({"live_teacher"})
    costs = "the teacher, a student, reads every text once; no labels"
    measured = (
        "+.005 over judgements alone (95 % interval .001 to .008; qnli +.003, banking77 +.007; [three "
        "seeds](log/2026-11.md#2026-11-26-soft-labels-of-all-pairs-in-a-batch-with-three-seeds))"
    )

    teacher: StudentName
    """A student, a folder or a name. It reads every text of the training once, and scores all pairs of a batch."""
    scores: LiveScores = "all"
    """What the teacher scores by: its vectors and its interaction (``vectors``), the token embeddings, as in
    TCT-ColBERT (``tokens``: the sum, over the query's tokens, of the highest cosine with a token of the passage), or
    all of them, with the weight that tokens have in its score, if they have one."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the teacher's scores: below 1, it counts as surer than it is. TCT-ColBERT has .25, for sums of cosines of
    tokens."""

    def prepare(self, preparation: Preparation) -> dict[str, Any]:
        teacher = Student.load(self.teacher, device=own_device(preparation.device), dtype=preparation.dtype)
        for labelled in preparation.with_lists:  # labelled pairs are not compared with one another
            live = LiveTeacher(teacher, labelled.source.dataset, labelled.source.task, scores=self.scores)
            if self.scores == "all" and not live.token_weight:
                remarks.info(
                    "distill: the live teacher's score gives tokens no weight in %s search, so on %s its vectors alone "
                    "count",
                    labelled.source.task,
                    labelled.source.dataset.name,
                )
            preparation.add_pair_input(self.kind, labelled, live)
        return self._identity(teacher)

    def _identity(self, teacher: Student) -> dict[str, Any]:
        """Everything that affects the teacher's scores, as JSON."""
        identity: dict[str, Any] = {"live_teacher": teacher.fingerprint}
        if self.scores != "vectors" and teacher.token_fingerprint is not None:
            identity["live_tokens"] = teacher.token_fingerprint
        weights = {task: teacher.feature_weights(task, stored=("token",)).terms.get("maxsim") for task in TASKS}
        if self.scores == "all" and any(weights.values()):
            identity["live_token_weights"] = weights
        return identity

    def __call__(self, inputs: LossInput) -> Tensor | None:
        scores = inputs.pair_input(self.kind)
        if scores is None:
            return None
        return list_imitation(inputs.imitating, scores, inputs.candidates, temperature=self.temperature)


class LiveTeacher:
    """The scores of any query and passage of one data set by another student.

    By ``tokens``, the score is MaxSim, the sum over the query's tokens of the highest cosine with a token of the
    passage. By ``vectors``, it is that of the student's vectors and its interaction. By ``all``, the mean of these
    highest cosines is added to it with its weight in the student's search, if it has one. Words never count.

    Every text is read once, when it is first asked for, and what the score needs of it stays in memory: its vector, and
    two bytes for each number of the vectors of its tokens.

    Source: Lin et al., "In-Batch Negatives for Knowledge Distillation with Tightly-Coupled Teachers for Dense
    Retrieval", RepL4NLP 2021 (TCT-ColBERT), whose teacher is ColBERT's MaxSim. There, it may be trained along with the
    student; here it is a finished student.
    """

    def __init__(self, student: Student, dataset: Dataset, task: Task, *, scores: LiveScores = "all") -> None:
        """Raises an ``InputError`` if the scores are those of tokens and the student has no vectors of them."""
        self._student, self._dataset = student, dataset
        self._task: Task = task
        self._only_tokens = scores == "tokens"
        weight = student.feature_weights(task, stored=("token",)).terms.get("maxsim", 0.0)
        self.token_weight = weight if scores == "all" and student.token_projection is not None else 0.0
        """The weight of tokens beside the vectors."""
        if self._only_tokens and student.token_projection is None:
            raise InputError(
                'losses.in_batch_imitation.scores is "tokens", but the live teacher has no token embeddings: train '
                'them with `d2llm fit-tokens`, or set "vectors"'
            )
        self._queries: dict[str, _Read] = {}
        self._passages: dict[str, _Read] = {}

    def __call__(self, query: str, passage_ids: Sequence[str]) -> NDArray[np.float32]:
        """The scores [n] of a query's text with some passages of the data set."""
        if query not in self._queries:
            self._queries[query] = self._read([query], "query")[0]
        new = [passage_id for passage_id in dict.fromkeys(passage_ids) if passage_id not in self._passages]
        if new:
            texts = [self._dataset.passages[passage_id].full_text for passage_id in new]
            self._passages.update(zip(new, self._read(texts, "passage"), strict=True))
        (vector, tokens), passages = self._queries[query], [self._passages[passage_id] for passage_id in passage_ids]
        if self._only_tokens:
            # Those of a long query were multiplied by a fraction, and the sum is over all that have a vector.
            return len(tokens) * _mean_best(to_sphere(torch.from_numpy(tokens).float()), passages)
        scores = self._student.score(vector, np.stack([passage_vector for passage_vector, _ in passages]), self._task)
        if self.token_weight:
            scores = scores + np.float32(self.token_weight) * _mean_best(torch.from_numpy(tokens).float(), passages)
        return scores

    def _read(self, texts: list[str], kind: TextKind) -> list[_Read]:
        if self._only_tokens or self.token_weight:
            encoded = self._student.encode_with_tokens(texts, kind)
            assert encoded.tokens is not None
            tokens = [of_passage.astype(np.float16) for of_passage in encoded.tokens.split()]
        else:
            encode = self._student.encode_queries if kind == "query" else self._student.encode_passages
            encoded, tokens = encode(texts), [_NO_TOKENS] * len(texts)
        return list(zip(encoded.vectors, tokens, strict=True))


_Read = tuple[NDArray[np.float32], NDArray[np.float16]]
"""The vector [dim] of a text, and those of its tokens [tokens, token_dim], if they count."""
_NO_TOKENS = np.zeros((0, 0), np.float16)


def _mean_best(query: torch.Tensor, passages: Sequence[_Read]) -> NDArray[np.float32]:
    """The mean, over a query's tokens, of the highest cosine with a token of each passage [n]."""
    rows = [torch.from_numpy(tokens).float() for _, tokens in passages]
    return mean_best_cosines([query], rows)[0].numpy()

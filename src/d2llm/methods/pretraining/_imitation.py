"""Learning to imitate another backbone, which may have another tokenizer: what the four kinds of it share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from d2llm.core.errors import InputError
from d2llm.core.progress import remarks
from d2llm.models.backbone import Backbone
from d2llm.models.sources import is_student
from d2llm.models.student import Student
from d2llm.models.tokens import TextKind
from d2llm.ops.ridge import RidgeSet, folds_of, ridge_weights
from d2llm.ops.token_alignment import align_tokens, aligned_states
from d2llm.recipe import BackboneConfig, Frozen
from d2llm.recipe.sections import ModelName
from d2llm.recipe.training import Pretraining
from d2llm.training.pretrain import PretrainingTask

if TYPE_CHECKING:
    from d2llm.recipe import Recipe

_FITTED_TEXTS = 2_000  # on which a map to a strange teacher is fitted before the first step
_FIT_PENALTY = 0.1  # as a fraction of the mean variance of a component
_COMPARED_TEXTS = 100
_COMPARED_TEXT = ["Cows drink water, don't they? Élan."]  # where there are no texts yet


class Imitation(Pretraining):
    """Settings of all kinds that imitate another backbone."""

    needs = frozenset({"texts", "another_backbone"})
    costs = "every text read once with gradient, and by the teacher"
    aligns_tokens: ClassVar[bool] = True
    """Whether states of tokens are compared, so that those of another tokenizer must be found."""
    needs_same_tokens: ClassVar[bool] = False

    teacher: ModelName | None = None
    """The backbone to imitate, named as ``backbone.model``, or a student, whose tuned backbone is meant. By default the
    student's own model with all its layers, for a student whose ``backbone.layers`` names some of them. If it has
    another tokenizer, states of tokens are compared by the characters that the tokens of both share, which needs
    tokenizers with character offsets; ``vectors`` needs none, and ``relations`` needs the same tokenizer."""

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe in which there is no backbone to imitate."""
        if self.teacher is None and recipe.student.backbone.layers is None:
            raise ValueError(
                f"training.pretraining is {self.kind}, but there is no backbone to imitate: name one as "
                "pretraining.teacher, or let student.backbone.layers leave out layers of the model, which then teaches "
                "with all of them"
            )

    def load_teacher(self, backbone: Backbone) -> tuple[Backbone, str]:
        """The backbone to imitate, and its fingerprint."""
        config = backbone.config
        if self.teacher is not None and is_student(Path(self.teacher)):
            student = Student.load(self.teacher, device=backbone.device, dtype=backbone.compute_dtype)
            return student.backbone, student.fingerprint
        if self.teacher is None and config.layers is None:
            raise InputError(f"the pretraining {self.kind} needs a teacher: name a backbone to imitate")
        taught_by = config.model_copy(update={"layers": None, "tuning": Frozen(), "bidirectional": False})
        if self.teacher is not None:
            taught_by = BackboneConfig(model=self.teacher, tuning=Frozen())
        pooling = backbone.pooling if self.teacher is None else None
        teacher = Backbone.load(taught_by, pooling, device=backbone.device, dtype=backbone.compute_dtype)
        return teacher, teacher.fingerprint_base()


@dataclass(frozen=True, slots=True)
class Reading:
    """How a teacher with another tokenizer reads a text.

    Attributes:
        ids: the teacher's own tokens.
        pairs: which of them belong to which of the student's (``align_tokens``); none if only vectors are compared.
        num_tokens: how many tokens of the student have characters of the text; 0 if only vectors are compared.
    """

    ids: list[int]
    pairs: Int32[np.ndarray, "pairs 3"]
    num_tokens: int


class ImitationTask(PretrainingTask):
    """A student and its teacher, which read the same texts.

    Attributes:
        teacher: the backbone to imitate.
        teacher_fingerprint: that of its weights.
        readings: how it reads each text, by the student's tokens, if it has another tokenizer; else empty.
        linear: the map from the student's width to the teacher's, trained along and dropped in the end, if any.
    """

    linear: nn.Linear | None = None

    def __init__(self, backbone: Backbone, config: Imitation, seed: int) -> None:
        super().__init__(backbone, config, seed)
        self.imitation = config
        self.readings: dict[tuple[int, ...], Reading] = {}
        self.teacher: Backbone | None = None
        self.teacher_fingerprint = ""

    def check(self) -> None:
        """Refuse a teacher with another tokenizer, where that does not do, or of another shape."""
        self.teacher, self.teacher_fingerprint = self.imitation.load_teacher(self.backbone)
        _same_tokens(self.backbone, self.teacher, _COMPARED_TEXT, self.imitation)
        self.build()

    def tokenize(self, passages: Sequence[str], queries: Sequence[str]) -> list[list[int]]:
        """The student's tokens; those of a teacher with another tokenizer are kept."""
        tokens = super().tokenize(passages, queries)
        if len({*map(tuple, tokens)}) < 2:
            return tokens
        teacher, self.teacher_fingerprint = self.imitation.load_teacher(self.backbone)
        self.teacher = teacher
        if not _same_tokens(self.backbone, teacher, [*passages[:_COMPARED_TEXTS]], self.imitation):
            # Texts that are the same to the student need not be so to the teacher: one of its readings stays.
            self.readings = _readings(self.backbone, teacher, queries, "query", self.imitation)
            self.readings |= _readings(self.backbone, teacher, passages, "passage", self.imitation)
            if self.imitation.aligns_tokens:
                _report_left_out([*self.readings.values()])
        return tokens

    def record(self, texts: Sequence[list[int]]) -> dict[str, Any]:
        """The teacher, and how it reads the texts."""
        readings = [self.readings[tuple(ids)] for ids in texts] if self.readings else []
        return {
            "teacher": self.teacher_fingerprint,
            "readings": [[read.ids, read.pairs.tolist()] for read in readings],
        }

    @property
    def taught_by(self) -> Backbone:
        """The teacher, after ``tokenize``."""
        assert self.teacher is not None
        return self.teacher

    def begin(self, texts: Sequence[list[int]]) -> None:
        """Begin with the linear map that predicts a strange teacher best, as the student is now.

        Otherwise the first steps teach the backbone what all of the teacher's states have in common, and overwrite what
        it knows: its coordinates have nothing to do with the teacher's.
        """
        if self.linear is not None and (self.readings or self.taught_by.dim != self.backbone.dim):
            self.fit(self.linear, texts)

    @torch.no_grad()
    def fit(self, linear: nn.Linear, texts: Sequence[list[int]]) -> None:
        """Make a linear map the one that predicts best what ``compared`` gives."""
        chosen = random.Random(f"{self.seed}:map").sample([*texts], min(_FITTED_TEXTS, len(texts)))
        student_features: list[Tensor] = []
        taught: list[Tensor] = []
        for part in self.batches(chosen):
            one, other = self.compared(*self.read([chosen[index] for index in part]))
            student_features.append(one)
            taught.append(other)
        explained = fit_linear(linear, torch.cat(student_features), torch.cat(taught))
        self.fitted(torch.cat(student_features))
        remarks.info("pretraining: a linear map of the student explains %.2f of the teacher's variance", explained)

    def fitted(self, features: Float[Tensor, "rows width"]) -> None:
        """Called after ``linear`` was fitted to the student's ``features``."""

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """How far the student is from the teacher."""
        for part in self.batches(batch):
            yield self.differences(*self.read([batch[index] for index in part])).sum() / len(batch)

    def read(self, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States of texts by the student [texts, tokens, dim] and by the teacher, each followed by its mask.

        Unless vectors are compared, the teacher's states are those of the student's tokens, and the first mask says
        which of these have one.
        """
        token_ids, mask = self.backbone.pad(texts)
        states, mask = self.backbone(token_ids, mask)
        readings = [self.readings[tuple(ids)] for ids in texts] if self.readings else []
        with torch.no_grad():
            read = self.taught_by.pad([reading.ids for reading in readings]) if readings else (token_ids, mask)
            teacher_states, teacher_mask = self.taught_by(*read)
            if readings and self.imitation.aligns_tokens:
                pairs = [reading.pairs for reading in readings]
                teacher_states, mask = aligned_states(teacher_states, pairs, states.shape[1])
        return states, mask, teacher_states, teacher_mask

    def compared(
        self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What of the student [rows, width] is to predict what of the teacher [rows, other width]."""
        return states[mask], teacher_states[mask]

    def differences(self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor) -> Tensor:
        """How far the student is from the teacher, for each text [texts].

        ``mask`` says which tokens are compared, and for vectors, which the student pools; ``teacher_mask``, which the
        teacher pools.
        """
        raise NotImplementedError


def fit_linear(linear: nn.Linear, features: Float[Tensor, "rows width"], targets: Float[Tensor, "rows other"]) -> float:
    """Make a linear map the ridge regression of targets on features; the explained fraction of variance."""
    one, other = (matrix.double().cpu().numpy() for matrix in (features, targets))
    bias = cast("Tensor | None", linear.bias)
    if bias is None:
        one, other = (np.concatenate([matrix, -matrix]) for matrix in (one, other))  # their means are 0
    middle, target_middle = one.mean(axis=0), other.mean(axis=0)
    weight = ridge_weights([RidgeSet(one, other, folds_of(len(one)))], _FIT_PENALTY)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight.T))
        if bias is not None:
            bias.copy_(torch.from_numpy(target_middle - middle @ weight))
    differences = other - target_middle
    error = (((one - middle) @ weight - differences) ** 2).sum()
    return 1 - float(error / max((differences**2).sum(), 1e-12))


def _same_tokens(backbone: Backbone, teacher: Backbone, texts: Sequence[str], config: Imitation) -> bool:
    """Whether the teacher reads ``texts`` as the same tokens; if not, whether the objective can do without."""
    one, other = (
        model.tokenize(texts, "passage", prefix="", limit=config.max_tokens).ids for model in (backbone, teacher)
    )
    if one == other and backbone.tokenizer.get_vocab() == teacher.tokenizer.get_vocab():
        return True
    student_name, taught_by = backbone.config.model, teacher.config.model
    if config.needs_same_tokens:
        raise InputError(
            f"pretraining.teacher: '{taught_by}' reads other tokens than the student's backbone '{student_name}', so "
            "their attention cannot be compared; use a teacher with the same tokenizer, or one of the kinds "
            "hidden_states, mutual_information and vectors"
        )
    slow = [model.config.model for model in (backbone, teacher) if not getattr(model.tokenizer, "is_fast", False)]
    if config.aligns_tokens and slow:
        raise InputError(
            f"pretraining.teacher: '{taught_by}' reads other tokens than the student's backbone '{student_name}', and "
            f"the tokenizer of '{slow[0]}' gives no character offsets by which they could be compared; use a teacher "
            "with the same tokenizer, or the kind vectors"
        )
    return False


def _readings(
    backbone: Backbone, teacher: Backbone, texts: Sequence[str], kind: TextKind, config: Imitation
) -> dict[tuple[int, ...], Reading]:
    """How the teacher, with its own prefixes and cut to as many tokens, reads texts, by the student's tokens."""
    student_ids, taught = (model.tokenize(texts, kind, limit=config.max_tokens).ids for model in (backbone, teacher))
    readings: dict[tuple[int, ...], Reading] = {}
    for text, ids, teacher_ids in zip(texts, student_ids, taught, strict=True):
        if not config.aligns_tokens:
            readings[tuple(ids)] = Reading(teacher_ids, np.zeros((0, 3), np.int32), 0)
            continue
        spans = backbone.token_spans(text, len(ids), kind)
        pairs = align_tokens(text, spans, teacher.token_spans(text, len(teacher_ids), kind))
        num_tokens = sum(bool(text[max(0, start) : max(0, end)].strip()) for start, end in spans)
        readings[tuple(ids)] = Reading(teacher_ids, pairs, num_tokens)
    return readings


def _report_left_out(readings: Sequence[Reading]) -> None:
    """Say how many of the student's tokens have none of the teacher's; refuse texts in which no token has one."""
    total = sum(read.num_tokens for read in readings)
    compared = sum(len({*read.pairs[:, 0].tolist()}) for read in readings)
    if not compared:
        raise InputError(
            "pretraining.teacher: no token of the student shares a character with one of the teacher, so their states "
            "cannot be compared; use the kind vectors"
        )
    remarks.info(
        "pretraining: the teacher has another tokenizer, and %d of %d tokens of the texts have none of its tokens at "
        "the same characters; these, white space, prefixes and special tokens are left out of the loss",
        total - compared,
        total,
    )

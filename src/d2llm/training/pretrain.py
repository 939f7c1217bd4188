"""The stage before distillation: trains a student's backbone on texts without labels (``[training.pretraining]``).

Four objectives need no other model: the backbone learns to recognise a text that it reads twice with different dropout
(``simcse``), also with a span of tokens masked (``mirror``); to predict from a text's vector which words are in it and
which follow (``words``); or, as a decoder that reads in both directions, to predict masked tokens
(``masked_next_token``). Four imitate another backbone: its attention (``relations``), its states of tokens
(``hidden_states``, or ``mutual_information`` with them) or its vectors of texts (``vectors``). They repair, for
instance, a backbone from which layers were left out (``backbone.layers``). A teacher with another tokenizer reads its
own tokens, and its states are compared where the tokens of both share characters; only ``relations`` needs one
tokenizer.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from d2llm.core.errors import InputError, ModelError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.data.training import TrainingSource
from d2llm.models.backbone import Backbone, TextKind, is_decoder, layers_of
from d2llm.models.device import tokens_to_train
from d2llm.models.sources import load_pretrained
from d2llm.models.student import Student
from d2llm.models.teachers.causal import AnswerHead
from d2llm.ops.batching import even_batches, token_budget_batches
from d2llm.ops.bm25_words import sentences
from d2llm.ops.losses import in_batch_cross_entropy
from d2llm.ops.ridge import RidgeSet, folds_of, ridge_weights
from d2llm.ops.token_alignment import align_tokens, aligned_states
from d2llm.recipe import BackboneConfig, Frozen, PretrainingConfig
from d2llm.training.checkpoints import remarks, trainable, warmup_steps
from d2llm.training.trainer import Trainable, Trainer

_PROJECTION_RATE = 1e-3  # a new linear map needs a higher rate than weights that were trained before
_FITTED_TEXTS = 2_000  # on which a map to a strange teacher is fitted before the first step
_FIT_PENALTY = 0.1  # as a share of the mean variance of a component
_COMPARED_TEXTS = 100
_WEIGHT_DECAY = 0.01
_NO_ATTENTION = -1e4  # of padding: its exponential is 0, and unlike -inf it leaves no NaN in gradients
_ATTENTION_PARTS = (
    ("query", "q_proj", "q_lin", "q"),
    ("key", "k_proj", "k_lin", "k"),
    ("value", "v_proj", "v_lin", "v"),
)
"""What models call the linear layers that make queries, keys and values."""


@dataclass(frozen=True, slots=True)
class PretrainingReport:
    """The result of a pretraining.

    Attributes:
        texts: number of different texts.
        steps: number of steps.
        first_loss: mean loss of the first tenth of the steps.
        last_loss: the same of the last tenth.
        seconds: since the start, or since the last resumption.
    """

    texts: int
    steps: int
    first_loss: float
    last_loss: float
    seconds: float


def pretrain_backbone(
    student: Student,
    passages: Sequence[str],
    folder: Path,
    config: PretrainingConfig,
    *,
    queries: Sequence[str] = (),
    seed: int = 0,
    checkpoint_minutes: float = 5.0,
) -> PretrainingReport:
    """Train the backbone of a new student on texts without labels, in place; an interrupted run continues.

    Afterwards the student can be trained further (``distill`` does so), used or saved. What is trained is what
    ``backbone.tuning`` says: adapters or all weights. A second call with the same folder takes up the finished result.

    Args:
        student: the student; its pooling and its head stay as they are.
        passages: texts to read as passages.
        folder: where the checkpoint and the log are kept.
        config: objective and schedule.
        queries: texts to read as queries.
        seed: seed of the order of the texts, of dropout and masks, and of new weights.
        checkpoint_minutes: maximum time between checkpoints.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last complete step is kept.
        InputError: there is no objective or too few texts, the backbone is frozen, has no dropout, no mask token or no
            token embeddings, or is no bidirectional decoder, the teacher is missing, or has another tokenizer while
            the objective is ``relations`` or one of the two gives no character offsets, or the checkpoint is from
            another run.
        ModelError: the attention of one of the two backbones cannot be read.
        TrainingDivergedError: the loss is not finite; the last good checkpoint is kept.
    """
    started = time.monotonic()
    run = _Pretraining(student, passages, queries, folder, config, seed, checkpoint_minutes)
    run.train()
    first, last = run.trainer.mean_losses
    return PretrainingReport(len(run.texts), run.trainer.step, first, last, time.monotonic() - started)


def unlabelled_texts(
    sources: Sequence[TrainingSource], max_passages: int, *, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Passages and train queries of data sets: of each at most ``max_passages`` passages and as many queries.

    Passages that other splits judge are left out, unless training has them as positives too.
    """
    passages: list[str] = []
    queries: list[str] = []
    for source in sources:
        rng = random.Random(f"{seed}:{source.dataset.name}")
        others = [judged for split, judged in source.dataset.qrels.items() if split != "train"]
        held_out = {passage_id for judged in others for grades in judged.values() for passage_id in grades}
        held_out -= {passage_id for entry in source.plan.entries for passage_id in entry.positives}
        passage_ids = sorted(source.dataset.passages.keys() - held_out)
        query_ids = sorted(entry.query_id for entry in source.plan.entries)
        passages += map(source.passage_text, rng.sample(passage_ids, min(max_passages, len(passage_ids))))
        queries += map(source.query_text, rng.sample(query_ids, min(max_passages, len(query_ids))))
    return passages, queries


def contrastive_loss(
    first: Float[Tensor, "texts dim"], second: Float[Tensor, "texts dim"], *, temperature: float
) -> Float[Tensor, ""]:
    """Each text is to be recognised among all texts of the batch, from two of its vectors.

    L = -1/N sum_i log( exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t) )

    Gao et al., "SimCSE", EMNLP 2021 (arXiv 2104.08821), section 3. Liu et al., "Mirror-BERT", EMNLP 2021 (arXiv
    2104.08027), section 2, also compares the other way round, and the texts of one side with each other.
    """
    cosines = functional.normalize(first, dim=1) @ functional.normalize(second, dim=1).T
    same = torch.eye(len(first), dtype=torch.bool, device=first.device)
    return in_batch_cross_entropy(cosines, same, torch.ones_like(same), temperature=temperature)


def mask_span(ids: Sequence[int], length: int, mask_id: int, rng: random.Random) -> list[int]:
    """Token ids with ``length`` neighbouring tokens, but neither the first nor the last one, replaced by one mask.

    A text keeps at least one of its tokens. Mirror-BERT (arXiv 2104.08027), section 2, masks characters instead.
    """
    length = min(length, len(ids) - 3)
    if length < 1:
        return list(ids)
    start = rng.randint(1, len(ids) - 1 - length)
    return [*ids[:start], mask_id, *ids[start + length :]]


def relation_divergence(
    student: Float[Tensor, "texts tokens student_dim"],
    teacher: Float[Tensor, "texts tokens teacher_dim"],
    mask: Bool[Tensor, "texts tokens"],
    *,
    heads: int,
) -> Float[Tensor, " texts"]:
    """How far the relations of a text's tokens differ from the teacher's: the mean KL divergence over heads and tokens.

    Each relation is softmax(V_h V_h^T / sqrt(d_h)) over the text's tokens, where V_h is the part of the queries (or
    keys, or values) that belongs to the relation head h, of width d_h. Wang et al., "MiniLMv2", ACL Findings 2021
    (arXiv 2012.15828), section 3.
    """

    def log_relations(vectors: Tensor) -> Tensor:  # [texts, heads, tokens, tokens]
        parts = vectors.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = parts @ parts.transpose(2, 3) / parts.shape[-1] ** 0.5
        return scores.masked_fill(~mask[:, None, None], _NO_ATTENTION).log_softmax(dim=-1)

    target, predicted = log_relations(teacher), log_relations(student)
    by_token = (target.exp() * (target - predicted)).sum(dim=-1).mean(dim=1)
    return (by_token * mask).sum(dim=1) / mask.sum(dim=1)


def state_distance(
    student: Float[Tensor, "texts tokens dim"],
    teacher: Float[Tensor, "texts tokens dim"],
    mask: Bool[Tensor, "texts tokens"],
) -> Float[Tensor, " texts"]:
    """Mean squared difference of the tokens' states, 0 for a text without any; the student's were projected to the
    teacher's width.

    Jiao et al., "TinyBERT", EMNLP Findings 2020 (arXiv 1909.10351), the loss of hidden states, here of the last
    layer; also used in "ERNIE-Tiny" (Su et al. 2021, arXiv 2106.02241).
    """
    by_token = (student.float() - teacher.float()).square().mean(dim=2)
    return (by_token * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def mutual_information(scores: Float[Tensor, "tokens tokens"], *, alpha: float) -> Float[Tensor, ""]:
    """A lower bound, in nats, of what the student's state of a token says about the teacher's state of the same token.

    I = 1 + mean_j log( e^f_jj / (alpha m_j + 1 - alpha) ) - mean_j m'_j / (alpha m'_j + 1 - alpha)

    with f_ij the ``scores`` of the student's state i with the teacher's state j, m_j the mean of e^f_ij over all i, and
    m'_j that over i other than j. alpha = 1 is InfoNCE, which cannot exceed the log of the number of tokens; a lower
    one has less bias and more variance. He et al., "Distiller: A Systematic Study of Model Distillation Methods in
    Natural Language Processing", SustaiNLP 2021 (arXiv 2109.11105), which takes the bound from Poole et al., "On
    Variational Bounds of Mutual Information", ICML 2019. Its q(y) is 1 here: the critic that gives the scores has a
    constant of its own. There, the states of several layers are compared; here those of the last layer.
    """
    scores, number = scores.float(), len(scores)
    if number < 2:
        return scores.sum() * 0
    same = torch.eye(number, dtype=torch.bool, device=scores.device)
    means = scores.logsumexp(dim=0) - math.log(number)
    others = scores.masked_fill(same, _NO_ATTENTION).logsumexp(dim=0) - math.log(number - 1)

    def mixed(values: Tensor) -> Tensor:  # log(alpha e^value + 1 - alpha)
        parts = [values + math.log(alpha)] if alpha else []
        return torch.stack([*parts, *([torch.full_like(values, math.log1p(-alpha))] if alpha < 1 else [])]).logsumexp(0)

    return 1 + (scores.diagonal() - mixed(means)).mean() - (others - mixed(others)).exp().mean()


def word_loss(logits: Float[Tensor, "texts vocabulary"], words: Sequence[Sequence[int]]) -> Float[Tensor, " texts"]:
    """How surprising a text's words are, by the logits that its vector gives to all of them; 0 for a text without any.

    L = -1/|T| sum_{t in T} log softmax(logits)_t, with T the set of the text's tokens.

    Li et al., "Making Large Language Models A Better Foundation For Dense Retrieval" (LLaRA, also Llama2Vec), 2023
    (arXiv 2312.15503): EBAE if they are the text's own words, EBAR if they are those of what follows. There,
    prompts and added tokens ask a decoder for one vector or the other; here two linear maps make both from one vector.
    """
    log_probabilities = logits.float().log_softmax(dim=1)
    losses = [
        -row[[*{*each}]].mean() if each else row.sum() * 0 for row, each in zip(log_probabilities, words, strict=True)
    ]
    return torch.stack(losses)


def mask_tokens(ids: Sequence[int], share: float, mask_id: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Token ids with a ``share`` of them, at least one, replaced by the mask, and the places of these, in order.

    The first token stays, because no state is before it. A text of one token has no masks.
    """
    places = sorted(rng.sample(range(1, len(ids)), max(1, round(share * (len(ids) - 1))))) if len(ids) > 1 else []
    masked = [*ids]
    for place in places:
        masked[place] = mask_id
    return masked, places


def masked_next_token_loss(
    states: Float[Tensor, "texts tokens dim"],
    ids: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    head: Callable[[Tensor], Tensor],
) -> Float[Tensor, " texts"]:
    """How surprising the masked tokens of each text are to a language model's ``head``, read at the state before each.

    The state before, because there a decoder predicted the token before it became bidirectional. BehnamGhader et al.,
    "LLM2Vec: Large Language Models Are Secretly Powerful Text Encoders", COLM 2024 (arXiv 2404.05961), section 2, the
    second of three steps; the third is ``simcse``.
    """
    rows = [row for row, each in enumerate(places) for _ in each]
    columns = [place for each in places for place in each]
    target = torch.tensor([ids[row][column] for row, column in zip(rows, columns, strict=True)], device=states.device)
    before = states[rows, [column - 1 for column in columns]]
    losses = functional.cross_entropy(head(before).float(), target.long(), reduction="none")
    sums = losses.new_zeros(len(ids)).index_add(0, torch.tensor(rows, device=states.device, dtype=torch.long), losses)
    return sums / torch.tensor([max(1, len(each)) for each in places], device=states.device)


def vector_distance(
    student: Float[Tensor, "texts dim"], teacher: Float[Tensor, "texts dim"]
) -> Float[Tensor, " texts"]:
    """1 minus the cosine of the student's and the teacher's vector.

    Distillation on texts without labels before that on labels: Turc et al., "Well-Read Students Learn Better", 2019
    (arXiv 1908.08962), whose teacher gives classes; here it gives vectors.
    """
    return 1 - torch.cosine_similarity(student.float(), teacher.float(), dim=1)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a teacher with another tokenizer reads a text.

    Attributes:
        ids: the teacher's own tokens.
        pairs: which of them belong to which of the student's (``align_tokens``); none if only vectors are compared.
        num_tokens: how many tokens of the student have characters of the text; 0 if only vectors are compared.
    """

    ids: list[int]
    pairs: Int32[np.ndarray, "pairs 3"]
    num_tokens: int


class _Pretraining(Trainable):
    """One pretraining: its texts, its teacher and what is trained."""

    title = "pretraining"

    def __init__(
        self,
        student: Student,
        passages: Sequence[str],
        queries: Sequence[str],
        folder: Path,
        config: PretrainingConfig,
        seed: int,
        checkpoint_minutes: float = 5.0,
    ) -> None:
        """Begin a run, or resume the one whose checkpoint is in ``folder``."""
        self.backbone, self.config, self.seed = student.backbone, config, seed
        _check_backbone(self.backbone, config)
        self.following: dict[tuple[int, ...], list[int]] = {}
        if config.objective == "words":
            passages = self._cut(passages)
        # The same text twice would have to be told from itself.
        tokenized = [
            *self.backbone.tokenize(passages, "passage", limit=config.max_tokens).ids,
            *self.backbone.tokenize(queries, "query", limit=config.max_tokens).ids,
        ]
        self.texts = [[*ids] for ids in dict.fromkeys(map(tuple, tokenized))]
        if len(self.texts) < 2:
            raise InputError(f"{len(self.texts)} different texts are too few to train a backbone on; give thousands")
        self.teacher = _load_teacher(self.backbone, config)
        self.readings: dict[tuple[int, ...], _Reading] = {}
        if self.teacher is not None and not _same_tokens(
            self.backbone, self.teacher, [*passages[:_COMPARED_TEXTS]], config
        ):
            # Texts that are the same to the student need not be so to the teacher: one of its readings stays.
            self.readings = _readings(self.backbone, self.teacher, queries, "query", config)
            self.readings |= _readings(self.backbone, self.teacher, passages, "passage", config)
            if config.objective != "vectors":
                _report_left_out([*self.readings.values()])
        following = [self.following.get(tuple(ids), []) for ids in self.texts] if self.following else []
        readings = [self.readings[tuple(ids)] for ids in self.texts] if self.readings else []
        taught = [[each.ids, each.pairs.tolist()] for each in readings]
        self.settings = _settings(student, [*self.texts, *following, *taught], self.teacher, config, seed)
        student.prepare_training(seed=seed)
        is_strange = bool(self.readings)
        self.projection = _projection(self.backbone, self.teacher, config, seed, is_strange=is_strange)
        self.head = _word_head(self.backbone) if config.objective in ("words", "masked_next_token") else None
        self.special = {*map(int, self.backbone.tokenizer.all_special_ids)}
        self.attention: list[_Attention] = []
        if self.teacher is not None and config.objective == "relations":
            pairs = ((self.backbone, None), (self.teacher, config.teacher_layer))
            self.attention = [_Attention(model, layer, config.relation_heads) for model, layer in pairs]
        self.parameters = trainable(self.backbone)
        added = {} if self.projection is None else {f"projection.{n}": p for n, p in self.projection.named_parameters()}
        rate = config.rate_for(self.backbone.config.tuning.kind)
        self.groups = [
            ([*self.parameters.values()], rate, _WEIGHT_DECAY),
            ([*added.values()], _PROJECTION_RATE, 0.0),
        ]
        self.parameters |= added
        self.per_epoch, self.batch_size = even_batches(len(self.texts), config.batch_texts)
        self.total_steps = config.epochs * self.per_epoch
        warmup = warmup_steps(config, self.total_steps)
        self.trainer = Trainer(
            self, folder, self.settings, seed=seed, warmup_steps=warmup, checkpoint_minutes=checkpoint_minutes
        )
        is_fitted = self.teacher is not None and (is_strange or self.teacher.dim != self.backbone.dim)
        if is_fitted and not self.trainer.is_resumed:
            self._fit_projection()

    def train(self) -> None:
        """Train to the end; a run that is finished trains nothing."""
        dropouts = set_dropout(self.backbone.model, self.config.dropout_rate)
        hooks = [hook for each in self.attention for hook in each.listen()]
        self.backbone.model.train()
        try:
            self.trainer.train()
        finally:
            restore_dropout(dropouts)
            self.backbone.eval()
            for hook in hooks:
                hook.remove()

    def step(self, step: int) -> dict[str, Any]:
        """Add the gradient of a batch, part by part."""
        epoch, place = divmod(step, self.per_epoch)
        order = random.Random(f"{self.seed}:{epoch}").sample(range(len(self.texts)), len(self.texts))
        batch = [self.texts[n] for n in order[place * self.batch_size : (place + 1) * self.batch_size]]
        total = 0.0
        for loss in self._losses(batch, random.Random(f"{self.seed}:mask:{step}")):
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    def _losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """The parts of a batch's loss, whose sum it is; the gradient of each part can be computed on its own."""
        config = self.config
        if self.head is not None:
            parts = [[batch[index] for index in part] for part in self._parts(batch)]
            for texts in parts:
                values = self._word_losses(texts) if config.objective == "words" else self._masked_losses(texts, rng)
                yield values.sum() / len(batch)
            return
        if self.teacher is None:
            other = batch
            if config.objective == "mirror":
                mask_id: Any = self.backbone.tokenizer.mask_token_id
                other = [mask_span(ids, config.masked_tokens, mask_id, rng) for ids in batch]
            first, second = self._vectors(batch), self._vectors(other)
            yield contrastive_loss(first, second, temperature=config.temperature)
            return
        for part in self._parts(batch):
            yield self._differences(*self._read([batch[index] for index in part])).sum() / len(batch)

    def _read(self, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States of texts by the student [texts, tokens, dim] and by the teacher, each followed by its mask.

        Unless vectors are compared, the teacher's states are those of the student's tokens, and the first mask says
        which of these have one.
        """
        assert self.teacher is not None
        token_ids, mask = self.backbone.pad(texts)
        states, mask = self.backbone(token_ids, mask)
        readings = [self.readings[tuple(ids)] for ids in texts] if self.readings else []
        with torch.no_grad():
            read = self.teacher.pad([each.ids for each in readings]) if readings else (token_ids, mask)
            teacher_states, teacher_mask = self.teacher(*read)
            if readings and self.config.objective != "vectors":
                pairs = [each.pairs for each in readings]
                teacher_states, mask = aligned_states(teacher_states, pairs, states.shape[1])
        return states, mask, teacher_states, teacher_mask

    @torch.no_grad()
    def _fit_projection(self) -> None:
        """Begin with the linear map that predicts a strange teacher best, as the student is now.

        Otherwise the first steps teach the backbone what all of the teacher's states have in common, and overwrite what
        it knows: its coordinates have nothing to do with the teacher's.
        """
        projection = self.projection.projection if isinstance(self.projection, _Critic) else self.projection
        if self.teacher is None or not isinstance(projection, nn.Linear):
            return
        chosen = random.Random(f"{self.seed}:map").sample(self.texts, min(_FITTED_TEXTS, len(self.texts)))
        own: list[Tensor] = []
        taught: list[Tensor] = []
        for part in self._parts(chosen):
            states, mask, teacher_states, teacher_mask = self._read([chosen[index] for index in part])
            if self.config.objective == "vectors":
                own.append(self.backbone.pool(states, mask))
                taught.append(functional.normalize(self.teacher.pool(teacher_states, teacher_mask).float(), dim=1))
            else:
                own.append(states[mask])
                taught.append(teacher_states[mask])
        explained = fit_linear(projection, torch.cat(own), torch.cat(taught))
        if isinstance(self.projection, _Critic):  # compares directions: what all have in common tells no token apart
            projection.bias.copy_(-projection.weight @ torch.cat(own).float().mean(dim=0))
        remarks.info("pretraining: a linear map of the student explains %.2f of the teacher's variance", explained)

    def _differences(self, states: Tensor, mask: Tensor, teacher_states: Tensor, teacher_mask: Tensor) -> Tensor:
        """How far the student is from the teacher, for each text [texts].

        ``mask`` says which tokens are compared, and for vectors, which the student pools; ``teacher_mask``, which the
        teacher pools.
        """
        assert self.teacher is not None
        if self.config.objective == "relations":
            own, taught = (each.vectors for each in self.attention)
            values = [
                relation_divergence(one, other, mask, heads=self.config.relation_heads)
                for one, other in zip(own, taught, strict=True)
            ]
            return torch.stack(values).sum(dim=0)
        project = self.projection or nn.Identity()
        if isinstance(self.projection, _Critic):
            information = mutual_information(
                self.projection(states[mask], teacher_states[mask]), alpha=self.config.information_alpha
            )
            return -information.expand(len(states))
        if self.config.objective == "hidden_states":
            return state_distance(project(states.float()), teacher_states, mask)
        own, taught = self.backbone.pool(states, mask), self.teacher.pool(teacher_states, teacher_mask)
        return vector_distance(project(own), taught)

    def _cut(self, passages: Sequence[str]) -> list[str]:
        """Passages of several sentences, in two parts each; the tokens of the second are what follows the first."""
        texts: list[str] = []
        for passage in passages:
            starts = [start for start, _ in sentences(passage)[1:]]
            # At the sentence that begins nearest to the middle.
            cut = min(starts, key=lambda start: abs(2 * start - len(passage)), default=len(passage))
            texts += [passage[:cut].rstrip(), *([passage[cut:]] if cut < len(passage) else [])]
            if cut < len(passage):
                one, other = self.backbone.tokenize(texts[-2:], "passage", limit=self.config.max_tokens).ids
                self.following[tuple(one)] = other
        remarks.info("pretraining: something follows in %d of %d passages", len(self.following), len(passages))
        return texts

    def _word_losses(self, texts: Sequence[list[int]]) -> Tensor:
        """How badly the vector of each text predicts its own words and those that follow, one half each [texts]."""
        assert self.head is not None
        assert isinstance(self.projection, nn.ModuleList)
        states, mask = self.backbone(*self.backbone.pad(texts))
        vectors = self.backbone.pool(states, mask)
        following = [self.following.get(tuple(ids), []) for ids in texts]
        own, next_ones = (
            word_loss(self.head(project(vectors)), [[one for one in ids if one not in self.special] for ids in words])
            for project, words in zip(self.projection, (texts, following), strict=True)
        )
        return (own + next_ones) / 2

    def _masked_losses(self, texts: Sequence[list[int]], rng: random.Random) -> Tensor:
        """How badly the masked tokens of each text are predicted [texts]."""
        assert self.head is not None
        mask_id = _mask_id(self.backbone)
        masks = [mask_tokens(ids, self.config.masked_share, mask_id, rng) for ids in texts]
        states, _ = self.backbone(*self.backbone.pad([ids for ids, _ in masks]))
        return masked_next_token_loss(states, texts, [places for _, places in masks], self.head)

    def _vectors(self, batch: Sequence[list[int]]) -> Tensor:
        """Vectors [texts, dim] of the backbone's own pooling."""
        vectors: list[Tensor] = [torch.empty(0)] * len(batch)
        for part in self._parts(batch):
            states, mask = self.backbone(*self.backbone.pad([batch[index] for index in part]))
            for index, vector in zip(part, self.backbone.pool(states, mask), strict=True):
                vectors[index] = vector
        return torch.stack(vectors)

    def _parts(self, batch: Sequence[list[int]]) -> list[list[int]]:
        """Texts of similar length, to be read in one pass."""
        most = tokens_to_train(self.backbone.device, self.backbone.state_size)
        return token_budget_batches([len(ids) for ids in batch], max_tokens=most, max_items=len(batch))


class _Attention:
    """The queries, keys and values of one layer of a backbone (by default the last), as it last read texts."""

    def __init__(self, backbone: Backbone, layer: int | None, heads: int) -> None:
        """Find the linear layers that make them, and check that each can be split into ``heads`` parts."""
        name = backbone.config.model
        layers = layers_of(backbone.model, name=name)
        if layer is not None and layer >= len(layers):
            raise InputError(f"teacher_layer is {layer}, but '{name}' has only layers 0 to {len(layers) - 1}")
        self._linear: list[nn.Module] = []
        for names in _ATTENTION_PARTS:
            modules = layers[-1 if layer is None else layer].named_modules()
            named = [module for path, module in modules if path.rpartition(".")[2] in names]
            if len(named) != 1:
                raise ModelError(
                    f"'{name}' ({type(backbone.model).__name__}) has no separate layers for queries, keys and values, "
                    "which the objective relations compares; use hidden_states or vectors"
                )
            if (width := int(cast(Any, named[0]).out_features)) % heads:
                raise InputError(
                    f"relation_heads is {heads}, but '{name}' has queries, keys or values of width {width}, which is "
                    "not a multiple of it; set another number"
                )
            self._linear += named
        self.vectors: list[Tensor] = []

    def listen(self) -> list[RemovableHandle]:
        """Keep them from now on; returns the hooks, for when that is to end."""
        self.vectors = [torch.empty(0)] * len(self._linear)

        def keep(place: int) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                self.vectors[place] = output

            return hook

        return [linear.register_forward_hook(keep(place)) for place, linear in enumerate(self._linear)]


class _Critic(nn.Module):
    """Scores of the student's states with the teacher's: a e^s cos(W x, y) + b, with W, s and b learned."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.constant = nn.Parameter(torch.zeros(()))

    def forward(
        self, student: Float[Tensor, "tokens student_dim"], teacher: Float[Tensor, "tokens teacher_dim"]
    ) -> Float[Tensor, "tokens tokens"]:
        """The score of each of the student's states (rows) with each of the teacher's (columns)."""
        one = functional.normalize(self.projection(student.float()), dim=1)
        return self.log_scale.exp() * one @ functional.normalize(teacher.float(), dim=1).T + self.constant


def set_dropout(model: nn.Module, rate: float) -> list[tuple[Any, str, float]]:
    """Give all layers that have dropout this rate; returns what ``restore_dropout`` needs."""
    before: list[tuple[Any, str, float]] = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
        value = getattr(module, name, None)
        if isinstance(value, float | int):  # of decoders; elsewhere a model may have a module of this name
            before.append((module, name, value))
            setattr(module, name, rate)
    return before


def restore_dropout(before: Sequence[tuple[Any, str, float]]) -> None:
    """Undo ``set_dropout``."""
    for module, name, rate in before:
        setattr(module, name, rate)


def _check_backbone(backbone: Backbone, config: PretrainingConfig) -> None:
    """Refuse a backbone that cannot learn the objective."""
    model = backbone.config.model
    if config.objective is None:
        raise InputError("there is no objective; name one, such as simcse")
    if backbone.config.tuning.kind == "frozen":
        raise InputError(f"the backbone '{model}' is frozen; set tuning to lora or full to pretrain it")
    if backbone.config.has_two_adapters:
        raise InputError("pretraining trains one backbone for all texts, but adapters is two; set it to one")
    if config.objective == "mirror" and backbone.tokenizer.mask_token_id is None:
        raise InputError(f"'{model}' has no token for masked text, which the objective mirror needs; use simcse")
    if config.objective == "masked_next_token":
        if not backbone.config.bidirectional:
            raise InputError(
                f"the objective masked_next_token is for decoders that read in both directions; set bidirectional for "
                f"'{model}', or choose another"
            )
        _mask_id(backbone)
    if config.objective == "simcse":
        dropouts = set_dropout(backbone.model, config.dropout_rate)
        restore_dropout(dropouts)
        if not dropouts:
            raise InputError(f"'{model}' has no layer with dropout, which the objective simcse needs; use another")


def _load_teacher(backbone: Backbone, config: PretrainingConfig) -> Backbone | None:
    """The backbone to imitate, if there is one."""
    if not config.is_taught:
        return None
    own = backbone.config
    if config.teacher is None and own.layers is None:
        raise InputError(f"the objective {config.objective} needs a teacher: name a backbone to imitate")
    taught_by = own.model_copy(update={"layers": None, "tuning": Frozen(), "bidirectional": False})
    if config.teacher is not None:
        taught_by = BackboneConfig(model=config.teacher, tuning=Frozen())
    return Backbone.load(taught_by, device=backbone.device, dtype=backbone.compute_dtype)


def _same_tokens(backbone: Backbone, teacher: Backbone, texts: Sequence[str], config: PretrainingConfig) -> bool:
    """Whether the teacher reads ``texts`` as the same tokens; if not, whether the objective can do without."""
    one, other = (
        each.tokenize(texts, "passage", prefix="", limit=config.max_tokens).ids for each in (backbone, teacher)
    )
    if one == other and backbone.tokenizer.get_vocab() == teacher.tokenizer.get_vocab():
        return True
    own, taught_by = backbone.config.model, teacher.config.model
    if config.objective == "relations":
        raise InputError(
            f"pretraining.teacher: '{taught_by}' reads other tokens than the student's backbone '{own}', so their "
            "attention cannot be compared; use a teacher with the same tokenizer, or one of the objectives "
            "hidden_states, mutual_information and vectors"
        )
    slow = [each.config.model for each in (backbone, teacher) if not getattr(each.tokenizer, "is_fast", False)]
    if config.objective != "vectors" and slow:
        raise InputError(
            f"pretraining.teacher: '{taught_by}' reads other tokens than the student's backbone '{own}', and the "
            f"tokenizer of '{slow[0]}' gives no character offsets by which they could be compared; use a teacher with "
            "the same tokenizer, or the objective vectors"
        )
    return False


def _readings(
    backbone: Backbone, teacher: Backbone, texts: Sequence[str], kind: TextKind, config: PretrainingConfig
) -> dict[tuple[int, ...], _Reading]:
    """How the teacher, with its own prefixes and cut to as many tokens, reads texts, by the student's tokens."""
    own, taught = (each.tokenize(texts, kind, limit=config.max_tokens).ids for each in (backbone, teacher))
    readings: dict[tuple[int, ...], _Reading] = {}
    for text, ids, teacher_ids in zip(texts, own, taught, strict=True):
        if config.objective == "vectors":
            readings[tuple(ids)] = _Reading(teacher_ids, np.zeros((0, 3), np.int32), 0)
            continue
        spans = backbone.token_places(text, len(ids), kind)
        pairs = align_tokens(text, spans, teacher.token_places(text, len(teacher_ids), kind))
        num_tokens = sum(bool(text[max(0, start) : max(0, end)].strip()) for start, end in spans)
        readings[tuple(ids)] = _Reading(teacher_ids, pairs, num_tokens)
    return readings


def _report_left_out(readings: Sequence[_Reading]) -> None:
    """Say how many of the student's tokens have none of the teacher's; refuse texts in which no token has one."""
    total = sum(each.num_tokens for each in readings)
    compared = sum(len({*each.pairs[:, 0].tolist()}) for each in readings)
    if not compared:
        raise InputError(
            "pretraining.teacher: no token of the student shares a character with one of the teacher, so their states "
            "cannot be compared; use the objective vectors"
        )
    remarks.info(
        "pretraining: the teacher has another tokenizer, and %d of %d tokens of the texts have none of its tokens at "
        "the same characters; these, white space, prefixes and special tokens are left out of the loss",
        total - compared,
        total,
    )


def _mask_id(backbone: Backbone) -> int:
    """The token that stands for masked ones: the tokenizer's own, or ``_`` as in LLM2Vec."""
    tokenizer = backbone.tokenizer
    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        mask_id = tokenizer.get_vocab().get("_")
    if mask_id is None:
        raise InputError(f"'{backbone.config.model}' has no token for masked text and none for '_'; use another model")
    return cast(int, mask_id)


def _word_head(backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """Logits of all tokens of the vocabulary from states [n, dim]: the language-model head of a decoder, which stays
    as it is; of other models, the inner products with their token embeddings.
    """
    if is_decoder(backbone.model.config):
        from transformers import AutoModelForCausalLM

        language_model = load_pretrained(AutoModelForCausalLM, backbone.location, dtype=backbone.compute_dtype)
        return AnswerHead(language_model).requires_grad_(False).to(backbone.device)
    vectors = cast(Any, backbone.model).get_input_embeddings().weight
    return lambda states: states.float() @ vectors.detach().float().T


def _projection(
    backbone: Backbone, teacher: Backbone | None, config: PretrainingConfig, seed: int, *, is_strange: bool
) -> nn.Linear | nn.ModuleList | _Critic | None:
    """The linear map from the student's width to the teacher's, trained along and dropped in the end.

    Vectors of the same width are compared as they are, so that the student's become the teacher's, unless it
    ``is_strange``. For ``words`` there are two maps of the student's vectors, for the text's own words and for those
    that follow.
    """
    if config.objective == "words":
        return nn.ModuleList([_linear(backbone.dim, backbone.dim, seed) for _ in range(2)]).to(backbone.device)
    if teacher is None or config.objective == "relations":
        return None
    if config.objective == "vectors" and backbone.dim == teacher.dim and not is_strange:
        return None
    projection = _linear(backbone.dim, teacher.dim, seed)
    made = _Critic(projection) if config.objective == "mutual_information" else projection
    return made.to(backbone.device)


def fit_linear(linear: nn.Linear, features: Float[Tensor, "rows width"], targets: Float[Tensor, "rows other"]) -> float:
    """Make a linear map the ridge regression of targets on features; the share of their variance that it explains."""
    one, other = (each.double().cpu().numpy() for each in (features, targets))
    middle, target_middle = one.mean(axis=0), other.mean(axis=0)
    weight = ridge_weights([RidgeSet(one, other, folds_of(len(one)))], _FIT_PENALTY)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight.T))
        linear.bias.copy_(torch.from_numpy(target_middle - middle @ weight))
    differences = other - target_middle
    error = (((one - middle) @ weight - differences) ** 2).sum()
    return 1 - float(error / max((differences**2).sum(), 1e-12))


def _linear(width: int, other: int, seed: int) -> nn.Linear:
    """A linear map from one width to another, at first the identity if they are the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = nn.Linear(width, other)
    if width == other:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


def _settings(
    student: Student, texts: Sequence[list[Any]], teacher: Backbone | None, config: PretrainingConfig, seed: int
) -> dict[str, Any]:
    """Everything that affects a run, as JSON; a checkpoint with other settings is from another run."""
    return {
        "pretraining": config.model_dump(mode="json"),
        "student": student.fingerprint,
        "teacher": None if teacher is None else teacher.fingerprint_base(),
        "texts": fingerprint_json(texts),
        "seed": seed,
    }

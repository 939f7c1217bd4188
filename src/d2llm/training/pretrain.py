"""The stage before distillation: trains a student's backbone on texts without labels (``[training.pretraining]``).

What is learnt is a kind of ``Pretraining``, one file each in ``methods/pretraining``: a backbone recognises texts that
it reads twice, predicts words, or imitates another backbone. Such a stage repairs, for instance, a backbone from which
layers were left out (``backbone.layers``).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.data.indexed_corpus import open_corpus
from d2llm.data.plan import TrainingSource
from d2llm.models.backbone import Backbone
from d2llm.models.device import tokens_to_train
from d2llm.models.pooling import TextPooling
from d2llm.models.pretrained import is_decoder
from d2llm.models.sources import load_pretrained
from d2llm.models.student import Student
from d2llm.models.teachers.causal import AnswerHead
from d2llm.ops.batching import even_batches, token_budget_batches
from d2llm.recipe.training import Pretraining
from d2llm.training.checkpoints import trainable, warmup_steps
from d2llm.training.trainer import Trainable, Trainer

NO_ATTENTION = -1e4
"""Of padding: its exponential is 0, and unlike -inf it leaves no NaN in gradients."""
_PROJECTION_RATE = 1e-3  # a new linear map needs a higher rate than weights that were trained before
_WEIGHT_DECAY = 0.01


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
    config: Pretraining,
    *,
    queries: Sequence[str] = (),
    seed: int = 0,
    checkpoint_minutes: float = 5.0,
) -> PretrainingReport:
    """Train the backbone of a new student on texts without labels, in place; an interrupted run continues.

    Afterwards the student can be trained further (``distill`` does so), used or saved. What is trained is what
    ``backbone.tuning`` says: adapters or all weights. A second call with the same folder takes up the finished result.

    Args:
        student: the student; its pooling and its head stay as they are, unless `components` trains the projection.
        passages: texts to read as passages.
        folder: where the checkpoint and the log are kept.
        config: what is learnt, and the schedule.
        queries: texts to read as queries.
        seed: seed of the order of the texts, of dropout and masks, and of new weights.
        checkpoint_minutes: maximum time between checkpoints.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint of the last complete step is kept.
        InputError: there are too few texts, the backbone is frozen or cannot learn this (no dropout, no mask token, no
            teacher, another tokenizer ...), or the checkpoint is from another run.
        ModelError: a part of a backbone that the kind needs cannot be read.
        TrainingDivergedError: the loss is not finite; the last good checkpoint is kept.
    """
    started = time.monotonic()
    run = _Pretraining(student, passages, queries, folder, config, seed, checkpoint_minutes)
    run.train()
    first, last = run.trainer.mean_losses
    return PretrainingReport(len(run.texts), run.trainer.step, first, last, time.monotonic() - started)


def unlabelled_texts(
    sources: Sequence[TrainingSource], config: Pretraining, *, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Passages and train queries of data sets: of each at most ``max_passages`` passages and as many queries.

    Passages that other splits judge are left out, unless training has them as positives too. With a ``corpus``, its
    texts are the passages, and there are no queries.
    """
    if config.corpus is not None:
        texts = [passage.full_text for passage in open_corpus([Path(config.corpus)], with_metadata=False).passages]
        return random.Random(f"{seed}:corpus").sample(texts, min(config.max_passages, len(texts))), []
    passages: list[str] = []
    queries: list[str] = []
    for source in sources:
        rng = random.Random(f"{seed}:{source.dataset.name}")
        others = [judged for split, judged in source.dataset.qrels.items() if split != "train"]
        held_out = {passage_id for judged in others for grades in judged.values() for passage_id in grades}
        held_out -= {passage_id for entry in source.plan.entries for passage_id in entry.positives}
        passage_ids = sorted(source.dataset.passages.keys() - held_out)
        query_ids = sorted(entry.query_id for entry in source.plan.entries)
        passages += map(source.passage_text, rng.sample(passage_ids, min(config.max_passages, len(passage_ids))))
        queries += map(source.query_text, rng.sample(query_ids, min(config.max_passages, len(query_ids))))
    return passages, queries


class PretrainingTask:
    """What one pretraining learns: the tokens of its texts, their loss, and what is trained beside the backbone.

    Each kind of ``Pretraining`` has a subclass. ``losses`` must be written; the rest has defaults.
    """

    def __init__(self, backbone: Backbone, config: Pretraining, seed: int) -> None:
        self.backbone, self.config, self.seed = backbone, config, seed

    def check(self) -> None:
        """Refuse a teacher that does not fit the backbone, before a text is read; both may lack their weights."""

    def tokenize(self, passages: Sequence[str], queries: Sequence[str]) -> list[list[int]]:
        """Token ids of each text to train on."""
        return [
            *self.backbone.tokenize(passages, "passage", limit=self.config.max_tokens).ids,
            *self.backbone.tokenize(queries, "query", limit=self.config.max_tokens).ids,
        ]

    def record(self, texts: Sequence[list[int]]) -> dict[str, Any]:  # noqa: ARG002
        """What the result depends on besides settings, student and texts, as JSON."""
        return {}

    def build(self) -> nn.Module | None:
        """Make what is trained along and dropped in the end; the backbone is ready for training."""
        return None

    def begin(self, texts: Sequence[list[int]]) -> None:
        """Called before the first step of a run that is not resumed."""

    def end(self, pooling: TextPooling) -> None:
        """Called after training: what was trained along may become the student's pooling."""

    def hooks(self) -> list[RemovableHandle]:
        """Hooks into the models, which are removed after training."""
        return []

    def losses(self, batch: Sequence[list[int]], rng: random.Random) -> Iterator[Tensor]:
        """The parts of a batch's loss, whose sum it is; the gradient of each part is computed on its own."""
        raise NotImplementedError

    def vectors_of(self, texts: Sequence[list[int]]) -> Float[Tensor, "texts dim"]:
        """The vectors of texts by the backbone's own pooling."""
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        for part in self.batches(texts):
            states, mask = self.backbone(*self.backbone.pad([texts[index] for index in part]))
            for index, vector in zip(part, self.backbone.pool(states, mask), strict=True):
                vectors[index] = vector
        return torch.stack(vectors)

    def batches(self, batch: Sequence[list[int]]) -> list[list[int]]:
        """Numbers of texts of similar length, to be read in one pass."""
        most = tokens_to_train(self.backbone.device, self.backbone.state_size)
        return token_budget_batches([len(ids) for ids in batch], max_tokens=most, max_items=len(batch))


class _Pretraining(Trainable):
    """One pretraining: its texts and what is trained."""

    title = "pretraining"

    def __init__(
        self,
        student: Student,
        passages: Sequence[str],
        queries: Sequence[str],
        folder: Path,
        config: Pretraining,
        seed: int,
        checkpoint_minutes: float = 5.0,
    ) -> None:
        """Begin a run, or resume the one whose checkpoint is in ``folder``."""
        self.backbone, self.config, self.seed = student.backbone, config, seed
        self.pooling = student.pooling
        _check_backbone(self.backbone)
        config.require_mask(self.backbone.config.model, self.backbone.tokenizer)
        self.task = config.task(self.backbone, seed)
        # The same text twice would have to be told from itself.
        self.texts = [[*ids] for ids in dict.fromkeys(map(tuple, self.task.tokenize(passages, queries)))]
        if len(self.texts) < 2:
            raise InputError(f"{len(self.texts)} different texts are too few to train a backbone on; give thousands")
        self.settings = {
            "pretraining": config.model_dump(mode="json"),
            "student": student.fingerprint,
            "texts": fingerprint_json([self.texts, self.task.record(self.texts)]),
            "seed": seed,
        }
        student.prepare_training(seed=seed)
        added_module = self.task.build()
        self.parameters = trainable(self.backbone)
        added = {} if added_module is None else {f"added.{n}": p for n, p in added_module.named_parameters()}
        self.groups = [
            ([*self.parameters.values()], config.rate_for(self.backbone.config.tuning.kind), _WEIGHT_DECAY),
            ([*added.values()], _PROJECTION_RATE, 0.0),
        ]
        self.parameters |= added
        self.per_epoch, self.batch_size = even_batches(len(self.texts), config.batch_texts)
        self.total_steps = config.epochs * self.per_epoch
        warmup = warmup_steps(config, self.total_steps)
        self.trainer = Trainer(
            self, folder, self.settings, seed=seed, warmup_steps=warmup, checkpoint_minutes=checkpoint_minutes
        )
        if not self.trainer.is_resumed:
            self.task.begin(self.texts)

    def train(self) -> None:
        """Train to the end; a run that is finished trains nothing."""
        dropouts = set_dropout(self.backbone.model, self.config.dropout_rate)
        hooks = self.task.hooks()
        self.backbone.model.train()
        try:
            self.trainer.train()
        finally:
            restore_dropout(dropouts)
            self.backbone.eval()
            for hook in hooks:
                hook.remove()
        self.task.end(self.pooling)

    def step(self, step: int) -> dict[str, Any]:
        """Add the gradient of a batch, part by part."""
        epoch, batch_index = divmod(step, self.per_epoch)
        order = random.Random(f"{self.seed}:{epoch}").sample(range(len(self.texts)), len(self.texts))
        batch = [self.texts[n] for n in order[batch_index * self.batch_size : (batch_index + 1) * self.batch_size]]
        total = 0.0
        for loss in self.task.losses(batch, random.Random(f"{self.seed}:mask:{step}")):
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}


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


def word_head(backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """Logits of all tokens of the vocabulary from states [n, dim]: the language-model head of a decoder, which stays
    as it is; of other models, the inner products with their token embeddings.
    """
    if is_decoder(backbone.model.config):
        from transformers import AutoModelForCausalLM

        language_model = load_pretrained(AutoModelForCausalLM, backbone.location, dtype=backbone.compute_dtype)
        return AnswerHead(language_model).requires_grad_(False).to(backbone.device)
    vectors = cast(Any, backbone.model).get_input_embeddings().weight
    return lambda states: states.float() @ vectors.detach().float().T


def identity_map(width: int, other: int, seed: int) -> nn.Linear:
    """A linear map from one width to another, at first the identity if they are the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = nn.Linear(width, other)
    if width == other:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


def _check_backbone(backbone: Backbone) -> None:
    """Refuse a backbone that is not trained, or is trained as two."""
    if backbone.config.tuning.kind == "frozen":
        raise InputError(f"the backbone '{backbone.config.model}' is frozen; set tuning to lora or full to pretrain it")
    if backbone.config.has_two_adapters:
        raise InputError("pretraining trains one backbone for all texts, but adapters is two; set it to one")

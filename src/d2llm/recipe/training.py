"""The sections of training and of what is fitted after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator

from d2llm.core.errors import InputError
from d2llm.core.registry import Registry, modules_in
from d2llm.core.types import ScoreFeature
from d2llm.recipe.sections import InputPath, LoraConfig, Quantization, Section, SectionOfKind, StudentName, WarmUpConfig
from d2llm.recipe.teacher import LocalTeacherConfig, TeacherConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from d2llm.models.backbone import Backbone
    from d2llm.recipe.recipe import Recipe
    from d2llm.training.pretrain import PretrainingTask


class ResidualConfig(WarmUpConfig):
    """The second stage: trains the interaction alone, on vectors that are encoded once (dot head)."""

    epochs: int = Field(default=3, ge=0)
    """0: one stage, interaction and vectors together. Otherwise the first stage trains the vectors alone."""
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    batch_queries: int = Field(default=32, ge=1)
    depth: int = Field(default=200, ge=1)
    """Draw neighbours from this many passages of the plan with the largest inner products."""
    num_near: int = Field(default=30, ge=0)
    """Neighbours per query and step, in addition to the plan's negatives."""
    num_random: int = Field(default=20, ge=0)
    off_task_penalty: float = Field(default=1.0, ge=0)
    """Penalty in the loss per unit of squared change that one task's interaction makes to rankings of the other task's
    texts: an interaction should not change what it was not trained on."""

    @model_validator(mode="wrap")
    @classmethod
    def _drop_the_rest(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Without epochs there is no such stage, and nothing else to say about it: such recipes are equal."""
        stage = handler(values)
        return stage if stage.epochs else handler({"epochs": 0})


class TokensConfig(WarmUpConfig):
    """The last stage: trains the projection that makes the token embeddings (``score_features.maxsim``)."""

    dim: int = Field(default=64, ge=1)
    """Width of a token's vector, at most that of the backbone; with 4 bits for each dimension, 64 take 32 bytes."""
    max_query_tokens: int = Field(default=16, ge=1)
    """Of a longer query only the rarest tokens count."""
    epochs: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch_queries: int = Field(default=32, ge=2)
    max_queries: int = Field(default=2_000, ge=1)
    """Train queries of each data set."""
    num_positives: int = Field(default=4, ge=1)
    """Relevant passages of a query that are read, at most; each step draws one."""
    num_hard: int = Field(default=2, ge=0)
    """Hard negatives by words, and the same number by vectors, of which each step draws as many as this."""
    depth: int = Field(default=20, ge=1)
    """Hard negatives are drawn from so many of the nearest passages."""


class Pretraining(SectionOfKind, WarmUpConfig):
    """The stage before distillation: trains the backbone on texts without labels (``training.pretrain``).

    The texts are passages and train queries of the recipe's data sets, or those of a corpus. Each kind is a subclass
    with settings of its own; docs/recipes.md has what each brought.

    Example::

        recipe = Recipe(training={"pretraining": {"kind": "simcse", "epochs": 2}})
    """

    needs = frozenset({"texts"})
    kinds = Registry("pretraining", modules_in("methods/pretraining"), "d2llm.pretraining")
    usual_dropout: ClassVar[float] = 0.0
    """The default of ``dropout``."""

    max_passages: int = Field(default=5_000, ge=1)
    """Passages of each data set, and at most as many of its train queries, drawn at random."""
    corpus: InputPath | None = None
    """A corpus, a document or a folder of them: at most ``max_passages`` of its texts are read instead of those of the
    data sets, such as general texts before those of the task."""
    max_tokens: int = Field(default=64, ge=4)
    """Longer texts are cut to so many tokens."""
    epochs: int = Field(default=1, ge=1)
    batch_texts: int = Field(default=32, ge=2)
    learning_rate: float | None = Field(default=None, gt=0)
    """By default 1e-4 for all weights (``backbone.tuning = "full"``), and 1e-3 for adapters."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout in all layers of the backbone that have one, also where only adapters are trained. By default 0.1 for
    ``simcse`` and ``mirror``, and none for the others."""

    @property
    def dropout_rate(self) -> float:
        """``dropout``, or the kind's default."""
        return self.usual_dropout if self.dropout is None else self.dropout

    def rate_for(self, tuning: str) -> float:
        """``learning_rate``, or its default for what is trained."""
        return self.learning_rate or (1e-4 if tuning == "full" else 1e-3)

    @property
    def masks(self) -> bool:
        """Whether it masks tokens of texts."""
        return "mask_token" in self.needs

    def require_mask(self, model: str, tokenizer: Any) -> None:
        """Raise an ``InputError`` if texts are masked, and the model's tokenizer has no token for that."""
        if self.masks and tokenizer.mask_token_id is None:
            raise InputError(
                f"'{model}' has no token for masked text, which the pretraining {self.kind} needs: use an encoder such "
                "as minilm, or another kind, such as simcse"
            )

    def check(self, recipe: Recipe) -> None:
        """Check that the rest of the recipe fits; raises a ``ValueError`` that says what to change."""

    def task(self, backbone: Backbone, seed: int) -> PretrainingTask:
        """What is learnt, with a backbone.

        Raises:
            InputError: this backbone cannot learn it.
        """
        raise NotImplementedError


class TrainingConfig(WarmUpConfig):
    """Optimisation settings of ``distill``."""

    start: StudentName | None = None
    """Continue from this student, a folder or a name; its settings must be those of ``[student]``, but a backbone that
    is ``frozen`` may have been tuned before and stays so. By default training starts from the pretrained backbone."""
    dual_head: bool = False
    """Two heads (DHO): one learns the data sets' judgements, the other imitates the teacher. At the end they are
    combined with the weights that are best on dev, into one inner product, so the student is like any other (dot
    head)."""
    complement_words: int | None = Field(default=None, ge=1)
    """Learn what words miss (CoRT): hard negatives are those of the plan that BM25 has among its first so many
    passages, and positives are drawn from those that it has not, where a query has any. For an index whose score counts
    words too. None: words play no part in the draw."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """For adapters; 1e-3 for a small model and few questions, 3e-5 to train all weights (``tuning = "full"``)."""
    head_learning_rate: float = Field(default=2e-4, gt=0)
    """Learning rate of PMA and IEM. Ten times as much saturates the interaction within a hundred steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    epochs: int | None = Field(default=None, ge=1)
    """By default as many as are needed for 60 steps, but at least 2 and at most 10."""
    batch_queries: int = Field(default=32, ge=1)
    num_positives: int = Field(default=1, ge=1)
    """Positives per query and step, of the queries that have so many; more where whole lists were judged."""
    num_hard: int = Field(default=2, ge=0)
    """Hard negatives per query and step, drawn from the plan's again in each epoch."""
    num_easy: int = Field(default=0, ge=0)
    clustered: bool = False
    """Batches of queries that are alike, so that a batch has harder negatives: clusters of what the student's vectors
    of a query and of its first positive are before the first step, as many as a pass has batches (CDE)."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    unlabelled: Literal["leave_out", "own_labels"] = "own_labels"
    """What to do with queries of the plan that the teacher has not labelled: leave them out, or train on the data set's
    own judgements."""
    unjudged: Literal["negatives", "leave_out", "ask_teacher"] = "negatives"
    """What to do with passages that training itself finds near a query (neighbours in the second stage, negatives of
    ``remine``) and that the teacher has not scored: treat them as irrelevant, leave them out, or have the teacher score
    them first, which takes time; the scores are kept with the other labels. For queries that learn from the data
    set's own judgements, they are always treated as irrelevant."""
    in_batch_labels: bool = False
    """Have the teacher score every query of a batch with the passages of the batch's other queries too, before the
    batch is used, as in the published training; the scores are kept with the other labels. Otherwise such a passage
    is irrelevant, unless it has a label. For queries that learn from the data set's own judgements, it always is."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between dev evaluations; by default a fifth of the run's steps, at most 200."""
    patience: int = Field(default=6, ge=1)
    """Stop after this many dev evaluations without improvement."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Stop the first stage after this much time, without that of interruptions; the best state so far is kept."""
    dev_queries: int = Field(default=150, ge=1)
    dev_passages: int = Field(default=1000, ge=1)
    """Dev corpus: the dev positives, their mined negatives, and random passages up to this number."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Maximum number of steps between checkpoints."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    """Maximum time between checkpoints. A checkpoint is also saved when Ctrl-C or SIGTERM stops the run."""
    sampling_temperature: float = Field(default=1.0, ge=1)
    """T: a data set of n queries has a fraction proportional to n^(1/T) in the batches. 1: in proportion to its size;
    above 1: small sets are sampled more often and large ones less, with the same number of batches."""
    part_tokens: int | None = Field(default=None, ge=1)
    """Tokens, including padding, in one pass through the backbone; by default 512 on a CPU, where larger passes are no
    faster, and 2,048 to 32,768 elsewhere: the more, the smaller the backbone and the larger the memory."""
    gradient_caching: Literal["auto", "on", "off"] = "auto"
    """Encode the texts of a batch twice, part by part, so that memory holds the intermediate results of one part at a
    time; the gradient is the same. ``auto``: only for parts whose intermediate results do not fit into ``graph_gib``.
    """
    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass and compute the rest again: for a large backbone, a
    fraction of the memory for about a third more time, with the same result. Pretraining does without."""
    graph_gib: float | None = Field(default=None, gt=0)
    """Memory for the intermediate results that ``auto`` keeps, in GiB; by default a third of what is free when the run
    starts. It affects only speed."""
    remine: bool = False
    """At the start of each epoch from the second on, mine the hard negatives again with the student's own ranking."""
    pretraining: tuple[Pretraining, ...] = ()
    """What the backbone learns from texts without labels, before distillation: stages, one after the other, each a
    table ``[[training.pretraining]]``. A single one may be ``[training.pretraining]``."""
    residual: ResidualConfig = ResidualConfig()
    tokens: TokensConfig = TokensConfig()
    interpolation: tuple[float, ...] = ()
    """Weights between the start (0) and the best state (1) to try at the end. The smallest one whose dev results are
    not significantly worse than those of the best state is kept, which preserves what the backbone could do before."""
    max_interpolation: float = Field(default=1.0, gt=0, le=1)
    """Upper limit of that weight: a dev set drawn from the training data shows what tuning gains there, but not what it
    loses on other texts."""
    trackers: Literal["auto"] | tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = "auto"
    """Where to log the run besides ``log.jsonl``; ``auto``: to TensorBoard files in the run folder if `tensorboard` is
    installed."""

    @field_validator("pretraining", mode="before")
    @classmethod
    def _as_stages(cls, stages: Any) -> Any:
        return () if stages is None else stages if isinstance(stages, list | tuple) else (stages,)

    @model_validator(mode="after")
    def _check_pretraining(self) -> TrainingConfig:
        if self.pretraining and self.start is not None:
            raise ValueError(
                "pretraining prepares the backbone of a new student, but start names a student whose head fits its "
                "backbone: delete one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_complement(self) -> TrainingConfig:
        if self.complement_words is not None and self.remine:
            raise ValueError(
                "complement_words takes hard negatives that BM25 ranks first, and remine replaces them by those of the "
                "student: delete one of them"
            )
        return self

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher scores more pairs during the training, so that it must be there."""
        return self.in_batch_labels or self.unjudged == "ask_teacher"

    @property
    def interpolates(self) -> bool:
        """Whether the final state may be an interpolation between the start and the best state."""
        return bool(self.interpolation) or self.max_interpolation < 1


class GateConfig(Section):
    """Test before distillation whether the teacher beats the cosine on dev queries of each data set."""

    queries: int = Field(default=200, ge=2)
    """Dev queries of each data set, or all if there are fewer; for labelled pairs, ten times as many."""
    depth: int = Field(default=20, ge=1)
    """Candidates: the first ``depth`` of BM25 and of the cosine."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Significance level of the paired test; the gate opens if the teacher is better at this level."""
    when_closed: Literal["labels", "teacher", "stop"] = "labels"
    """If the gate is closed: learn from the data set's own judgements, learn from the teacher anyway, or stop."""


class ScoreFeaturesConfig(Section):
    """Terms to add to the student's score in an index, if they improve the dev results (``models.score_features``).

    The weights are fitted at the end of a run. The head ``paper`` gets none, because it has no inner product to which
    they could be added.
    """

    bm25: bool = False
    """BM25 of the passage."""
    window_bm25: bool = False
    """BM25 of the passage's best window; a window is two neighbouring sentences."""
    window_vectors: bool = False
    """The highest inner product with a window, each encoded on its own; indexing then encodes long passages two more
    times."""
    maxsim: bool = False
    """The mean, over the query's rarest tokens, of the highest cosine with a token of the passage. The vectors of
    tokens come from the same reading as the passage's own; an index stores 32 bytes for each token."""
    in_training: bool = False
    """Count words and token embeddings in the losses and dev results of training, with weights that are fitted on dev
    before the first step: the vectors and the interaction then learn what words leave unexplained (Gao et al.,
    "Complement Lexical Retrieval Model with Semantic Residual Embeddings", ECIR 2021), and the backbone is trained
    together with the projection of tokens, as in ColBERT. The second stage counts words alone."""

    @property
    def terms(self) -> tuple[ScoreFeature, ...]:
        """The terms that are added."""
        chosen: dict[ScoreFeature, bool] = {
            "bm25": self.bm25,
            "bm25_fraction": self.bm25,
            "window_bm25": self.window_bm25,
            "window_bm25_fraction": self.window_bm25,
            "window_vectors": self.window_vectors,
            "maxsim": self.maxsim,
        }
        return tuple(term for term, is_chosen in chosen.items() if is_chosen)

    @model_validator(mode="after")
    def _check_in_training(self) -> ScoreFeaturesConfig:
        if self.in_training and not (self.bm25 or self.window_bm25 or self.maxsim):
            raise ValueError(
                "in_training counts words and token embeddings in training, but neither bm25, window_bm25 nor "
                "maxsim is true"
            )
        return self


class LanguageModelTuning(WarmUpConfig):
    """What tunings of a teacher and of a writer share."""

    learning_rate: float = Field(default=5e-4, gt=0)
    part_tokens: int | None = Field(default=None, ge=1)
    """Tokens, including padding, in one pass through the model; gradients are accumulated over passes. By default 512
    on a CPU, and 2,048 to 32,768 elsewhere: the more, the smaller the model and the larger the memory."""
    max_queries: int | None = Field(default=None, ge=1)
    """Train on a random sample of this many queries of each data set."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)


class TeacherTuningConfig(LanguageModelTuning):
    """Tuning of the teacher on labelled pairs."""

    loss: Literal["pairs", "lists"] = "pairs"
    """``pairs``: yes/no cross-entropy of each pair. ``lists``: cross-entropy of a softmax over each query's passages,
    plus ``pair_weight`` times the pair loss; usually better for rankings."""
    pair_weight: float = Field(default=0.3, ge=0)
    """With ``lists``, the weight of the pair loss, which keeps the scale of the log-odds. 0: the softmax alone, as in
    RankT5; P(yes) then means nothing."""
    tuning: Literal["lora", "full"] = "lora"
    """``full`` tunes every weight (and needs a much lower learning rate); the tuned teacher is then a complete model.
    """
    lora: LoraConfig = LoraConfig(rank=16, alpha=32)
    quantization: Quantization | None = None
    """Tune adapters on weights that are stored in 8 or 4 bits (QLoRA). By default as ``teacher.quantization``."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass and compute the rest again: less memory for a long
    pair, about a third more time, the same result."""
    epochs: int = Field(default=1, ge=0)
    """0: do not tune the teacher."""
    batch_pairs: int = Field(default=32, ge=1)
    graph_gib: float | None = Field(default=None, gt=0)
    """Memory for the intermediate results of a query's passages that exceed ``part_tokens``, in GiB; by default a third
    of what is free when the run starts. What does not fit is computed twice, with the same result."""
    num_negatives: int = Field(default=4, ge=1)
    """Negatives per positive, drawn from the plan's hard and easy negatives."""
    students: tuple[StudentName, ...] = ()
    """Students, folders or names, the mean of whose scores of the pairs the teacher learns instead of the data sets'
    judgements (Trans-Encoder)."""
    labels: InputPath | None = None
    """A folder of labels that another teacher made, as ``labels`` of a run folder: its P(yes) are the targets of the
    pairs that it has scored, so that what a large language model said about some lists becomes a teacher that scores
    any. Other pairs keep the data sets' judgements."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on held-out queries; the best state is kept. By default there are no evaluations, and
    the last state is kept."""
    patience: int = Field(default=5, ge=1)
    """Stop after this many evaluations without improvement."""
    dev_queries: int = Field(default=100, ge=1)
    """Queries of each data set's plan to hold out for these evaluations, at most a fifth. Their positives are never
    used as positives in training."""
    dev_measure: Literal["cross_entropy", "mrr"] = "cross_entropy"
    """How to choose the best state: by the lowest yes/no cross-entropy of the held-out pairs, or by the highest mean
    reciprocal rank of the first positive in the held-out lists."""

    @model_validator(mode="after")
    def _check_quantization(self) -> TeacherTuningConfig:
        if self.tuning == "full" and self.quantization not in (None, "none"):
            raise ValueError('quantised weights cannot be trained: set tuning = "lora", or quantization = "none"')
        return self

    @model_validator(mode="after")
    def _check_pair_weight(self) -> TeacherTuningConfig:
        if self.loss == "pairs" and self.pair_weight != TeacherTuningConfig.model_fields["pair_weight"].default:
            raise ValueError('pair_weight is that of pairs beside lists: set loss = "lists", or delete pair_weight')
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> TeacherTuningConfig:
        given = [name for name in ("students", "labels") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError("a teacher learns from students or from labels: leave one of them out")
        for name in given:
            if self.epochs == 0:
                raise ValueError(
                    f"a teacher can learn from {name} only if it is tuned: set epochs above 0, or no {name}"
                )
            if self.dev_measure == "mrr":
                raise ValueError(
                    f"dev_measure mrr needs the data sets' judgements, which {name} replaces: set it to cross_entropy"
                )
        return self

    def base_quantization(self, teacher: TeacherConfig) -> Quantization:
        """How the weights are stored that adapters of ``teacher`` are tuned on."""
        if self.quantization is not None:
            return self.quantization
        return teacher.quantization if isinstance(teacher, LocalTeacherConfig) else "none"


class WriterTuningConfig(LanguageModelTuning):
    """Tuning of a local writer on the judged queries of data sets."""

    lora: LoraConfig = LoraConfig(rank=16, alpha=32, dropout=0.0)
    """Without dropout, which takes a tenth of a step on a CPU: in one epoch, no example comes twice."""
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """Fraction of the steps during which the rate rises from 0 to its full value."""
    epochs: int = Field(default=1, ge=1)
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens, including padding, in one step."""
    dev_queries: int = Field(default=100, ge=0)
    """Dev queries of each data set on which the loss is measured before and after training."""
    keywords_fraction: float = Field(default=0.25, ge=0, le=1)
    """Fraction of the English questions to turn into keyword queries, by leaving out function words: data sets have
    hardly any."""
    exclude_shared_passages: bool = True
    """Leave out training queries that share a positive with a dev or test query."""


class ReaderTuningConfig(WarmUpConfig):
    """Tuning of a causal language model that reads passages as vectors (``models.listwise_reader``)."""

    model: str = "smollm2"
    """A causal language model: local folder, Hub name or GGUF file."""
    layers: int | None = Field(default=8, ge=1)
    """Use only this many of its first layers. None: all."""
    lora: LoraConfig = LoraConfig()
    depth: int = Field(default=20, ge=2)
    """Passages of a list: the student's first ones, with ``labels`` of those that have one."""
    steps: int = Field(default=10, ge=1)
    """How many of them are drawn, and no more than there are: nDCG@10 counts ten."""
    alignment: int = Field(default=0, ge=0)
    """Passages from whose vector the model is to repeat the text, before it ranks: the network alone learns it."""
    texts: bool = False
    """Learn the order a second time with the passages' texts beside their vectors, and to rank by the vectors as by
    both: some 30 times as slow. A search never reads texts."""
    lists: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]] = (2_000, 4_000)
    """Lists to read in the two stages: for the network alone, then with LoRA. Queries come again if there are fewer."""
    labels: InputPath | None = None
    """A folder of labels that a teacher made, as ``labels`` of a run folder: a list is what it has labelled of a train
    query, and its order is learnt instead of the judgements'."""
    max_queries: int = Field(default=1_500, ge=1)
    """Train queries of each data set."""
    dev_queries: int = Field(default=300, ge=0)
    """Dev queries of each data set on which the ranking is measured."""
    exclude_shared_passages: bool = True
    """Leave out training queries that share a relevant passage with a dev or test query."""
    batch_lists: int = Field(default=8, ge=1)
    """Lists of one step; passages, where they are repeated."""
    network_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the network alone."""
    lora_rate: float = Field(default=5e-4, gt=0)
    """Learning rate with LoRA, for the network too."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)

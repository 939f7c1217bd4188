"""Recipes: everything that shapes a run, in sections. ``core.recipe_file`` reads them from TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from d2llm.core.types import EvidenceTerm, Task


@dataclass(frozen=True, slots=True)
class RemovedOption:
    """An option that recipes no longer have. Files of earlier versions hold its default, which is ignored."""

    version: str
    """The first version without it."""
    default: Any
    """What it was where a recipe did not set it; ``NO_DEFAULT``: every value is refused."""
    meaning: str
    """What it did."""
    advice: str
    """What to do now."""


NO_DEFAULT = object()


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    removed: ClassVar[Mapping[str, RemovedOption]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_removed_options(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        settings = cast("dict[str, Any]", values)
        for name in cls.removed.keys() & settings.keys():
            option = cls.removed[name]
            if option.default is NO_DEFAULT or settings[name] != option.default:
                raise PydanticCustomError(
                    "removed_option",
                    "{name} was removed in d2llm {version} ({meaning}); {advice}",
                    {"name": name, "version": option.version, "meaning": option.meaning, "advice": option.advice},
                )
        return {name: value for name, value in settings.items() if name not in cls.removed}


class LoraConfig(_Section):
    """Low-rank adapters on every linear layer of a backbone (published defaults: rank 8, alpha 8, dropout 0.05)."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=8.0, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)


_AS_ITS_CARD_SAYS: dict[str, dict[str, Any]] = {
    "e5": {
        "query_prefix": "query: ",
        "passage_prefix": "passage: ",
        "max_query_tokens": 512,
        "max_passage_tokens": 512,
    }
}


class BackboneConfig(_Section):
    """The pretrained language model that reads each text alone.

    ``e5`` was trained with prefixes, and reads 512 tokens: with that model these are the defaults.
    """

    model: str = "minilm"
    """Local folder, Hub name, GGUF file, or ``minilm`` / ``smollm2`` / ``e5`` (multilingual-e5-small)."""
    tuning: Literal["lora", "full", "frozen"] = "lora"
    lora: LoraConfig = LoraConfig()
    layers: int | None = Field(default=None, ge=1)
    """Use only the first layers of the model, this many: cheaper, and for search often no worse. None: all."""
    pooling: Literal["auto", "mean", "last", "first"] = "auto"
    """The backbone's own pooling; ``auto`` reads the model's own setting, else mean for encoders, last for decoders."""
    max_query_tokens: int = Field(default=128, ge=4)
    max_passage_tokens: int = Field(default=250, ge=4)
    query_prefix: str = ""
    passage_prefix: str = ""

    @model_validator(mode="before")
    @classmethod
    def _follow_the_models_card(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        named = cast("dict[str, Any]", values)
        model = named.get("model")
        return _AS_ITS_CARD_SAYS.get(model, {}) | named if isinstance(model, str) else named


class PoolingConfig(_Section):
    """From token states to the text's vector: pooling by multihead attention (PMA), or the backbone's own."""

    method: Literal["pma", "backbone"] = "pma"
    """``backbone``: its own pooling alone (mean, last or first token) and no PMA, as a plain bi-encoder pools."""
    num_seeds: int = Field(default=1, ge=1)
    num_heads: int = Field(default=12, ge=1)
    feedforward_dim: int | None = Field(default=None, ge=1)
    """Width of the feed-forward layer; by default the backbone's width."""
    warm_start: bool = True
    """Start as the backbone's own pooling: y = pool(Y) + gate * PMA(Y), gate 0 at first."""


class InteractionConfig(_Section):
    """Interaction emulation module (IEM), or the cosine in its place."""

    head: Literal["anchored", "paper", "cosine"] = "anchored"
    """``cosine``: a learned scale times the cosine of the vectors, no IEM: the plain bi-encoder."""
    features: Literal["rich", "concat", "product", "difference"] = "rich"
    """What the IEM sees of vectors a and b beside them: nothing (``concat``), a * b, |a - b|, or both (``rich``)."""
    branches: Literal["per_task", "shared"] = "per_task"
    """A branch of the IEM for each task, or one for both."""
    hidden_dim: int = Field(default=512, ge=1)
    feature_dim: int = Field(default=512, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    max_bound: float = Field(default=8.0, gt=0)
    """Upper limit of B, the largest change of the logit that the interaction can make (anchored head)."""
    gates: bool = False
    """Bound the change by B r_q(a) r_p(b) with learned gates in (0, 1), one of the query, one of the passage (anchored
    head): the upper bound stays an inner product, in one more dimension, and fewer passages must be rescored for a
    certified ranking."""


class StudentConfig(_Section):
    """Backbone + PMA + IEM. The defaults are ours; ``paper``, ``concat`` and no warm start are the publication's.

    No option here is taken away, also in the sections below: a student's fingerprint is computed from all of them.
    """

    backbone: BackboneConfig = BackboneConfig()
    pooling: PoolingConfig = PoolingConfig()
    interaction: InteractionConfig = InteractionConfig()


class RemoteConfig(_Section):
    """An OpenAI-compatible endpoint that gives log-probabilities (docs/remote-teacher.md)."""

    url: str = Field(pattern=r"^https?://[^/@?#\s]+(/[^@?#\s]*)?$")
    """Base address, up to ``/v1``. A key has no place in it."""
    api: Literal["completions", "chat"] = "completions"
    """``completions`` sends the prompt unchanged, ``chat`` as a user's message in the model's chat template."""
    revision: str = ""
    """Which weights the endpoint serves, in your own words: part of the labels' identity, together with the model's
    name. Change it when the weights change; an endpoint does not tell."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key."""
    top_logprobs: int = Field(default=20, ge=2)
    """How many tokens' log-probabilities to ask for."""
    unanswered: Literal["error", "undecided"] = "error"
    """What to do with a pair where neither answer word is among them: stop, or count it and take log-odds 0."""
    tokenizer: str | None = None
    """Folder or Hub name of the model's tokenizer, which then counts ``max_tokens``."""
    characters_per_token: float = Field(default=3.0, gt=0)
    """Without a tokenizer, ``max_tokens`` times this is the limit in characters."""
    concurrency: int = Field(default=16, ge=1)
    """Requests under way at once."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Of one request."""
    patience_minutes: float = Field(default=10.0, ge=0)
    """How long a request is tried again while the endpoint is overloaded or away."""


class TeacherConfig(_Section):
    """The LLM that reads query and passage together."""

    model: str = "smollm2"
    """Local folder (a tuned teacher too), Hub name, GGUF file, or ``smollm2``; of a remote one its name there."""
    kind: Literal["auto", "causal", "seq2seq", "classifier", "remote", "cosine", "stack"] = "auto"
    """``auto``: what the folder says it is. ``seq2seq`` asks as MonoT5 does, ``classifier`` is a cross-encoder with a
    score of its own, ``remote`` an OpenAI-compatible endpoint, ``cosine`` a bi-encoder or a student, ``stack``
    several of these."""
    prompt: str = "paper"
    """Name of a prompt set shipped with d2llm, or the path of a TOML file (see ``models.teachers.prompts``)."""
    max_tokens: int = Field(default=350, ge=32)
    """Length of the whole input; what is over is cut from the end of the passage."""
    positive_label: str | None = None
    """Of a classifier with several classes: the one that means yes, as its config.json calls it (``entailment``)."""
    new_head: bool = False
    """Of kind ``classifier``: give an encoder without one a head with one output. It says nothing until it is tuned,
    with every weight (``teacher_tuning.tuning = "full"``)."""
    stack_with_cosine: bool = False
    """Learn from this teacher stacked with the tuned cosine of the run, calibrated on dev."""
    remote: RemoteConfig | None = None

    def named(self, text: str) -> TeacherConfig:
        """The teacher that ``KIND:MODEL`` or ``MODEL`` names, asked as this one is."""
        kind, colon, model = text.partition(":")
        if colon and model and kind in get_args(TeacherConfig.model_fields["kind"].annotation):
            return self.model_copy(update={"model": model, "kind": kind})
        return self.model_copy(update={"model": text, "kind": "auto"})


class TeacherTuningConfig(_Section):
    """Tuning of the teacher on labelled pairs."""

    loss: Literal["pairs", "lists"] = "pairs"
    """``pairs``: yes/no cross-entropy of each. ``lists``: a softmax over each query's passages, and 0.3 of the former,
    which keeps the scale of the log-odds: for rankings usually the better of the two."""
    tuning: Literal["lora", "full"] = "lora"
    """``full`` changes every weight (and wants a far lower learning rate); the tuned teacher is then a whole model."""
    lora: LoraConfig = LoraConfig(rank=16, alpha=32)
    learning_rate: float = Field(default=5e-4, gt=0)
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    epochs: int = Field(default=1, ge=0)
    """0: the teacher is not tuned."""
    batch_pairs: int = Field(default=32, ge=1)
    part_tokens: int | None = Field(default=None, ge=1)
    """Tokens, padding included, that go through the model at a time; their gradients are added up. By default 512 on a
    CPU and 2,048 elsewhere."""
    num_negatives: int = Field(default=4, ge=1)
    """Negatives per positive, drawn from the plan's hard and easy negatives."""
    max_queries: int | None = Field(default=None, ge=1)
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations on held-out queries, the best of which is kept. By default there are none, and the last
    state is kept."""
    patience: int = Field(default=5, ge=1)
    """Stop after this many evaluations without a better one."""
    dev_queries: int = Field(default=100, ge=1)
    """Queries of each data set's plan that are held out for this, at most a fifth. Their positives are never trained on
    as positives."""
    dev_measure: Literal["cross_entropy", "mrr"] = "cross_entropy"
    """Which state is best: the one with the lowest yes/no cross-entropy of the held-out pairs, or with the highest mean
    reciprocal rank of the first positive in the held-out lists."""


class DataConfig(_Section):
    """One data set of a recipe: a retrieval set in BEIR layout, or a set of labelled pairs."""

    path: str
    """Where it is; the last part is its name. ``--data`` says where it is on another machine."""
    about: str = ""
    """What it holds, its licence and where to get it, for those who do not have it."""
    task: Task = "asymmetric"
    max_queries: int | None = Field(default=None, ge=1)
    """Train on a random sample of this many queries."""
    max_labelled: int | None = Field(default=None, ge=1)
    """Let the teacher label a random sample of this many of them; ``training.unlabelled`` says what becomes of the
    others. For a teacher that is slow compared with the student."""
    exclude_shared_passages: bool = True
    """Leave out training queries that share a positive with a dev or test query, so that dev and test passages have
    never been positives. Where all splits share one small corpus (intents, FAQ), nothing would be left: set it false,
    and know that dev and test then measure unseen queries only, not unseen passages."""


class MiningConfig(_Section):
    """Negatives of the training plan. The names are those of sentence-transformers' ``mine_hard_negatives``."""

    removed = {
        "skip_top": RemovedOption("0.1.0", NO_DEFAULT, "the former name of range_min", "set range_min"),
        "depth": RemovedOption("0.1.0", NO_DEFAULT, "the former name of range_max", "set range_max"),
        "bm25_range": RemovedOption(
            "0.1.0", None, "the range of ranks of BM25 alone", "set range_min and range_max, which hold for both lists"
        ),
        "encoder_range": RemovedOption(
            "0.1.0",
            None,
            "the range of ranks of the encoder alone",
            "set range_min and range_max, which hold for both lists",
        ),
        "teacher_labels": RemovedOption(
            "0.1.0",
            "judge",
            "whether the teacher judges candidates that have no label yet",
            "leave it out: with a teacher_margin the teacher judges them",
        ),
        "audit_examples": RemovedOption(
            "0.1.0", 20, "the number of queries that the audit shows", "leave it out: the audit shows 20"
        ),
    }

    num_hard: int = Field(default=8, ge=0)
    num_easy: int = Field(default=4, ge=0)
    sources: tuple[Literal["bm25", "encoder"], ...] = ("bm25", "encoder")
    """Whose rankings give the candidates of hard negatives: their union, without the positives."""
    student: str | None = None
    """The encoder: a trained student's folder or name, ranking by its full score. By default the recipe's backbone
    before training, ranking by its cosine."""
    range_min: int = Field(default=0, ge=0)
    """Leave out this many from the top of each list, positives not counted: the most likely false negatives."""
    range_max: int = Field(default=50, ge=1)
    """How many passages of each list are candidates."""
    sampling: Literal["uniform", "top", "rank_weighted"] = "uniform"
    """How to draw from the range: with equal chances, the best ranks first, or with a chance of 1 / rank (the better of
    two lists)."""
    near_duplicate: float = Field(default=0.9, gt=0, le=1)
    """A candidate whose text is more similar to a positive's than this (Jaccard similarity of character trigrams) is no
    negative; 1 drops identical texts alone."""
    relative_margin: float | None = Field(default=None, ge=0)
    """A candidate is no negative if the encoder's score of it is above that of the positives (their mean) less this
    share of it; 0.05 is a usual value."""
    teacher_margin: float | None = None
    """A candidate is no negative if the teacher's log-odds of it are above those of the positives (their mean) less
    this. Costs a teacher pass per candidate, kept in the label store. A run that tunes the teacher mines without this
    first, and with it and the tuned teacher afterwards."""

    @model_validator(mode="after")
    def _check_ranges(self) -> MiningConfig:
        if not self.sources:
            raise ValueError("sources is empty; name bm25, encoder or both")
        if self.range_min >= self.range_max:
            raise ValueError(f"range_min is {self.range_min}, but must be below range_max, which is {self.range_max}")
        return self


class WarmUpConfig(_Section):
    """How the learning rate rises at the start of a run; afterwards it falls linearly to 0."""

    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the rate rises from 0 to its value."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """A number of steps in place of the share."""

    def warmup_of(self, total_steps: int) -> int:
        """Steps of the warm-up in a run of ``total_steps``."""
        return round(self.warmup_fraction * total_steps) if self.warmup_steps is None else self.warmup_steps


class LossWeights(_Section):
    """Weights of the loss terms (published: 1 / 1 / 0.01 / 0.001 with a separate in-batch cross-entropy)."""

    removed = {
        "list_temperature": RemovedOption(
            "0.1.0", 1.0, "a divisor of the teacher's log-odds in the list imitation", "leave it out: it is 1"
        )
    }

    contrastive_imitation: float = Field(default=1.0, ge=0)
    list_imitation: float = Field(default=0.0, ge=0)
    """Not among the published losses: the distribution over all candidates of the batch, like the teacher's."""
    rank_imitation_positive_hard: float = Field(default=1.0, ge=0)
    rank_imitation_hard_easy: float = Field(default=0.01, ge=0)
    feature_imitation: float = Field(default=0.001, ge=0)
    """Of heads with an IEM; the cosine has no features of a pair."""
    in_batch_cross_entropy: float = Field(default=1.0, ge=0)
    anchor_cross_entropy: float = Field(default=1.0, ge=0)
    """In-batch cross-entropy of the inner-product part alone (anchored head): keeps the vectors good by themselves."""
    pair_cross_entropy: float = Field(default=1.0, ge=0)
    """Of labelled pairs, each judged alone: is the answer yes? None of the losses above is computed of them."""
    anchor_pair_cross_entropy: float = Field(default=0.5, ge=0)
    """The same of the inner-product part alone (anchored head)."""
    teacher_share: float = Field(default=0.5, ge=0, le=1)
    """Of the target of a labelled pair: how much is the teacher's P(yes), the rest the data set's own label."""
    temperature: float = Field(default=1.0, gt=0)
    """t of the contrastive imitation; the anchored head has a learned scale of its own besides."""

    @property
    def imitates(self) -> bool:
        """Whether any loss asks for a teacher; without, a student is trained on the data sets' own judgements."""
        return any(getattr(self, name) > 0 for name in type(self).model_fields if "imitation" in name)


class ResidualConfig(WarmUpConfig):
    """The second stage: the interaction alone, on vectors that are read once (anchored head)."""

    removed = {
        "bound_price": RemovedOption(
            "0.1.0",
            0.0,
            "a price on the bound B in the loss",
            "leave it out, and set student.interaction.max_bound for a smaller bound",
        )
    }

    epochs: int = Field(default=0, ge=0)
    """0: one stage, interaction and vectors together. Otherwise the first stage trains the vectors alone."""
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_queries: int = Field(default=32, ge=1)
    depth: int = Field(default=200, ge=1)
    """Neighbours are drawn from this many passages of the plan with the largest inner products."""
    num_near: int = Field(default=30, ge=0)
    """Neighbours of a query in one step, besides the plan's negatives."""
    num_random: int = Field(default=20, ge=0)
    quiet_price: float = Field(default=0.0, ge=0)
    """Added to the loss for each unit of squared change that one task's interaction makes to rankings of the other
    task's texts: an interaction should leave alone what it was not taught."""


class TrainingConfig(WarmUpConfig):
    """How ``distill`` optimises."""

    removed = {
        "group_by_length": RemovedOption(
            "0.1.0",
            False,
            "batches of queries whose texts are of like length",
            "leave it out: a batch is read in parts of like length anyway (part_tokens)",
        ),
        "graph_tokens": RemovedOption(
            "0.1.0", NO_DEFAULT, "memory for intermediate results, in tokens", "set graph_gib, in GiB"
        ),
    }

    learning_rate: float = Field(default=1e-3, gt=0)
    """Of adapters on a small model; large models want a third of it, all weights (``tuning = "full"``) a thirtieth."""
    head_learning_rate: float = Field(default=2e-4, gt=0)
    """Rate of PMA and IEM. Ten times as much saturates the interaction within a hundred steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    epochs: int | None = Field(default=None, ge=1)
    """By default as many as make 60 steps, from 2 to 10."""
    batch_queries: int = Field(default=16, ge=1)
    num_hard: int = Field(default=4, ge=0)
    """Hard negatives of a query seen in one step, drawn anew each epoch from the plan's."""
    num_easy: int = Field(default=1, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    unlabelled: Literal["leave_out", "own_labels"] = "leave_out"
    """Queries of the plan that the teacher has not labelled: left out, or trained on the data set's own judgements."""
    unjudged: Literal["negatives", "leave_out", "ask_teacher"] = "negatives"
    """Passages that training itself finds near a query (neighbours in the second stage, negatives mined anew) and that
    the teacher has not judged: taken for irrelevant, left out, or judged by the teacher first, which takes time and is
    kept with the other labels. Queries that learn from the data set's own judgements take them for irrelevant."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between dev evaluations; by default a fifth of the run's steps, at most 200."""
    patience: int = Field(default=5, ge=1)
    """Stop after this many dev evaluations without a better one."""
    dev_queries: int = Field(default=200, ge=1)
    dev_passages: int = Field(default=1000, ge=1)
    """Dev corpus: the dev positives, their mined negatives, and random passages up to this number."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Most steps between checkpoints."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    """Most minutes between checkpoints. One is also kept when the run is stopped by Ctrl-C or SIGTERM."""
    sampling_temperature: float = Field(default=1.0, ge=1)
    """T: a data set of n queries has a share of n^(1/T) in the batches. 1: in proportion; more: small sets come more
    often, large ones less, at the same number of batches."""
    part_tokens: int | None = Field(default=None, ge=1)
    """Tokens, padding included, that go through the backbone at a time; by default 512 on a CPU, where more at a time
    are no faster, and 2,048 elsewhere."""
    gradient_caching: Literal["auto", "on", "off"] = "auto"
    """Read the texts of a batch twice, part by part, so that memory holds the intermediate results of one part at a
    time; the gradient is the same. ``auto``: those of the parts that ``graph_gib`` has no room for."""
    graph_gib: float | None = Field(default=None, gt=0)
    """Memory for the intermediate results that ``auto`` keeps, in GiB; by default a third of what is free when the run
    starts. It changes speed, and nothing else."""
    remine: bool = False
    """From the second epoch on, draw the hard negatives anew at its start, from the student's own ranking."""
    residual: ResidualConfig = ResidualConfig()
    interpolation: tuple[float, ...] = ()
    """Shares (0 to 1) of the way from the start to the best state that are tried at the end: the smallest one is kept
    whose dev results are not significantly worse than the whole way's. Keeps what the backbone could do before."""
    largest_share: float = Field(default=1.0, gt=0, le=1)
    """No more of the way than this is kept: a dev set of the training's own data sees what tuning gains there, and not
    what it loses on other texts."""
    trackers: Literal["auto"] | tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = "auto"
    """Where the run's log goes besides ``log.jsonl``; ``auto``: to TensorBoard files in the run folder where
    `tensorboard` is installed."""

    @property
    def steps_back(self) -> bool:
        """Whether, at the end, only a share of the change may be kept."""
        return bool(self.interpolation) or self.largest_share < 1


class GateConfig(_Section):
    """Whether the teacher may teach: tried against the cosine on dev queries of each data set."""

    queries: int = Field(default=200, ge=2)
    """Dev queries of each data set, or all where there are fewer; ten times as many labelled pairs."""
    depth: int = Field(default=20, ge=1)
    """Candidates: the first ``depth`` of BM25 and of the cosine."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """The gate opens where the teacher is better at this level of the paired test."""
    when_closed: Literal["labels", "teacher", "stop"] = "labels"
    """Learn from the data set's own judgements instead, from the teacher all the same, or not at all."""


class EvidenceConfig(_Section):
    """What is added to the student's score in an index, if dev says that it is worth it (``models.evidence``).

    The weights are fitted at the end. The head ``paper`` gets none: it has no inner product to be added to.
    """

    words: bool = False
    """BM25 of the passage."""
    window_words: bool = False
    """BM25 of its best window: of each two neighbouring sentences."""
    window_vectors: bool = False
    """The highest inner product with a window, each read alone: an index then reads long passages two times more."""

    @property
    def terms(self) -> tuple[EvidenceTerm, ...]:
        """The parts of the sum."""
        chosen: dict[EvidenceTerm, bool] = {
            "words": self.words,
            "words_share": self.words,
            "window_words": self.window_words,
            "window_words_share": self.window_words,
            "window_vectors": self.window_vectors,
        }
        return tuple(term for term, is_chosen in chosen.items() if is_chosen)


class Recipe(_Section):
    """One run end to end."""

    name: str = "unnamed"
    seed: int = 0
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    teacher_tuning: TeacherTuningConfig = TeacherTuningConfig()
    data: tuple[DataConfig, ...] = ()
    mining: MiningConfig = MiningConfig()
    gate: GateConfig = GateConfig()
    losses: LossWeights = LossWeights()
    training: TrainingConfig = TrainingConfig()
    evidence: EvidenceConfig = EvidenceConfig()

    @property
    def filters_with_tuned_teacher(self) -> bool:
        """Whether a run mines twice: without the teacher's margin, and with it when the teacher is tuned."""
        return self.mining.teacher_margin is not None and self.losses.imitates and self.teacher_tuning.epochs > 0

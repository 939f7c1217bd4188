"""Recipes: everything that shapes a run, in sections. ``core.recipe_file`` reads them from TOML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from d2llm.core.losses import Objective
from d2llm.core.types import TASKS, EvidenceTerm, NumberFormat, Task


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class LoraConfig(_Section):
    """Low-rank adapters on every linear layer of a backbone (published defaults: rank 8, alpha 8, dropout 0.05)."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=8.0, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class EndpointConfig(_Section):
    """An OpenAI-compatible endpoint: its address and key, and how fast and how patiently requests are sent."""

    url: str = Field(pattern=r"^https?://[^/@?#\s]+(/[^@?#\s]*)?$")
    """Base address, up to ``/v1``. It must not contain a key."""
    revision: str = ""
    """A name of your choice for the weights that the endpoint serves; together with the model's name it identifies
    what they produce. Change it when the weights change, because an endpoint does not report that."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key."""
    tokenizer: str | None = None
    """Folder or Hub name of the model's tokenizer, used to count tokens."""
    characters_per_token: float = Field(default=3.0, gt=0)
    """Without a tokenizer, a limit in tokens times this is the limit in characters."""
    concurrency: int = Field(default=16, ge=1)
    """Maximum number of concurrent requests."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Time limit of one request."""
    patience_minutes: float = Field(default=10.0, ge=0)
    """How long to retry a request while the endpoint is overloaded or unreachable."""


class RemoteBackboneConfig(EndpointConfig):
    """The endpoint of a remote backbone, which gives vectors of texts (docs/remote-backbone.md)."""

    dimensions: int = Field(ge=1)
    """Width of the vectors; an answer of another width is an error."""
    shorten: bool = False
    """Send ``dimensions`` with every request, so that a model that was trained for it shortens its vectors."""
    batch_texts: int = Field(default=32, ge=1)
    """Texts in one request."""
    query_body: dict[str, Any] = {}
    """More fields for requests with queries, such as ``{ input_type = "query" }``."""
    passage_body: dict[str, Any] = {}
    """The same for requests with passages."""


_REACHING = frozenset(
    {"url", "api_key_env", "batch_texts", "concurrency", "requests_per_minute", "timeout_seconds", "patience_minutes"}
)
"""Settings of a remote backbone that say how its endpoint is reached; vectors do not depend on them."""


_MODEL_CARD_DEFAULTS: dict[str, dict[str, Any]] = {
    "e5": {
        "query_prefix": "query: ",
        "passage_prefix": "passage: ",
        "max_query_tokens": 512,
        "max_passage_tokens": 512,
    }
}


class BackboneConfig(_Section):
    """The pretrained language model that encodes each text on its own.

    The model ``e5`` was trained with prefixes and reads 512 tokens, so these are the defaults for it.
    """

    model: str = "minilm"
    """Local folder, Hub name, GGUF file, or ``minilm`` / ``smollm2`` / ``e5`` (multilingual-e5-small); with the section
    ``remote``, the model's name at the endpoint."""
    tuning: Literal["lora", "full", "frozen"] = "lora"
    """With ``remote``, always ``frozen``."""
    lora: LoraConfig = LoraConfig()
    adapters: Literal["one", "two"] = "one"
    """``two``: queries and passages are read with LoRA adapters of their own, by one backbone (Semi-Siamese)."""
    layers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Use only this many of the model's first layers, or the layers of these numbers, counted from 0
    (``models.layer_choice`` chooses them): cheaper, and often no worse for search. None: all."""
    pooling: Literal["auto", "mean", "weighted_mean", "ditto", "last", "first"] = "auto"
    """The backbone's own pooling; ``auto``: the model's own setting, else mean for encoders and last for decoders.
    Later tokens count more in the weighted mean (SGPT). ``ditto``: tokens count as much as they attend to themselves in
    ``diagonal_head`` (``models.diagonal_attention``)."""
    diagonal_head: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    """For the pooling ``ditto``: layer and head, counted from 0."""
    bidirectional: bool = False
    """Every token of a decoder attends to all tokens of its text, as in an encoder, and ``auto`` pools by the mean
    (LLM2Vec). A decoder has to learn that: ``training.pretraining.objective = "masked_next_token"``."""
    max_query_tokens: int = Field(default=128, ge=4)
    max_passage_tokens: int = Field(default=250, ge=4)
    query_prefix: str = ""
    passage_prefix: str = ""
    remote: RemoteBackboneConfig | None = None
    """The vectors come from an embedding API."""

    @model_validator(mode="after")
    def _check_remote(self) -> BackboneConfig:
        if self.remote is None:
            return self
        if self.tuning != "frozen":
            raise ValueError(
                f'tuning is "{self.tuning}", but the weights of a remote backbone are elsewhere and cannot be trained: '
                'set tuning = "frozen", or delete the section remote'
            )
        local = ("layers", "pooling", "diagonal_head", "bidirectional")
        chosen = [name for name in local if getattr(self, name) != type(self).model_fields[name].default]
        if chosen:
            raise ValueError(
                f"{' and '.join(chosen)} cannot be set for a remote backbone, which gives one finished vector for each "
                "text: delete it, or the section remote"
            )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> BackboneConfig:
        if self.adapters == "two" and self.tuning != "lora":
            raise ValueError(
                f'adapters is "two", but tuning is "{self.tuning}", which has no adapters: set tuning = "lora", or '
                "delete adapters"
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> BackboneConfig:
        if isinstance(self.layers, tuple) and (not self.layers or sorted({*self.layers}) != [*self.layers]):
            raise ValueError(f"layers is {[*self.layers]}, but must name each layer to keep once, in ascending order")
        return self

    @model_validator(mode="after")
    def _check_diagonal_head(self) -> BackboneConfig:
        if self.pooling == "ditto" and self.diagonal_head is None:
            raise ValueError(
                "pooling is ditto, but diagonal_head does not say whose attention counts: name a layer and a head, "
                "counted from 0, such as [0, 9] for BERT-base"
            )
        if self.pooling != "ditto" and self.diagonal_head is not None:
            raise ValueError(f'diagonal_head is for the pooling "ditto", not "{self.pooling}"; delete it')
        return self

    @model_validator(mode="before")
    @classmethod
    def _apply_model_card(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        settings = cast("dict[str, Any]", values)
        if settings.get("remote") is not None:
            return {"tuning": "frozen"} | settings
        model = settings.get("model")
        return _MODEL_CARD_DEFAULTS.get(model, {}) | settings if isinstance(model, str) else settings


class PoolingConfig(_Section):
    """How token states become the text's vector: pooling by multihead attention (PMA), or the backbone's own."""

    method: Literal["pma", "backbone"] = "pma"
    """``backbone``: only the backbone's own pooling (mean, last or first token), without PMA, as in a plain
    bi-encoder."""
    num_seeds: int = Field(default=1, ge=1)
    num_heads: int = Field(default=12, ge=1)
    feedforward_dim: int | None = Field(default=None, ge=1)
    """Width of the feed-forward layer; by default the backbone's width."""
    warm_start: bool = True
    """Start as the backbone's own pooling: y = pool(Y) + gate * PMA(Y), where the gate starts at 0."""
    whitening: bool = False
    """Give the backbone's own pooling mean 0 and covariance 1 on passages of the data sets, before the first step
    (``ops.whitening``)."""
    projection_dim: int | None = Field(default=None, ge=1)
    """Width of the text's vector, smaller than the backbone's: a linear map that starts as the principal components of
    passages and is trained with the student (``ops.whitening.principal_components``)."""

    @property
    def uses_own(self) -> bool:
        """Whether the backbone's own pooling is used."""
        return self.method == "backbone" or self.warm_start

    @model_validator(mode="after")
    def _check_whitening(self) -> PoolingConfig:
        if self.whitening and not self.uses_own:
            raise ValueError(
                "whitening changes the backbone's own pooling, which PMA without warm start does not use: set "
                "warm_start = true, or delete whitening"
            )
        if self.whitening and self.projection_dim is not None:
            raise ValueError(
                "projection_dim keeps the directions in which passages differ most, and after whitening they differ "
                "as much in all: delete whitening, or projection_dim"
            )
        return self


class InteractionConfig(_Section):
    """Interaction emulation module (IEM), or a cosine instead of it."""

    head: Literal["anchored", "paper", "cosine"] = "anchored"
    """``cosine``: a learned scale times the cosine of the vectors, without an IEM, as in a plain bi-encoder."""
    features: Literal["rich", "concat", "product", "difference"] = "rich"
    """Inputs of the IEM besides the vectors a and b: none (``concat``), a * b, |a - b|, or both (``rich``)."""
    tasks: tuple[Task, ...] = TASKS
    """The tasks whose score has an interaction (anchored head); in the others the score is the inner product alone."""
    branches: Literal["per_task", "shared"] = "per_task"
    """One branch of the IEM per task, or one shared by both."""
    layers: Literal[3, 5] = 5
    """Linear layers from vectors to logit. 5: two that both branches share, two of the branch, the logit; the features
    are the branch's last layer. 3, as in the authors' code: one shared, one of the branch, the logit; the features
    follow the branch's ReLU."""
    hidden_dim: int = Field(default=512, ge=1)
    feature_dim: int = Field(default=512, ge=1)
    """Width of the features; with three layers it is ``hidden_dim``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    max_bound: float = Field(default=8.0, gt=0)
    """Upper limit of B, the largest amount by which the interaction can change the logit (anchored head)."""
    gates: bool = False
    """Bound the change by B r_q(a) r_p(b) with learned gates in (0, 1), one for the query and one for the passage
    (anchored head). The upper bound is still an inner product, in one more dimension, and fewer passages must be
    rescored for a certified ranking."""

    @field_validator("tasks")
    @classmethod
    def _in_order(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        return tuple(task for task in TASKS if task in tasks)

    @model_validator(mode="after")
    def _check_tasks(self) -> InteractionConfig:
        if self.head == "paper" and self.tasks != TASKS:
            raise ValueError(
                "the head 'paper' scores by its interaction alone, in every task: delete tasks, or set head to "
                "'anchored'"
            )
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> InteractionConfig:
        if self.layers == 3 and self.feature_dim != self.hidden_dim:
            raise ValueError(
                f"feature_dim is {self.feature_dim} and hidden_dim {self.hidden_dim}: with three layers both are the "
                "same, so set feature_dim to hidden_dim"
            )
        return self


class StudentConfig(_Section):
    """Backbone + PMA + IEM. The defaults are ours; the paper uses ``paper``, ``concat`` and no warm start."""

    backbone: BackboneConfig = BackboneConfig()
    pooling: PoolingConfig = PoolingConfig()
    interaction: InteractionConfig = InteractionConfig()

    @model_validator(mode="before")
    @classmethod
    def _pool_remote_vectors(cls, values: Any) -> Any:
        """By default, the vectors of a remote backbone are used as they are."""
        if not isinstance(values, dict):
            return values
        sections = cast("dict[str, Any]", values)
        backbone, pooling = sections.get("backbone"), sections.get("pooling", {})
        remote = backbone.get("remote") if isinstance(backbone, dict) else getattr(backbone, "remote", None)
        if remote is None or not isinstance(pooling, dict):
            return sections
        return {**sections, "pooling": {"method": "backbone"} | pooling}

    @model_validator(mode="after")
    def _check_remote(self) -> StudentConfig:
        if self.backbone.remote is not None and self.pooling.method == "pma":
            raise ValueError(
                "pooling.method is pma, which pools tokens, but a remote backbone gives one vector for each text: set "
                'pooling.method = "backbone"'
            )
        return self

    @model_validator(mode="after")
    def _check_ditto(self) -> StudentConfig:
        if self.backbone.pooling == "ditto" and self.pooling.method == "pma":
            raise ValueError(
                "backbone.pooling is ditto, which weighs the tokens, and PMA would read the weighted tokens: set "
                'pooling.method = "backbone", or another backbone.pooling'
            )
        return self


def shaping_student_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a student, as plain JSON, on which its vectors and scores depend.

    Those of a remote backbone's address, key and pace are left out.
    """
    backbone = {name: value for name, value in config["backbone"].items() if name != "remote"}
    if (remote := config["backbone"].get("remote")) is not None:
        backbone["remote"] = {name: value for name, value in remote.items() if name not in _REACHING}
    return {**config, "backbone": backbone}


def untuned_config(config: StudentConfig) -> StudentConfig:
    """A baseline: a student's backbone before training, with the pooling it was pretrained with."""
    return StudentConfig(
        backbone=config.backbone.model_copy(update={"tuning": "frozen", "adapters": "one", "bidirectional": False}),
        pooling=PoolingConfig(method="backbone"),
        interaction=InteractionConfig(head="cosine"),
    )


class CompletionConfig(EndpointConfig):
    """An endpoint whose model continues a prompt, and what its tokens cost."""

    api: Literal["completions", "chat"] = "completions"
    """``completions`` sends the prompt unchanged, ``chat`` as a user message in the model's chat template."""
    extra_body: dict[str, Any] = {}
    """More fields for every request, such as ``{"max_completion_tokens": 400}``."""
    leave_out: tuple[Literal["max_tokens", "temperature", "top_p", "seed"], ...] = ()
    """Fields that the endpoint refuses, and that are therefore not sent."""
    price_per_million_prompt_tokens: float | None = Field(default=None, ge=0)
    """In any currency."""
    price_per_million_written_tokens: float | None = Field(default=None, ge=0)

    def body(self, **settings: Any) -> dict[str, Any]:
        """The fields of a request besides model and prompt: ``settings`` without ``leave_out``, with ``extra_body``."""
        return {name: value for name, value in settings.items() if name not in self.leave_out} | self.extra_body

    def cost(self, num_prompt_tokens: int, num_written_tokens: int) -> float | None:
        """The price of so many tokens, in the currency of the prices; None unless both prices are set."""
        if self.price_per_million_prompt_tokens is None or self.price_per_million_written_tokens is None:
            return None
        prompt = num_prompt_tokens * self.price_per_million_prompt_tokens
        return (prompt + num_written_tokens * self.price_per_million_written_tokens) / 1e6


class RemoteConfig(CompletionConfig):
    """The endpoint of a remote teacher (docs/remote-teacher.md).

    For the kinds ``graded`` and ``listwise``, ``api`` is ``chat`` and ``timeout_seconds`` 300 by default.
    """

    top_logprobs: int = Field(default=20, ge=2)
    """Kind ``remote``: how many tokens' log-probabilities to request."""
    unanswered: Literal["error", "undecided"] = "error"
    """What to do with a pair that the model does not judge, after all attempts: stop, or count it as log-odds 0."""


class ListsConfig(_Section):
    """How the kinds ``graded`` and ``listwise`` ask about the passages of a query (docs/remote-teacher.md)."""

    size: int = Field(default=20, ge=1, le=100)
    """The most passages in one request. A longer list is graded in parts, and ranked in windows of this size."""
    step: int = Field(default=10, ge=1)
    """Kind ``listwise``: how far a window moves towards the top of the list."""
    orders: int = Field(default=1, ge=1)
    """In how many random orders the passages of a query are shown; their grades are averaged, their rankings joined."""
    seed: int = 0
    """Of the random orders."""
    max_passage_tokens: int = Field(default=400, ge=16)
    """Maximum length of a passage; its end is cut off to fit."""
    max_answer_tokens: int = Field(default=4000, ge=16)
    """Maximum length of an answer, with what a reasoning model thinks before it."""
    attempts: int = Field(default=3, ge=1)
    """How often passages are shown that an answer left out."""


class RecordedConfig(_Section):
    """Recorded grades, which a graded teacher repeats instead of asking its endpoint (docs/remote-teacher.md)."""

    lists: str
    """A file of graded lists, or a folder with one for each data set, NAME.jsonl."""
    data: tuple[str, ...] = ()
    """Folders of the data sets that the lists' ids are of. In a recipe, its own data sets by default."""
    unlisted: float | None = Field(default=None, ge=0, le=100)
    """The grade of a passage that the list of its query does not have. By default, the pair is undecided."""


class VllmConfig(_Section):
    """How vLLM's offline engine loads and runs a teacher (docs/how-to/large-teachers.md)."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Over how many GPUs of this machine to split each layer."""
    quantization: str | None = None
    """A method by which vLLM quantises the weights while it loads them, such as ``fp8`` or ``bitsandbytes``. A model
    that was stored quantised needs no setting."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of each GPU's memory for weights and cache."""
    enforce_eager: bool = False
    """Do not capture CUDA graphs: starts faster, judges a little more slowly."""


Quantization = Literal["none", "8bit", "4bit"]
"""How the weights of a model's linear layers are stored: as they are, or in fewer bits by bitsandbytes."""
_LOCAL_SETTINGS = ("dtype", "device_map", "quantization")
LIST_KINDS = frozenset({"graded", "listwise"})
"""Kinds of teacher that read several passages of a query at once and answer in words, without log-probabilities."""
REMOTE_KINDS = LIST_KINDS | {"remote"}
"""Kinds of teacher behind an endpoint."""


class TeacherConfig(_Section):
    """The LLM that reads query and passage together."""

    model: str = "smollm2"
    """Local folder (also of a tuned teacher), Hub name, GGUF file, or ``smollm2``; for a remote teacher, the model's
    name at the endpoint."""
    kind: Literal[
        "auto", "causal", "seq2seq", "classifier", "vllm", "remote", "graded", "listwise", "cosine", "stack"
    ] = "auto"
    """``auto``: detected from the folder. ``seq2seq`` is prompted as MonoT5 is, ``classifier`` is a cross-encoder with
    its own score, ``vllm`` a causal model that vLLM runs in this process, ``remote`` an OpenAI-compatible endpoint that
    returns log-probabilities, ``graded`` and ``listwise`` one that need not: it grades, or ranks, the passages of a
    query. ``cosine`` is a bi-encoder or a student, ``stack`` several of these."""
    prompt: str = "paper"
    """Name of a prompt set shipped with d2llm, or the path of a TOML file (see ``models.teachers.prompts``). For the
    kinds ``graded`` and ``listwise``, ``standard`` by default."""
    max_tokens: int = Field(default=350, ge=32)
    """Maximum length of the whole input; the end of the passage is cut off to fit. Not for the kinds ``graded`` and
    ``listwise``, which have ``lists.max_passage_tokens``."""
    positive_label: str | None = None
    """For a classifier with several classes: the class that means yes, as named in its config.json (``entailment``)."""
    new_head: bool = False
    """For kind ``classifier``: add a head with one output to an encoder that has none. Its scores mean nothing until it
    is tuned with every weight (``teacher_tuning.tuning = "full"``)."""
    stack_with_cosine: bool = False
    """Learn from a stack of this teacher and the run's tuned cosine, calibrated on dev."""
    dtype: NumberFormat | None = None
    """Number format of its weights and of its computations, unless ``--dtype`` names another; by default the fastest on
    the device."""
    device_map: Literal["auto"] | None = None
    """``auto``: spread its layers over all GPUs that this process sees. By default it is on one device."""
    quantization: Quantization = "none"
    """Store the weights of its linear layers in 8 bits (LLM.int8) or 4 bits (NF4), by bitsandbytes. Its log-odds differ
    from those of the full weights, so it is another teacher, with labels of its own."""
    vllm: VllmConfig | None = None
    remote: RemoteConfig | None = None
    lists: ListsConfig | None = None
    recorded: RecordedConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _set_defaults_of_lists(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("kind") not in LIST_KINDS:
            return cast("Any", values)
        own: dict[str, Any] = {"prompt": "standard", "lists": {}, **cast("Mapping[str, Any]", values)}
        remote: Any = own.get("remote")
        if isinstance(remote, Mapping):
            own["remote"] = {"api": "chat", "timeout_seconds": 300.0, **cast("Mapping[str, Any]", remote)}
        return own

    @model_validator(mode="after")
    def _check_lists(self) -> TeacherConfig:
        if self.recorded is not None and self.kind != "graded":
            raise ValueError(f'the section recorded has grades: it needs kind = "graded", not "{self.kind}"')
        if self.kind not in LIST_KINDS:
            if self.lists is not None:
                raise ValueError(
                    f'the section lists needs kind = "graded" or "listwise", not "{self.kind}"; set the kind or delete '
                    "the section"
                )
            return self
        if self.max_tokens != type(self).model_fields["max_tokens"].default:
            raise ValueError(
                f"max_tokens does not apply to kind {self.kind}, which reads several passages at once; set "
                "lists.max_passage_tokens"
            )
        if self.remote is not None and self.remote.top_logprobs != RemoteConfig.model_fields["top_logprobs"].default:
            raise ValueError(f"remote.top_logprobs does not apply to kind {self.kind}, which asks for words; delete it")
        if self.lists is not None and self.kind == "listwise" and self.lists.step >= max(2, self.lists.size):
            raise ValueError(
                f"lists.step is {self.lists.step} and lists.size {self.lists.size}: windows must overlap, so set a "
                "smaller step"
            )
        return self

    @model_validator(mode="after")
    def _check_loading(self) -> TeacherConfig:
        chosen = [name for name in _LOCAL_SETTINGS if getattr(self, name) != type(self).model_fields[name].default]
        if chosen and self.kind in {*REMOTE_KINDS, "cosine", "stack"}:
            raise ValueError(
                f"{' and '.join(chosen)} of a teacher of kind {self.kind} cannot be set: these are about loading one "
                "model with local weights (kinds causal, seq2seq and classifier)"
            )
        if self.kind == "vllm" and {*chosen} - {"dtype"}:
            raise ValueError(
                "device_map and quantization do not apply to kind vllm: set vllm.tensor_parallel_size and "
                "vllm.quantization (and teacher_tuning.quantization for tuning)"
            )
        if self.vllm is not None and self.kind != "vllm":
            raise ValueError(
                f'the section vllm needs kind = "vllm", not "{self.kind}"; set the kind or delete the section'
            )
        return self

    @property
    def num_gpus(self) -> int:
        """How many GPUs one copy of the teacher needs, where there are any."""
        return 1 if self.vllm is None else self.vllm.tensor_parallel_size

    def named(self, text: str) -> TeacherConfig:
        """The teacher that ``KIND:MODEL`` or ``MODEL`` names, with the other settings of this one."""
        kind, colon, model = text.partition(":")
        if not (colon and model and kind in get_args(TeacherConfig.model_fields["kind"].annotation)):
            kind, model = "auto", text
        if (kind in LIST_KINDS) == (self.kind in LIST_KINDS):
            return self.model_copy(update={"model": model, "kind": kind})
        remote = None if self.remote is None else self.remote.model_dump(exclude_unset=True, exclude={"top_logprobs"})
        return TeacherConfig.model_validate({"model": model, "kind": kind, "remote": remote})


class TeacherTuningConfig(_Section):
    """Tuning of the teacher on labelled pairs."""

    loss: Literal["pairs", "lists"] = "pairs"
    """``pairs``: yes/no cross-entropy of each pair. ``lists``: cross-entropy of a softmax over each query's passages,
    plus 0.3 times the pair loss, which keeps the scale of the log-odds; usually better for rankings."""
    tuning: Literal["lora", "full"] = "lora"
    """``full`` tunes every weight (and needs a much lower learning rate); the tuned teacher is then a complete model.
    """
    lora: LoraConfig = LoraConfig(rank=16, alpha=32)
    quantization: Quantization | None = None
    """Tune adapters on weights that are stored in 8 or 4 bits (QLoRA). By default as ``teacher.quantization``."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass and compute the rest again: less memory for a long
    pair, about a third more time, the same result."""
    learning_rate: float = Field(default=5e-4, gt=0)
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    epochs: int = Field(default=1, ge=0)
    """0: do not tune the teacher."""
    batch_pairs: int = Field(default=32, ge=1)
    part_tokens: int | None = Field(default=None, ge=1)
    """Tokens, including padding, in one pass through the model; gradients are accumulated over passes. By default 512
    on a CPU, and 2,048 to 32,768 elsewhere: the more, the smaller the model and the larger the memory."""
    graph_gib: float | None = Field(default=None, gt=0)
    """Memory for the intermediate results of a query's passages that exceed ``part_tokens``, in GiB; by default a third
    of what is free when the run starts. What does not fit is computed twice, with the same result."""
    num_negatives: int = Field(default=4, ge=1)
    """Negatives per positive, drawn from the plan's hard and easy negatives."""
    student: str | None = None
    """A student, a folder or a name, whose scores of the pairs the teacher learns instead of the data sets' judgements
    (Trans-Encoder)."""
    max_queries: int | None = Field(default=None, ge=1)
    checkpoint_minutes: float = Field(default=5.0, gt=0)
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
    def _check_student(self) -> TeacherTuningConfig:
        if self.student is not None and self.epochs == 0:
            raise ValueError("a teacher can learn from student only if it is tuned: set epochs above 0, or no student")
        if self.student is not None and self.dev_measure == "mrr":
            raise ValueError(
                "dev_measure mrr needs the data sets' judgements, which student replaces: set it to cross_entropy"
            )
        return self

    def base_quantization(self, teacher: TeacherConfig) -> Quantization:
        """How the weights are stored that adapters of ``teacher`` are tuned on."""
        return teacher.quantization if self.quantization is None else self.quantization


class RemoteWriterConfig(CompletionConfig):
    """The endpoint of a remote writer (docs/writers.md)."""

    api: Literal["completions", "chat"] = "chat"
    timeout_seconds: float = Field(default=300.0, gt=0)
    """Time limit of one request; a whole answer takes longer than one token."""


class WriterConfig(_Section):
    """The LLM that writes queries for passages, or expands the queries of a search."""

    model: str = "smollm2"
    """Local folder (also of a tuned writer), Hub name, GGUF file, or ``smollm2``; for a remote writer, the model's name
    at the endpoint."""
    kind: Literal["local", "remote"] = "local"
    prompt: str | None = None
    """Name of a prompt set shipped with d2llm, or the path of a TOML file (see ``models.writers.prompts``). By default
    ``standard`` for a remote writer, and for a local one ``short``, which small models need. A tuned writer has a
    format of its own and ignores it."""
    max_passage_tokens: int = Field(default=400, ge=16)
    """Maximum length of title and passage together; the end of the passage is cut off to fit."""
    max_new_tokens: int = Field(default=48, ge=4)
    """Maximum length of one query; an answer with several queries may be that many times as long, and a passage that
    answers a query three times."""
    temperature: float | None = Field(default=None, ge=0)
    """0: always the likeliest token. By default 0.8, but 0 for a local model that was not tuned to write: little of
    what it draws fits the passage."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Choose among the likeliest tokens that together have this probability."""
    remote: RemoteWriterConfig | None = None

    @property
    def prompt_set(self) -> str:
        """``prompt``, or the default of this kind of writer."""
        return self.prompt or ("standard" if self.kind == "remote" else "short")


class WriterTuningConfig(_Section):
    """Tuning of a local writer on the judged queries of data sets."""

    lora: LoraConfig = LoraConfig(rank=16, alpha=32, dropout=0.0)
    """Without dropout, which takes a tenth of a step on a CPU: in one epoch, no example comes twice."""
    learning_rate: float = Field(default=5e-4, gt=0)
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    epochs: int = Field(default=1, ge=1)
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens, including padding, in one step."""
    part_tokens: int | None = Field(default=None, ge=1)
    """Tokens, including padding, in one pass through the model; gradients are accumulated over passes. By default 512
    on a CPU, and 2,048 to 32,768 elsewhere: the more, the smaller the model and the larger the memory."""
    max_queries: int | None = Field(default=None, ge=1)
    """Train on a random sample of this many queries of each data set."""
    dev_queries: int = Field(default=100, ge=0)
    """Dev queries of each data set on which the loss is measured before and after training."""
    keywords_share: float = Field(default=0.25, ge=0, le=1)
    """Share of the English questions to turn into keyword queries, by leaving out function words: data sets have hardly
    any."""
    exclude_shared_passages: bool = True
    """Leave out training queries that share a positive with a dev or test query."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)


class ReaderTuningConfig(_Section):
    """Tuning of a causal language model that reads passages as vectors (``models.listwise_reader``)."""

    model: str = "smollm2"
    """A causal language model: local folder, Hub name or GGUF file."""
    layers: int | None = Field(default=8, ge=1)
    """Use only this many of its first layers. None: all."""
    lora: LoraConfig = LoraConfig()
    depth: int = Field(default=20, ge=2)
    """Passages of a list: the student's first ones."""
    steps: int = Field(default=10, ge=1)
    """How many of them are drawn, and no more than there are: nDCG@10 counts ten."""
    lists: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]] = (2_000, 4_000)
    """Lists to read in the two stages: for the network alone, then with LoRA. Queries come again if there are fewer."""
    max_queries: int = Field(default=1_500, ge=1)
    """Train queries of each data set."""
    dev_queries: int = Field(default=300, ge=0)
    """Dev queries of each data set on which the ranking is measured."""
    exclude_shared_passages: bool = True
    """Leave out training queries that share a relevant passage with a dev or test query."""
    batch_lists: int = Field(default=8, ge=1)
    """Lists of one step."""
    network_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the first stage."""
    lora_rate: float = Field(default=5e-4, gt=0)
    """Learning rate of the second stage, for the network too."""
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    checkpoint_minutes: float = Field(default=5.0, gt=0)


class DataConfig(_Section):
    """One data set of a recipe: a retrieval set in BEIR layout, or a set of labelled pairs."""

    path: str
    """Location of the data set; the last part is its name. ``--data`` sets the location on another machine."""
    about: str = ""
    """What the data set contains, its licence and where to get it, for users who do not have it."""
    task: Task = "asymmetric"
    max_queries: int | None = Field(default=None, ge=1)
    """Train on a random sample of this many queries."""
    max_labelled: int | None = Field(default=None, ge=1)
    """Let the teacher label this many of them, at random or as ``labelling`` says; ``training.unlabelled`` says what
    happens to the others. For a teacher that is slow compared with the student."""
    exclude_shared_passages: bool = True
    """Leave out training queries that share a positive with a dev or test query, so that dev and test passages have
    never been positives. If all splits share one small corpus (intents, FAQ), nothing would be left: set this to false,
    but note that dev and test then measure unseen queries only, not unseen passages. Of labelled pairs, only those are
    left out that dev or test have too."""


class MiningConfig(_Section):
    """How to mine negatives for the training plan. Options are named as in sentence-transformers'
    ``mine_hard_negatives``.
    """

    num_hard: int = Field(default=8, ge=0)
    num_easy: int = Field(default=4, ge=0)
    sources: tuple[Literal["bm25", "encoder"], ...] = ("bm25", "encoder")
    """Rankings that provide candidates for hard negatives: their union, without the positives."""
    student: str | None = None
    """The encoder: a trained student's folder or name, which ranks by its full score. By default the recipe's backbone
    before training, which ranks by its cosine."""
    range_min: int = Field(default=0, ge=0)
    """Skip this many passages at the top of each list, not counting positives: the most likely false negatives."""
    range_max: int = Field(default=50, ge=1)
    """How many passages of each list are candidates."""
    sampling: Literal["uniform", "top", "rank_weighted"] = "uniform"
    """How to draw from the range: uniformly, the best ranks first, or weighted by 1 / rank (the better rank of the two
    lists)."""
    near_duplicate: float = Field(default=0.9, gt=0, le=1)
    """Drop a candidate if its text is more similar to a positive's than this (Jaccard similarity of character
    trigrams); 1 drops only identical texts."""
    relative_margin: float | None = Field(default=None, ge=0)
    """Drop a candidate if the encoder scores it above the mean score of the positives minus this share of that mean;
    0.05 is a common value."""
    teacher_margin: float | None = None
    """Drop a candidate if its teacher log-odds are above the mean log-odds of the positives minus this margin. Costs
    one teacher pass per candidate; the judgements are kept in the label store. A run that tunes the teacher first mines
    without the margin, and afterwards with it and the tuned teacher."""

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
    """Share of the steps during which the rate rises from 0 to its full value."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """A number of steps instead of the share."""

    def warmup_of(self, total_steps: int) -> int:
        """Number of warm-up steps in a run of ``total_steps``."""
        return round(self.warmup_fraction * total_steps) if self.warmup_steps is None else self.warmup_steps


class LabellingConfig(_Section):
    """Which queries the teacher labels, if ``max_labelled`` of a data set does not allow for all, and what it may cost.

    The limits are those of one call of ``label``, and of what one call of ``distill`` asks (``training.unjudged``,
    ``training.in_batch_labels``); the next continues where it stopped.
    """

    compared_students: tuple[str, str] | None = None
    """Two students, as folders or names, such as those before and after some training: the queries whose passages they
    rank most differently are labelled. By default a random sample is."""
    max_minutes: float | None = Field(default=None, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)
    """Tokens that the teacher reads and writes."""
    max_cost: float | None = Field(default=None, gt=0)
    """In the currency of the prices in ``teacher.remote``."""


class ResidualConfig(WarmUpConfig):
    """The second stage: trains the interaction alone, on vectors that are encoded once (anchored head)."""

    epochs: int = Field(default=0, ge=0)
    """0: one stage, interaction and vectors together. Otherwise the first stage trains the vectors alone."""
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_queries: int = Field(default=32, ge=1)
    depth: int = Field(default=200, ge=1)
    """Draw neighbours from this many passages of the plan with the largest inner products."""
    num_near: int = Field(default=30, ge=0)
    """Neighbours per query and step, in addition to the plan's negatives."""
    num_random: int = Field(default=20, ge=0)
    quiet_price: float = Field(default=0.0, ge=0)
    """Penalty in the loss per unit of squared change that one task's interaction makes to rankings of the other task's
    texts: an interaction should not change what it was not trained on."""


class TokensConfig(WarmUpConfig):
    """The last stage: trains the projection that makes the vectors of tokens (``evidence.token_vectors``)."""

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


PretrainingObjective = Literal[
    "simcse",
    "mirror",
    "words",
    "masked_next_token",
    "relations",
    "hidden_states",
    "mutual_information",
    "vectors",
]


class PretrainingConfig(WarmUpConfig):
    """The stage before distillation: trains the backbone on texts without labels (``training.pretrain``).

    The texts are passages and train queries of the recipe's data sets. docs/recipes.md has what each objective brought.
    """

    objective: PretrainingObjective | None = None
    """None: no such stage. Otherwise what the backbone learns: to recognise a text that it reads twice with different
    dropout (``simcse``), and of which a span is masked the second time (``mirror``); to predict from a text's vector
    which words are in it, and which follow (``words``); to predict masked tokens from both sides, each from the state
    before it (``masked_next_token``); or to imitate another backbone's attention (``relations``), states of tokens
    (``hidden_states``, or ``mutual_information`` with them) or vectors of texts (``vectors``)."""
    teacher: str | None = None
    """The backbone to imitate, named as ``backbone.model``. By default the student's own model with all its layers, for
    a student whose ``backbone.layers`` names some of them. If it has another tokenizer, states of tokens are compared
    by the characters that the tokens of both share, which needs tokenizers with character offsets; ``vectors`` needs
    none, and ``relations`` needs the same tokenizer."""
    max_passages: int = Field(default=5_000, ge=1)
    """Passages of each data set, and at most as many of its train queries, drawn at random."""
    max_tokens: int = Field(default=64, ge=4)
    """Longer texts are cut to so many tokens."""
    epochs: int = Field(default=1, ge=1)
    batch_texts: int = Field(default=32, ge=2)
    learning_rate: float | None = Field(default=None, gt=0)
    """By default 1e-4 for all weights (``backbone.tuning = "full"``), and 1e-3 for adapters."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout in all layers of the backbone that have one, also where only adapters are trained. By default 0.1 for
    ``simcse`` and ``mirror``, and none for the others."""
    temperature: float = Field(default=0.05, gt=0)
    """For ``simcse`` and ``mirror``."""
    masked_tokens: int = Field(default=3, ge=1)
    """For ``mirror``: how many neighbouring tokens are masked."""
    masked_share: float = Field(default=0.2, gt=0, lt=1)
    """For ``masked_next_token``: share of a text's tokens that are masked."""
    information_alpha: float = Field(default=0.9, ge=0, le=1)
    """For ``mutual_information``: between the bound of least bias (0) and that of least variance (1)."""
    relation_heads: int = Field(default=48, ge=1)
    """For ``relations``: into how many parts queries, keys and values are split, in both backbones."""
    teacher_layer: int | None = Field(default=None, ge=0)
    """For ``relations``: the layer of the teacher, counted from 0, that the student's last layer imitates. By default
    the last; an upper middle one is better if the teacher is large."""

    @property
    def is_taught(self) -> bool:
        """Whether another backbone is imitated."""
        return self.objective in ("relations", "hidden_states", "mutual_information", "vectors")

    @property
    def dropout_rate(self) -> float:
        """``dropout``, or its default for the objective."""
        return self.dropout if self.dropout is not None else 0.1 if self.objective in ("simcse", "mirror") else 0.0

    def rate_for(self, tuning: str) -> float:
        """``learning_rate``, or its default for what is trained."""
        return self.learning_rate or (1e-4 if tuning == "full" else 1e-3)

    @model_validator(mode="after")
    def _check_objective(self) -> PretrainingConfig:
        if self.objective == "simcse" and self.dropout == 0:
            raise ValueError(
                "dropout is 0, but the objective simcse compares two readings of a text that differ by nothing else: "
                "set it to 0.1"
            )
        if self.teacher is not None and not self.is_taught:
            raise ValueError(
                f"teacher is set, but the objective {self.objective} imitates none: set objective to vectors, "
                "hidden_states, mutual_information or relations, or delete teacher"
            )
        if self.teacher_layer is not None and self.objective != "relations":
            raise ValueError(f"teacher_layer is for the objective relations, not {self.objective}; delete it")
        return self


class TrainingConfig(WarmUpConfig):
    """Optimisation settings of ``distill``."""

    start: str | None = None
    """Continue from this student, a folder or a name; its settings must be those of ``[student]``. By default training
    starts from the pretrained backbone."""
    dual_head: bool = False
    """Two heads (DHO): one learns the data sets' judgements, the other imitates the teacher. At the end they are
    combined with the weights that are best on dev, into one inner product, so the student is like any other (anchored
    head)."""
    complement_words: int | None = Field(default=None, ge=1)
    """Learn what words miss (CoRT): hard negatives are those of the plan that BM25 has among its first so many
    passages, and positives are drawn from those that it has not, where a query has any. For an index whose score counts
    words too. None: words play no part in the draw."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """For adapters on a small model; use a third of it for large models, and a thirtieth to train all weights
    (``tuning = "full"``)."""
    head_learning_rate: float = Field(default=2e-4, gt=0)
    """Learning rate of PMA and IEM. Ten times as much saturates the interaction within a hundred steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    epochs: int | None = Field(default=None, ge=1)
    """By default as many as are needed for 60 steps, but at least 2 and at most 10."""
    batch_queries: int = Field(default=16, ge=1)
    num_positives: int = Field(default=1, ge=1)
    """Positives per query and step, of the queries that have so many; more where whole lists were judged."""
    num_hard: int = Field(default=4, ge=0)
    """Hard negatives per query and step, drawn from the plan's again in each epoch."""
    num_easy: int = Field(default=1, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    unlabelled: Literal["leave_out", "own_labels"] = "leave_out"
    """What to do with queries of the plan that the teacher has not labelled: leave them out, or train on the data set's
    own judgements."""
    unjudged: Literal["negatives", "leave_out", "ask_teacher"] = "negatives"
    """What to do with passages that training itself finds near a query (neighbours in the second stage, negatives of
    ``remine``) and that the teacher has not judged: treat them as irrelevant, leave them out, or have the teacher judge
    them first, which takes time; the judgements are kept with the other labels. For queries that learn from the data
    set's own judgements, they are always treated as irrelevant."""
    in_batch_labels: bool = False
    """Have the teacher judge every query of a batch with the passages of the batch's other queries too, before the
    batch is used, as in the published training; the judgements are kept with the other labels. Otherwise such a passage
    is irrelevant, unless it has a label. For queries that learn from the data set's own judgements, it always is."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between dev evaluations; by default a fifth of the run's steps, at most 200."""
    patience: int = Field(default=5, ge=1)
    """Stop after this many dev evaluations without improvement."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Stop the first stage after this much time, without that of interruptions; the best state so far is kept."""
    dev_queries: int = Field(default=200, ge=1)
    dev_passages: int = Field(default=1000, ge=1)
    """Dev corpus: the dev positives, their mined negatives, and random passages up to this number."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Maximum number of steps between checkpoints."""
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    """Maximum time between checkpoints. A checkpoint is also saved when Ctrl-C or SIGTERM stops the run."""
    sampling_temperature: float = Field(default=1.0, ge=1)
    """T: a data set of n queries has a share proportional to n^(1/T) in the batches. 1: in proportion to its size;
    above 1: small sets are sampled more often and large ones less, with the same number of batches."""
    part_tokens: int | None = Field(default=None, ge=1)
    """Tokens, including padding, in one pass through the backbone; by default 512 on a CPU, where larger passes are no
    faster, and 2,048 to 32,768 elsewhere: the more, the smaller the backbone and the larger the memory."""
    gradient_caching: Literal["auto", "on", "off"] = "auto"
    """Encode the texts of a batch twice, part by part, so that memory holds the intermediate results of one part at a
    time; the gradient is the same. ``auto``: only for parts whose intermediate results do not fit into ``graph_gib``.
    """
    graph_gib: float | None = Field(default=None, gt=0)
    """Memory for the intermediate results that ``auto`` keeps, in GiB; by default a third of what is free when the run
    starts. It affects only speed."""
    remine: bool = False
    """At the start of each epoch from the second on, mine the hard negatives again with the student's own ranking."""
    pretraining: PretrainingConfig = PretrainingConfig()
    residual: ResidualConfig = ResidualConfig()
    tokens: TokensConfig = TokensConfig()
    interpolation: tuple[float, ...] = ()
    """Weights between the start (0) and the best state (1) to try at the end. The smallest one whose dev results are
    not significantly worse than those of the best state is kept, which preserves what the backbone could do before."""
    largest_share: float = Field(default=1.0, gt=0, le=1)
    """Upper limit of that weight: a dev set drawn from the training data shows what tuning gains there, but not what it
    loses on other texts."""
    trackers: Literal["auto"] | tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = "auto"
    """Where to log the run besides ``log.jsonl``; ``auto``: to TensorBoard files in the run folder if `tensorboard` is
    installed."""

    @model_validator(mode="after")
    def _check_pretraining(self) -> TrainingConfig:
        if self.pretraining.objective is not None and self.start is not None:
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
        """Whether the teacher judges more pairs during the training, so that it must be there."""
        return self.in_batch_labels or self.unjudged == "ask_teacher"

    @property
    def steps_back(self) -> bool:
        """Whether the final state may be an interpolation between the start and the best state."""
        return bool(self.interpolation) or self.largest_share < 1


class GateConfig(_Section):
    """Test before distillation whether the teacher beats the cosine on dev queries of each data set."""

    queries: int = Field(default=200, ge=2)
    """Dev queries of each data set, or all if there are fewer; for labelled pairs, ten times as many."""
    depth: int = Field(default=20, ge=1)
    """Candidates: the first ``depth`` of BM25 and of the cosine."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Significance level of the paired test; the gate opens if the teacher is better at this level."""
    when_closed: Literal["labels", "teacher", "stop"] = "labels"
    """If the gate is closed: learn from the data set's own judgements, learn from the teacher anyway, or stop."""


class EvidenceConfig(_Section):
    """Terms to add to the student's score in an index, if they improve the dev results (``models.evidence``).

    The weights are fitted at the end of a run. The head ``paper`` gets none, because it has no inner product to which
    they could be added.
    """

    words: bool = False
    """BM25 of the passage."""
    window_words: bool = False
    """BM25 of the passage's best window; a window is two neighbouring sentences."""
    window_vectors: bool = False
    """The highest inner product with a window, each encoded on its own; indexing then encodes long passages two more
    times."""
    token_vectors: bool = False
    """The mean, over the query's rarest tokens, of the highest cosine with a token of the passage. The vectors of
    tokens come from the same reading as the passage's own; an index stores 32 bytes for each token."""
    in_training: bool = False
    """Count words and vectors of tokens in the losses and dev results of training, with weights that are fitted on dev
    before the first step: the vectors and the interaction then learn what words leave unexplained (Gao et al.,
    "Complement Lexical Retrieval Model with Semantic Residual Embeddings", ECIR 2021), and the backbone is trained
    together with the projection of tokens, as in ColBERT. The second stage counts words alone."""

    @property
    def terms(self) -> tuple[EvidenceTerm, ...]:
        """The terms that are added."""
        chosen: dict[EvidenceTerm, bool] = {
            "words": self.words,
            "words_share": self.words,
            "window_words": self.window_words,
            "window_words_share": self.window_words,
            "window_vectors": self.window_vectors,
            "token_vectors": self.token_vectors,
        }
        return tuple(term for term, is_chosen in chosen.items() if is_chosen)

    @model_validator(mode="after")
    def _check_in_training(self) -> EvidenceConfig:
        if self.in_training and not (self.words or self.window_words or self.token_vectors):
            raise ValueError(
                "in_training counts words and vectors of tokens in training, but neither words, window_words nor "
                "token_vectors is true"
            )
        return self


class Recipe(_Section):
    """All settings of one run."""

    name: str = "unnamed"
    seed: int = Field(default=0, ge=0)
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    teacher_tuning: TeacherTuningConfig = TeacherTuningConfig()
    data: tuple[DataConfig, ...] = ()
    mining: MiningConfig = MiningConfig()
    gate: GateConfig = GateConfig()
    labelling: LabellingConfig = LabellingConfig()
    losses: Objective = Field(default_factory=lambda: Objective({}))
    training: TrainingConfig = TrainingConfig()
    evidence: EvidenceConfig = EvidenceConfig()

    @model_validator(mode="after")
    def _check_tuning(self) -> Recipe:
        tuning = self.teacher_tuning
        if tuning.epochs and tuning.tuning == "full" and tuning.base_quantization(self.teacher) != "none":
            raise ValueError(
                f"teacher.quantization is {self.teacher.quantization}, and quantised weights cannot be trained: set "
                'teacher_tuning.tuning = "lora" or teacher_tuning.quantization = "none"'
            )
        return self

    @model_validator(mode="after")
    def _check_lists(self) -> Recipe:
        imitated = [kind for kind, loss in self.losses.active.items() if "features" in loss.needs]
        if self.teacher.kind in LIST_KINDS and imitated and self.student.interaction.head != "cosine":
            raise ValueError(
                f"losses.{imitated[0]} imitates a teacher's features, and one of kind {self.teacher.kind} answers in "
                f"words alone: set {' and '.join(f'losses.{name} = 0' for name in imitated)}"
            )
        remote = self.teacher.remote
        if self.labelling.max_cost is not None and (remote is None or remote.cost(0, 0) is None):
            raise ValueError(
                "labelling.max_cost needs prices: set teacher.remote.price_per_million_prompt_tokens and "
                "price_per_million_written_tokens, or give the limit as max_tokens"
            )
        return self

    @model_validator(mode="after")
    def _check_remote_backbone(self) -> Recipe:
        if self.student.backbone.remote is not None and self.evidence.token_vectors:
            raise ValueError(
                "evidence.token_vectors needs the states of tokens, and a remote backbone gives one vector for each "
                "text: set token_vectors to false (words and window_vectors can be used)"
            )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Recipe:
        if self.student.backbone.adapters == "one":
            return self
        if self.data and all(each.task == "symmetric" for each in self.data):
            raise ValueError(
                'student.backbone.adapters is "two", but in every data set the two texts of a pair have the same role: '
                "delete adapters, or add an asymmetric set"
            )
        if self.training.pretraining.objective is not None:
            raise ValueError(
                'training.pretraining trains one backbone for all texts, but student.backbone.adapters is "two": '
                "delete one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_complement(self) -> Recipe:
        depth = self.training.complement_words
        if depth is not None and "bm25" not in self.mining.sources:
            raise ValueError(
                f"training.complement_words takes hard negatives from BM25's first {depth} passages, but "
                "mining.sources does not name bm25: add it, or delete complement_words"
            )
        return self

    @model_validator(mode="after")
    def _check_dual_head(self) -> Recipe:
        if not self.training.dual_head:
            return self
        head, losses = self.student.interaction.head, self.losses
        if head != "anchored":
            raise ValueError(
                f'training.dual_head needs the inner products of an anchor, and student.interaction.head is "{head}": '
                'set it to "anchored", or dual_head to false'
            )
        if not losses.needs & {"labels", "live_teacher"}:
            raise ValueError(
                "training.dual_head has a head that imitates the teacher, but no imitation has a weight above 0: set "
                "losses.list_imitation, or dual_head to false"
            )
        if "judgements" not in losses.needs:
            raise ValueError(
                "training.dual_head has a head that learns the data sets' judgements, but no cross-entropy has a "
                "weight above 0: set losses.in_batch_cross_entropy (for labelled pairs, pair_cross_entropy), or "
                "dual_head to false"
            )
        return self

    @model_validator(mode="after")
    def _check_pretraining(self) -> Recipe:
        pretraining, backbone = self.training.pretraining, self.student.backbone
        if pretraining.objective is None:
            return self
        if backbone.tuning == "frozen":
            raise ValueError(
                "training.pretraining trains the backbone, but student.backbone.tuning is frozen: set it to lora or "
                "full, or delete pretraining.objective"
            )
        if pretraining.objective == "masked_next_token" and not backbone.bidirectional:
            raise ValueError(
                "training.pretraining.objective is masked_next_token, which teaches a decoder to read in both "
                "directions, but student.backbone reads in one: set student.backbone.bidirectional = true, or choose "
                "another objective"
            )
        if pretraining.is_taught and pretraining.teacher is None and backbone.layers is None:
            raise ValueError(
                f"training.pretraining.objective is {pretraining.objective}, but there is no backbone to imitate: name "
                "one as pretraining.teacher, or let student.backbone.layers leave out layers of the model, which then "
                "teaches with all of them"
            )
        return self

    @model_validator(mode="after")
    def _check_losses(self) -> Recipe:
        for loss in self.losses.active.values():
            loss.check(self)
        return self

    @property
    def filters_with_tuned_teacher(self) -> bool:
        """Whether a run mines twice: first without the teacher margin, then with it and the tuned teacher."""
        return self.mining.teacher_margin is not None and self.losses.imitates and self.teacher_tuning.epochs > 0

"""The section ``[teacher]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from pydantic import Field, model_validator

from d2llm.core.types import NumberFormat
from d2llm.recipe.sections import CompletionConfig, Quantization, Section


class RemoteConfig(CompletionConfig):
    """The endpoint of a remote teacher (docs/remote-teacher.md).

    For the kinds ``graded`` and ``listwise``, ``api`` is ``chat`` and ``timeout_seconds`` 300 by default.
    """

    top_logprobs: int = Field(default=20, ge=2)
    """Kind ``remote``: how many tokens' log-probabilities to request."""
    unanswered: Literal["error", "undecided"] = "error"
    """What to do with a pair that the model does not judge, after all attempts: stop, or count it as log-odds 0."""


class ListsConfig(Section):
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


class RecordedConfig(Section):
    """Recorded grades, which a graded teacher repeats instead of asking its endpoint (docs/remote-teacher.md)."""

    lists: str
    """A file of graded lists, or a folder with one for each data set, NAME.jsonl."""
    data: tuple[str, ...] = ()
    """Folders of the data sets that the lists' ids are of. In a recipe, its own data sets by default."""
    unlisted: float | None = Field(default=None, ge=0, le=100)
    """The grade of a passage that the list of its query does not have. By default, the pair is undecided."""


class VllmConfig(Section):
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


_LOCAL_SETTINGS = ("dtype", "device_map", "quantization")


LIST_KINDS = frozenset({"graded", "listwise"})
"""Kinds of teacher that read several passages of a query at once and answer in words, without log-probabilities."""


REMOTE_KINDS = LIST_KINDS | {"remote"}
"""Kinds of teacher behind an endpoint."""


class TeacherConfig(Section):
    """The teacher: a model that reads query and passage together and scores the pair."""

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

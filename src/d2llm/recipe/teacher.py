"""The section ``[teacher]``: each kind of teacher has settings of its own and loads what it names.

A package adds its own kind by an entry point in the group ``d2llm.teachers``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from d2llm.core.registry import Registry
from d2llm.core.types import TASKS, NumberFormat, Task
from d2llm.recipe.sections import CompletionConfig, InputPath, Quantization, Section, SectionOfKind

if TYPE_CHECKING:
    from typing_extensions import Self

    from d2llm.models.teachers.pair_teacher import PairTeacher
    from d2llm.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class TeacherIdentity:
    """Fingerprints of a teacher's weights and of its question for each task."""

    fingerprint: str
    prompts: Mapping[Task, str]


class TeacherConfig(SectionOfKind):
    """The teacher: a model that reads query and passage together and scores the pair.

    Example::

        class Overlap(TeacherConfig, kind="overlap"):
            \"\"\"Words that query and passage share.\"\"\"

            stem: bool = True

            def load(self, *, device=None, dtype=None):
                return OverlapTeacher(stem=self.stem)  # a models.teachers.pair_teacher.Score

        load_teacher(TeacherConfig(kind="overlap", stem=False))
    """

    kinds = Registry["TeacherConfig"](
        "kind of teacher",
        dict.fromkeys(
            (
                *("auto", "causal", "seq2seq", "classifier", "vllm"),
                *("remote", "graded", "listwise", "likelihood", "cosine", "ensemble", "fused"),
            ),
            "d2llm.recipe.teacher",
        ),
        "d2llm.teachers",
    )
    default_kind = "auto"

    can_be_tuned: ClassVar[bool] = False
    """Whether its weights can be trained here (``tune-teacher``); others teach as they are."""
    ranks_lists: ClassVar[bool] = False
    """Whether log-odds compare only the passages of one query that were scored in one call."""

    model: str = "smollm2"
    """Local folder (also of a tuned teacher), Hub name, GGUF file, or ``smollm2``; for a remote teacher, the model's
    name at the endpoint."""
    ensemble_with_cosine: bool = False
    """Learn from an ensemble of this teacher and the run's tuned cosine, calibrated on dev."""

    def load(self, *, device: str | None = None, dtype: str | None = None) -> PairTeacher:
        """Load the teacher (``load_teacher``); a kind defines it."""
        raise NotImplementedError

    def identify(self) -> TeacherIdentity:
        """The identity of ``load()``. A kind that can tell it without loading the model defines it anew."""
        teacher = self.load()
        return TeacherIdentity(teacher.fingerprint, {task: teacher.prompt_fingerprint(task) for task in TASKS})

    def check(self, recipe: Recipe) -> None:
        """Check that the rest of the recipe fits; raises a ``ValueError`` that says what to change."""
        if recipe.labelling.max_cost is not None and (self.endpoint is None or self.endpoint.cost(0, 0) is None):
            raise ValueError(
                "labelling.max_cost needs prices: set teacher.remote.price_per_million_prompt_tokens and "
                "price_per_million_written_tokens, or give the limit as max_tokens"
            )
        imitated = [kind for kind, loss in recipe.losses.root.items() if "features" in loss.learns_from]
        if imitated and recipe.student.interaction.has_network and not self.may_have_features:
            raise ValueError(
                f"losses.{imitated[0]} imitates a teacher's features, and one of kind {self.kind} has none: set "
                f"{' and '.join(f'losses.{name} = 0' for name in imitated)}"
            )

    @property
    def may_have_features(self) -> bool:
        """Whether it may give features of pairs, which some losses imitate."""
        return True

    @property
    def members(self) -> Sequence[TeacherConfig]:
        """The teachers that score: itself, or the members of an ensemble."""
        return [self]

    @property
    def num_gpus(self) -> int:
        """How many GPUs one copy of the teacher needs, where there are any."""
        return 1

    @property
    def needs_tuning(self) -> bool:
        """Whether its scores mean nothing until it is tuned."""
        return False

    @property
    def scores_only_recorded(self) -> bool:
        """Whether a pair that was not recorded is undecided."""
        return False

    @property
    def endpoint(self) -> CompletionConfig | None:
        """What is asked for money; None if nothing is."""
        return None

    def named(self, text: str) -> TeacherConfig:
        """The teacher that ``KIND:MODEL`` or ``MODEL`` names, with the settings of this one that its kind has too."""
        kind, model = self.split_kind(text)
        return self.as_kind(kind, model=model)

    def as_kind(self, kind: str, **changes: Any) -> TeacherConfig:
        """Another kind of teacher, with the settings of this one that it has too (and of the same default)."""
        cls: type[TeacherConfig] = self.kinds.find(kind)
        if cls is type(self):
            return self.model_copy(update=changes)
        kept: dict[str, Any] = {}
        for name in self.model_fields_set & cls.model_fields.keys():
            value, field = getattr(self, name), cls.model_fields[name]
            if isinstance(value, Section):
                kept[name] = value.model_dump(exclude_unset=True, include={*_section_of(field).model_fields})
            elif field.default == type(self).model_fields[name].default:
                kept[name] = value
        return cls.model_validate(kept | changes)

    def tuned(self, folder: str) -> Self:
        """The same teacher after its tuning, whose result is in this folder."""
        return self.model_copy(update={"model": folder})


def _section_of(field: FieldInfo) -> type[Section]:
    candidates = (field.annotation, *get_args(field.annotation))
    return next(candidate for candidate in candidates if isinstance(candidate, type) and issubclass(candidate, Section))


class _ShippedTeacher(TeacherConfig):
    teacher_class: ClassVar[str]
    """Its class in ``models.teachers``: "module:Class"."""

    def load(self, *, device: str | None = None, dtype: str | None = None) -> PairTeacher:
        return self._teacher_class.load(self, device=device, dtype=dtype)

    def identify(self) -> TeacherIdentity:
        return self._teacher_class.identify(self)

    @property
    def may_have_features(self) -> bool:
        """Only where this process reads the model's states."""
        return False

    @property
    def _teacher_class(self) -> Any:
        module, _, name = self.teacher_class.partition(":")
        return getattr(import_module(f"d2llm.models.teachers.{module}"), name)


class PromptedTeacherConfig(_ShippedTeacher):
    """What teachers that answer a question about each pair have in common."""

    prompt: str = "paper"
    """Name of a prompt set shipped with d2llm, or the path of a TOML file (see ``models.teachers.prompts``)."""
    max_tokens: int = Field(default=350, ge=32)
    """Maximum length of the whole input; the end of the passage is cut off to fit."""


# Local weights --------------------------------------------------------------------------------------------------------


class LocalTeacherConfig(_ShippedTeacher):
    """What teachers whose weights this process loads have in common."""

    can_be_tuned = True
    max_tokens: int = Field(default=350, ge=32)
    """Maximum length of the whole input; the end of the passage is cut off to fit."""
    dtype: NumberFormat | None = None
    """Number format of its weights and of its computations, unless ``--dtype`` names another; by default the fastest on
    the device."""
    device_map: Literal["auto"] | None = None
    """``auto``: spread its layers over all GPUs that this process sees. By default it is on one device."""
    quantization: Quantization = "none"
    """Store the weights of its linear layers in 8 bits (LLM.int8) or 4 bits (NF4), by bitsandbytes. Its log-odds differ
    from those of the full weights, so it is another teacher, with labels of its own."""

    @property
    def may_have_features(self) -> bool:
        """The state that the score is made of, unless the folder is that of another kind."""
        return True

    def identify(self) -> TeacherIdentity:
        """Without importing the model's code."""
        return import_module("d2llm.models.teachers.identity").identify_local_teacher(self)


class AutoTeacherConfig(PromptedTeacherConfig, LocalTeacherConfig, kind="auto"):
    """A teacher whose kind follows from its folder: pretrained weights, a tuned teacher, a student, an ensemble."""

    measured = "not measured: it is one of the others"

    def load(self, *, device: str | None = None, dtype: str | None = None) -> PairTeacher:
        """As the kind that the folder shows."""
        return self.detected.load(device=device, dtype=dtype)

    def identify(self) -> TeacherIdentity:
        """As the kind that the folder shows."""
        return self.detected.identify()

    @property
    def members(self) -> Sequence[TeacherConfig]:
        """Those of the kind that the folder shows."""
        return self.detected.members

    @property
    def detected(self) -> TeacherConfig:
        """The same teacher as the kind that its folder shows (``models.teachers.identity.find_kind``)."""
        return self.as_kind(import_module("d2llm.models.teachers.identity").find_kind(self))


class CausalTeacherConfig(PromptedTeacherConfig, LocalTeacherConfig, kind="causal"):
    """A causal language model, whose answer is read at the last token."""

    paper = "Liao et al., ACL 2024, arXiv 2406.17262 (D2LLM), section 3.1"
    measured = (
        "SmolLM2-135M tuned on 3,000 queries: MRR .865 on squad-sent and .701 on banking77, an untuned cosine "
        ".871 and .775 ([one run](log/2026-11.md#2026-11-20-tuning-smollm2-135m-as-a-teacher-and-the-gate))"
    )
    teacher_class = "causal:CausalTeacher"


class Seq2SeqTeacherConfig(PromptedTeacherConfig, LocalTeacherConfig, kind="seq2seq"):
    """A sequence-to-sequence model, prompted as MonoT5 is; tuned by a softmax over lists, RankT5."""

    paper = "Nogueira et al., EMNLP Findings 2020, arXiv 2003.06713 (MonoT5); Zhuang et al., SIGIR 2023 (RankT5)"
    measured = "not measured: no weights of a T5 can be had here; a tiny random one is tuned and read by a test"
    teacher_class = "seq2seq:Seq2SeqTeacher"


class ClassifierTeacherConfig(LocalTeacherConfig, kind="classifier"):
    """A cross-encoder with a score of its own."""

    measured = (
        "MiniLM tuned on 14,902 queries is above the tuned cosine on four sets of seven (covidqa .735 against "
        ".332; [one run, 47 to 60 dev queries](log/2026-11.md#2026-11-20-a-cross-encoder-of-the-students-own-"
        "size-as-a-teacher-and-stacked-with-the-cosine))"
    )
    teacher_class = "classifier:ClassifierTeacher"
    positive_label: str | None = None
    """With several classes: the class that means yes, as named in its config.json (``entailment``)."""
    new_head: bool = False
    """Add a head with one output to an encoder that has none. Its scores mean nothing until it is tuned with every
    weight (``teacher_tuning.tuning = "full"``)."""

    @property
    def needs_tuning(self) -> bool:
        """Whether its head is new."""
        return self.new_head

    def tuned(self, folder: str) -> Self:
        """With the head that was tuned."""
        return self.model_copy(update={"model": folder, "new_head": False})


class VllmTeacherConfig(PromptedTeacherConfig, kind="vllm"):
    """A causal language model that vLLM's offline engine runs in this process (docs/how-to/large-teachers.md)."""

    needs = frozenset({"gpu"})
    measured = (
        "the scores of the local teacher, at most 3e-5 from them in float32 "
        "([40 pairs](log/2026-11.md#2026-11-29-vllm-itself-on-a-cpu))"
    )
    costs = "the package vllm, in an environment of its own"
    teacher_class = "vllm:VllmTeacher"
    can_be_tuned = True
    dtype: NumberFormat | None = None
    """Number format of its weights and of its computations, unless ``--dtype`` names another."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Over how many GPUs of this machine to split each layer."""
    quantization: str | None = None
    """A method by which vLLM quantises the weights while it loads them, such as ``fp8`` or ``bitsandbytes``. A model
    that was stored quantised needs no setting."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Fraction of each GPU's memory for weights and cache; of main memory, where vLLM runs on a CPU."""
    enforce_eager: bool = False
    """Do not compile the model or capture CUDA graphs: starts faster, scores a little more slowly."""

    def identify(self) -> TeacherIdentity:
        """That of the same causal teacher, unless vLLM quantises its weights."""
        return import_module("d2llm.models.teachers.identity").identify_local_teacher(self)

    @property
    def num_gpus(self) -> int:
        """As many as each layer is split over."""
        return self.tensor_parallel_size


# Endpoints ------------------------------------------------------------------------------------------------------------


class TeacherEndpointConfig(CompletionConfig):
    """The endpoint of a teacher (docs/remote-teacher.md)."""

    unanswered: Literal["error", "undecided"] = "error"
    """What to do with a pair that the model does not score, after all attempts: stop, or count it as log-odds 0."""


class RemoteConfig(TeacherEndpointConfig):
    """The endpoint of a teacher of kind ``remote``."""

    top_logprobs: int = Field(default=20, ge=2)
    """How many tokens' log-probabilities to request."""


class ListEndpointConfig(TeacherEndpointConfig):
    """The endpoint of a teacher of kind ``graded`` or ``listwise``."""

    api: Literal["completions", "chat"] = "chat"
    timeout_seconds: float = Field(default=300.0, gt=0)
    """Time limit of one request; a whole answer takes longer than one token."""


class RemoteTeacherConfig(PromptedTeacherConfig, kind="remote"):
    """An OpenAI-compatible endpoint that returns log-probabilities: one question a pair."""

    needs = frozenset({"endpoint"})
    costs = "log-probabilities of its answers"
    measured = (
        "SmolLM2's Q4_1 file: log-odds .12 apart on average from the local teacher's (12 pairs of "
        "[squad-sent](log/2026-11.md#2026-11-20-a-remote-teacher-beside-the-local-one))"
    )
    teacher_class = "remote:RemoteTeacher"
    remote: RemoteConfig

    @property
    def endpoint(self) -> CompletionConfig:
        """Its endpoint."""
        return self.remote


class ListsConfig(Section):
    """How several passages of a query are shown at once (docs/remote-teacher.md)."""

    size: int = Field(default=20, ge=1, le=100)
    """The most passages in one request. A longer list is graded in parts, and ranked in windows of this size."""
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


class RankedListsConfig(ListsConfig):
    """How several passages of a query are shown at once to be ranked."""

    step: int = Field(default=10, ge=1)
    """How far a window moves towards the top of the list."""

    @model_validator(mode="after")
    def _check_step(self) -> RankedListsConfig:
        if self.step >= max(2, self.size):
            raise ValueError(f"step is {self.step} and size {self.size}: windows must overlap, so set a smaller step")
        return self


class ListTeacherConfig(_ShippedTeacher):
    """Teachers that read several passages of a query at once and answer in words, without log-probabilities."""

    needs = frozenset({"endpoint"})

    prompt: str = "standard"
    """Name of a prompt set shipped with d2llm, or the path of a TOML file."""


class RecordedConfig(Section):
    """Recorded grades, which a graded teacher repeats instead of asking its endpoint (docs/remote-teacher.md)."""

    lists: InputPath
    """A file of graded lists, or a folder with one for each data set, NAME.jsonl."""
    data: tuple[str, ...] = ()
    """Folders of the data sets that the lists' ids are of. In a recipe, its own data sets by default."""
    unlisted: float | None = Field(default=None, ge=0, le=100)
    """The grade of a passage that the list of its query does not have. By default, the pair is undecided."""


class GradedTeacherConfig(ListTeacherConfig, kind="graded"):
    """Any OpenAI-compatible endpoint: it grades the passages of a query."""

    measured = (
        "two readings by a large language model correlate by .97 to .996; nDCG@10 of their mean .79 to .96 on "
        "six sets, .40 on nfcorpus ([100 dev lists each](log/2026-11.md#2026-11-27-grades-of-a-large-language-"
        "model))"
    )

    remote: ListEndpointConfig | None = None
    """Needed unless its grades were recorded."""
    lists: ListsConfig = ListsConfig()
    recorded: RecordedConfig | None = None

    @property
    def teacher_class(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Its class in ``models.teachers``: "module:Class"."""
        return "lists:GradedTeacher" if self.recorded is None else "recorded:RecordedTeacher"

    @property
    def endpoint(self) -> CompletionConfig | None:
        """Its endpoint."""
        return self.remote

    @property
    def scores_only_recorded(self) -> bool:
        """Whether its grades were recorded, and passages that a list does not have get none."""
        return self.recorded is not None and self.recorded.unlisted is None


class ListwiseTeacherConfig(ListTeacherConfig, kind="listwise"):
    """Any OpenAI-compatible endpoint: it ranks the passages of a query."""

    measured = "not measured: what is recorded of a large language model are grades"
    paper = "Sun et al., EMNLP 2023 (Is ChatGPT Good at Search?)"
    teacher_class = "lists:ListwiseTeacher"
    ranks_lists = True
    remote: ListEndpointConfig
    lists: RankedListsConfig = RankedListsConfig()

    @property
    def endpoint(self) -> CompletionConfig:
        """Its endpoint."""
        return self.remote


# Likelihoods, vectors, and several teachers ---------------------------------------------------------------------------


class LikelihoodTeacherConfig(_ShippedTeacher, kind="likelihood"):
    """A language model, tuned as a writer or not: how likely it is to write the query for the passage."""

    paper = "Sachan et al., EMNLP 2022, arXiv 2204.07496 (UPR)"
    costs = "a language model on this machine"
    measured = "only `fused` with grades ([log](log/2026-11.md#2026-11-30-positives-that-a-teacher-chooses-gecko))"
    teacher_class = "likelihood:LikelihoodTeacher"
    ranks_lists = True
    max_passage_tokens: int = Field(default=400, ge=16)
    """Maximum length of a passage; its end is cut off to fit. A writer that was tuned has its own."""


class CosineTeacherConfig(_ShippedTeacher, kind="cosine"):
    """A student, or a bi-encoder: the score of two vectors."""

    measured = "not measured: it is as good as its student"
    teacher_class = "cosine:CosineTeacher"


class EnsembleTeacherConfig(_ShippedTeacher, kind="ensemble"):
    """Several teachers, calibrated as one (``d2llm ensemble``)."""

    needs = frozenset({"several_teachers"})
    measured = (
        "a cross-encoder with the tuned cosine is level or above both on five sets of seven ([47 to 60 dev "
        "queries each](log/2026-11.md#2026-11-20-a-cross-encoder-of-the-students-own-size-as-a-teacher-and-"
        "stacked-with-the-cosine))"
    )
    teacher_class = "ensemble:EnsembleTeacher"

    @property
    def may_have_features(self) -> bool:
        """Those of its first member that has any."""
        return True

    @property
    def members(self) -> Sequence[TeacherConfig]:
        """The teachers of the ensemble in the folder ``model``, and of ensembles among them."""
        ensemble: Sequence[TeacherConfig] = import_module("d2llm.models.teachers.ensemble").ensemble_members(self)
        return [single for member in ensemble for single in member.members]


class FusedTeacherConfig(_ShippedTeacher, kind="fused"):
    """Several teachers: each ranks a query's passages, and the rankings are fused by reciprocal ranks (Gecko)."""

    paper = "Lee et al. 2024, arXiv 2403.20327 (Gecko); Cormack et al., SIGIR 2009"
    needs = frozenset({"several_teachers"})
    measured = (
        "likelihood by smollm2 and grades find another passage best than the one written for: 24 of 80 queries on "
        "covidqa, 5 on medquad ([log](log/2026-11.md#2026-11-30-positives-that-a-teacher-chooses-gecko))"
    )
    teacher_class = "ensemble:FusedTeacher"
    ranks_lists = True
    model: str = "fused"
    """Its name in messages."""
    teachers: tuple[TeacherConfig, ...] = Field(min_length=1)
    """Those that rank, as in ``[teacher]``: Gecko's are one of kind ``likelihood`` and one that judges relevance."""

    @property
    def may_have_features(self) -> bool:
        """Those of its first member that has any."""
        return any(teacher.may_have_features for teacher in self.teachers)

    @property
    def members(self) -> Sequence[TeacherConfig]:
        """All that score."""
        return [single for teacher in self.teachers for single in teacher.members]

    @property
    def num_gpus(self) -> int:
        """As many as the largest needs: they score one after the other."""
        return max(teacher.num_gpus for teacher in self.teachers)

"""A recipe: everything that shapes a run, in sections; and how it is read from TOML.

An unknown key is an error that suggests the closest known key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import Field, ValidationError, field_validator, model_validator

from d2llm.core.errors import RecipeError
from d2llm.core.inputs import path_of
from d2llm.core.names import did_you_mean
from d2llm.core.problems import describe_errors
from d2llm.core.shipped import shipped_recipes
from d2llm.core.toml import parse_toml, read_toml
from d2llm.recipe.data import DataConfig, LabellingConfig, MiningConfig
from d2llm.recipe.losses import RECOMMENDED, Objective
from d2llm.recipe.sections import Section, SectionOfKind
from d2llm.recipe.student import StudentConfig, shaping_student_settings
from d2llm.recipe.teacher import AutoTeacherConfig, TeacherConfig, VllmTeacherConfig
from d2llm.recipe.training import GateConfig, ScoreFeaturesConfig, TeacherTuningConfig, TrainingConfig
from d2llm.recipe.writer import WriterConfig

_Kind = TypeVar("_Kind", bound=SectionOfKind)
_NOT_SET = "not set"
_NOT_SHAPING = {
    *("trackers", "checkpoint_every", "checkpoint_minutes", "max_minutes"),
    *("gradient_caching", "gradient_checkpointing", "graph_gib"),
    "tokens",  # made at the end, from the finished student
}


class Recipe(Section):
    """All settings of one run: data sets, student, teacher, losses, training. ``load_recipe`` reads it from TOML.

    Example:
        >>> from d2llm import Recipe
        >>> Recipe(name="mine", seed=1)
        Recipe(name='mine', seed=1)
    """

    name: str = "unnamed"
    seed: int = Field(default=0, ge=0, le=10**18)
    student: StudentConfig = Field(default_factory=StudentConfig)
    teacher: TeacherConfig = AutoTeacherConfig()
    teacher_tuning: TeacherTuningConfig = TeacherTuningConfig()
    data: tuple[DataConfig, ...] = ()
    mining: MiningConfig = MiningConfig()
    gate: GateConfig = GateConfig()
    labelling: LabellingConfig = LabellingConfig()
    losses: Objective = Field(default_factory=lambda: Objective.model_validate(RECOMMENDED))
    training: TrainingConfig = TrainingConfig()
    score_features: ScoreFeaturesConfig = ScoreFeaturesConfig()

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        """It names the run's folder below ``runs``, and recipes are passed on: it must not lead elsewhere."""
        if not value.isprintable() or set(value) & {"/", "\\"} or value in ("", ".", ".."):
            raise ValueError("must be the name of a folder, without / and \\")
        return value

    @model_validator(mode="after")
    def _check_tuning(self) -> Recipe:
        tuning = self.teacher_tuning
        quantization = tuning.base_quantization(self.teacher)
        if tuning.epochs and tuning.tuning == "full" and quantization != "none":
            raise ValueError(
                f"teacher.quantization is {quantization}, and quantised weights cannot be trained: set "
                'teacher_tuning.tuning = "lora" or teacher_tuning.quantization = "none"'
            )
        return self

    @model_validator(mode="after")
    def _check_teacher(self) -> Recipe:
        self.teacher.check(self)
        return self

    @model_validator(mode="after")
    def _check_tokens(self) -> Recipe:
        if not self.student.backbone.reads_tokens and self.score_features.maxsim:
            raise ValueError(
                f"score_features.maxsim needs the states of tokens, and a {self.student.backbone.kind} backbone gives "
                "one vector for each text: set maxsim to false (bm25 and window_vectors can be used)"
            )
        if self.score_features.in_training and any(one.instruction is not None for one in self.data):
            raise ValueError(
                "data.instruction has tokens that a search compares with none, but score_features.in_training compares "
                "all: delete one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Recipe:
        if not self.student.backbone.has_two_adapters:
            return self
        if self.data and all(data_set.task == "symmetric" for data_set in self.data):
            raise ValueError(
                'student.backbone.tuning.adapters is "two", but in every data set the two texts of a pair have '
                "the same role: delete adapters, or add an asymmetric set"
            )
        if self.training.pretraining:
            raise ValueError(
                "training.pretraining trains one backbone for all texts, but "
                'student.backbone.tuning.adapters is "two": '
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
        if head != "dot":
            raise ValueError(
                f'training.dual_head needs an inner product, and student.interaction.head is "{head}": '
                'set it to "dot", or dual_head to false'
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
        stages, backbone = self.training.pretraining, self.student.backbone
        if not stages:
            return self
        if backbone.tuning.kind == "frozen":
            raise ValueError(
                "training.pretraining trains the backbone, but student.backbone.tuning is frozen: set it to lora or "
                "full, or delete pretraining"
            )
        for stage in stages:
            stage.check(self)
        return self

    @model_validator(mode="after")
    def _check_losses(self) -> Recipe:
        if not self.losses.root:
            raise ValueError(
                "losses has none with a weight above 0, so nothing would be trained: name one, or delete it"
            )
        for loss in self.losses.root.values():
            loss.check(self)
        return self

    @property
    def tunes_teacher(self) -> bool:
        """Whether a run tunes its teacher on the plans, if there is something to imitate."""
        return self.teacher_tuning.epochs > 0 and self.teacher.can_be_tuned

    @property
    def filters_with_tuned_teacher(self) -> bool:
        """Whether a run mines twice: first without the teacher margin, then with it and the tuned teacher."""
        return self.mining.teacher_margin is not None and self.losses.imitates and self.tunes_teacher


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Read a TOML recipe from a file, or one shipped with d2llm by its name.

    Relative data paths are resolved against the current directory.

    Raises:
        RecipeError: the file is missing, is not TOML, or has an unknown key (the closest one is suggested) or a bad
            value.

    Example:
        >>> from d2llm import load_recipe
        >>> load_recipe("d2llm-small").name
        'd2llm-small'
    """
    path = _find_recipe(path_of(path_or_name, "path_or_name"))
    return parse_recipe(read_toml(path, RecipeError), where=str(path))


def load_recipe_text(text: str, *, where: str) -> Recipe:
    """Read the text of a TOML recipe; ``where`` names its origin in errors.

    Raises:
        RecipeError: as ``load_recipe``.
    """
    return parse_recipe(parse_toml(text, where=where, error=RecipeError), where=where)


def named_teacher(text: str, like: TeacherConfig | None = None, *, prompt: str | None = None) -> TeacherConfig:
    """The teacher that a text names: ``MODEL``, ``KIND:MODEL``, or a TOML file with the settings of [teacher].

    Args:
        text: what the user gave.
        like: the settings of a teacher that is named without a file.
        prompt: its prompt, in place of that of ``like`` or the file.

    Raises:
        RecipeError: the file is missing, is not TOML, or has an unknown key or a bad value, or such a teacher has no
            prompt.
    """
    teacher = named_section(text, "teacher", TeacherConfig, (like or TeacherConfig()).named)
    if prompt is None:
        return teacher
    if "prompt" not in type(teacher).model_fields:
        raise RecipeError(f"the teacher '{text}' is of kind {teacher.kind}, which has no prompt; leave it out")
    return teacher.model_copy(update={"prompt": prompt})


def named_writer(text: str) -> WriterConfig:
    """The writer that a text names: ``MODEL``, ``KIND:MODEL``, or a TOML file with the settings of [writer].

    Raises:
        RecipeError: as ``named_teacher``.
    """

    def named(text: str) -> WriterConfig:
        kind, model = WriterConfig.split_kind(text)
        return WriterConfig.model_validate({"kind": kind, "model": model})

    return named_section(text, "writer", WriterConfig, named)


def named_section(text: str, section: str, base: type[_Kind], named: Callable[[str], _Kind], **changes: Any) -> _Kind:
    """The section of kinds that a text names: what ``named`` makes of it, or a TOML file, with some ``changes``.

    Raises:
        RecipeError: as ``named_teacher``.
    """
    is_file = text.endswith(".toml") and base.split_kind(text)[1] == text
    try:
        if not is_file:
            return named(text)
        values = read_toml(Path(text), RecipeError)
        return base.model_validate({**values.get(section, values), **changes})
    except ValidationError as error:
        problem = describe_errors(error, base, section)
        if not is_file:
            text, problem = f"the {section} '{text}'", problem.removeprefix(f"{section}: ")
        raise RecipeError(f"{text}: {problem}") from error


def _find_recipe(path_or_name: str | Path) -> Path:
    path, shipped = Path(path_or_name), shipped_recipes()
    if path.name != str(path_or_name) or path.suffix or path.is_file():
        return path
    if path.name not in shipped:
        raise RecipeError(
            f"no recipe '{path}': give the path of a TOML file, or one of the shipped recipes: {', '.join(shipped)}"
            f"{did_you_mean(path.name, shipped)}"
        )
    return shipped[path.name]


def parse_recipe(values: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a Recipe from plain values; ``where`` names their origin in errors.

    Raises:
        RecipeError: there is an unknown key (the closest one is suggested) or a bad value.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {describe_errors(error, Recipe)}") from error


def shaping_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that determine the student, given its plans and labels, as plain JSON.

    Settings of other steps are left out, and so are those that affect only speed or convenience.
    """
    values = recipe.model_dump(
        mode="json",
        include={"seed", "student", "training"},
        exclude={"training": _NOT_SHAPING},
    )
    values["losses"] = recipe.losses.shaping()
    values["student"] = shaping_student_settings(values["student"])
    values["data"] = {
        Path(item.path).name: item.model_dump(mode="json", include={"task", "max_labelled", "instruction"})
        for item in recipe.data
    }
    if recipe.training.remine:
        values["mining"] = recipe.mining.model_dump(mode="json")
    if recipe.score_features.in_training:
        values["score_features"] = recipe.score_features.model_dump(mode="json")
    return values


def tuning_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe that determine a tuned teacher, given its plans, as plain JSON.

    Settings for scoring are left out, and so are those that affect only speed, memory or convenience.
    """
    teacher, tuning = recipe.teacher, recipe.teacher_tuning
    # A teacher that vLLM runs is tuned as any other.
    tuned = teacher.as_kind("auto") if isinstance(teacher, VllmTeacherConfig) else teacher
    scoring = {"ensemble_with_cosine", "remote", "lists", "recorded", "dtype", "device_map", "quantization"}
    values = tuning.model_dump(
        mode="json", exclude={"checkpoint_minutes", "graph_gib", "gradient_checkpointing", "quantization"}
    )
    values["quantization"] = tuning.base_quantization(teacher)
    return {"teacher": tuned.model_dump(mode="json", exclude=scoring), "teacher_tuning": values, "seed": recipe.seed}


def changed_recipe(
    before: Mapping[str, Any], after: Mapping[str, Any], shaping: Callable[[Recipe], dict[str, Any]] = shaping_settings
) -> list[str]:
    """The differences between two recipes, both plain JSON, in what ``shaping`` takes of them (``changed_settings``).

    Both are read with today's schema, so a setting that the writer of one did not know has its default.
    """
    try:
        old, new = (parse_recipe(dict(values), where="the recipe") for values in (before, after))
    except RecipeError as error:
        return [f"{error}; another version of d2llm wrote it"]
    return changed_settings(shaping(old), shaping(new))


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences between two mappings of settings, both plain JSON, each as "section.key (was 1, is 2)".

    A key that only one of them has is reported as "section.key (was not set, is 2)"; a whole section, as "is set".
    """
    changes: list[str] = []
    for key in before.keys() | after.keys():
        old, new = before.get(key, _NOT_SET), after.get(key, _NOT_SET)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            sections = cast("Mapping[str, Any]", old), cast("Mapping[str, Any]", new)
            changes += changed_settings(*sections, f"{prefix}{key}.")
        elif old != new:
            was, now = ("set" if isinstance(value, Mapping) else value for value in (old, new))
            changes.append(f"{prefix}{key} (was {was}, is {now})")
    return sorted(changes)

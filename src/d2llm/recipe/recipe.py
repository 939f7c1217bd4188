"""A recipe: everything that shapes a run, in sections. ``recipe.recipe_file`` reads them from TOML."""

from __future__ import annotations

from pydantic import Field, model_validator

from d2llm.recipe.data import DataConfig, LabellingConfig, MiningConfig
from d2llm.recipe.losses import RECOMMENDED, Objective
from d2llm.recipe.sections import Section
from d2llm.recipe.student import StudentConfig
from d2llm.recipe.teacher import AutoTeacherConfig, TeacherConfig
from d2llm.recipe.training import GateConfig, ScoreFeaturesConfig, TeacherTuningConfig, TrainingConfig


class Recipe(Section):
    """All settings of one run: data sets, student, teacher, losses, training. ``load_recipe`` reads it from TOML.

    Example:
        >>> from d2llm import Recipe
        >>> Recipe(name="mine", seed=1)
        Recipe(name='mine', seed=1)
    """

    name: str = "unnamed"
    seed: int = Field(default=0, ge=0)
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

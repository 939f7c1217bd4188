"""Settings of an evaluation: the same in Python and on the command line (``d2llm evaluate``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from d2llm.core.settings import TASK_HELP, TRAINED_TASK, Settings, Shown, setting
from d2llm.core.types import SystemKind, Task

if TYPE_CHECKING:
    from d2llm.models.protocols import SearchStudent

RECALL_DEPTH = 100
_PYTHON_ONLY = Shown(python_only=True)


class EvaluationSettings(Settings):
    """How to measure.

    Example:
        >>> from d2llm import EvaluationSettings
        >>> EvaluationSettings(split="dev")
        EvaluationSettings(split='dev')
    """

    noun: ClassVar[str] = "setting of an evaluation"

    split: str = setting("test", "The split to measure on.")
    task: Task | None = setting(None, TASK_HELP, TRAINED_TASK)
    top_k: int = setting(
        RECALL_DEPTH, "Length of the rankings, at least 100 (Recall@100).", _PYTHON_ONLY, ge=RECALL_DEPTH
    )
    num_candidates: int = setting(
        1_000,
        "Passages that get the student's full score; more than in a search, because recall is measured deeper.",
        ge=1,
    )
    teacher_depth: int = setting(50, "Passages that the teacher reranks, alternately from BM25 and the student.", ge=1)
    teacher_queries: int | None = setting(
        100, "Size of the random sample of queries or pairs for the teacher; 0: all.", ge=0
    )
    latency_queries: int = setting(
        50, "At most this many queries are answered one at a time, to measure latency.", _PYTHON_ONLY, ge=1
    )
    baseline: SystemKind | None = setting(
        None, "Row to compare with.", Shown(default="tuned cosine, else untuned, else BM25")
    )
    seed: int = setting(0, "Seed of samples and of significance tests.", ge=0)
    dtype: str = setting("bfloat16", "How vectors are stored.", _PYTHON_ONLY)
    stored_as: tuple[str, ...] = setting(
        (),
        "Add a row with vectors in fewer bits (int8, int3, binary, ...). May be repeated.",
        Shown(metavar="FORMAT"),
        strict=False,
    )
    exact: bool = setting(False, "Add a row with exact search and its certificate.")
    ann_recall: float | None = setting(
        None,
        "Add a row with an approximate index that finds this fraction of the candidates, for example 0.95.",
        Shown(option="ann", metavar="RECALL"),
        gt=0,
        le=1,
    )
    reranker: str | None = setting(
        None,
        "Add a row with a reranker: KIND, KIND:MODEL, or a TOML file. One that needs a teacher and names none uses the "
        "report's.",
        Shown(metavar="KIND:MODEL"),
    )
    filter: str | None = setting(
        None,
        "Add a row with a search for passages whose metadata match, as in \"year >= 2020 AND language = 'en'\".",
        Shown(metavar="CONDITION"),
    )
    instruction: str | None = setting(
        None, "Add a row with this before each query where its vector is made.", Shown(metavar="TEXT")
    )
    score_parts: bool = setting(
        True,
        "Add rows of the student with weights fitted on this data set, and without each part of its score.",
        _PYTHON_ONLY,
    )

    def settled(self, student: SearchStudent) -> EvaluationSettings:
        """The same settings, with the task that this student is used for."""
        from d2llm.models.protocols import task_for

        return self.replace(task=task_for(student, self.task))

    @property
    def settled_task(self) -> Task:
        """The task, after ``settled``."""
        assert self.task is not None, "no student has settled the task"
        return self.task

    @property
    def shortcuts(self) -> list[str]:
        """The names of the settings that enable rows with other searches."""
        names = ("stored_as", "exact", "ann_recall", "reranker", "filter", "instruction")
        return [name for name in names if getattr(self, name) not in (None, False, ())]

    def check(self) -> None:
        """Check the formats and the reranker.

        Raises:
            InputError: a format is unknown.
            RecipeError: there is no such reranker, or it has wrong settings.
        """
        from d2llm.retrieval.reranker import named_reranker
        from d2llm.store.vector_formats import make_format

        for name in (self.dtype, *self.stored_as):
            make_format(name, 8)
        if self.reranker is not None:
            named_reranker(self.reranker)

"""What a server serves: indexes by name, with their students, or only a student."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from d2llm.core.errors import D2LLMError
from d2llm.core.types import Task, default_task
from d2llm.models.text_scores import Background
from d2llm.models.tokens import TextKind
from d2llm.server.model_service import ModelService, PassageScores, WordWeights
from d2llm.server.response_schemas import ServedIndexResponse
from d2llm.server.served_index import ServedIndex
from d2llm.server.served_version import OpenVersion
from d2llm.server.settings import ServeSettings
from d2llm.server.slow_models import SlowModels
from d2llm.server.student_pool import StudentPool


@dataclass(frozen=True, slots=True)
class Services:
    """The services that a request uses from start to end, even if another index is loaded meanwhile.

    ``index`` is None if only a student is served. ``task`` is the index's, or else what the student was
    trained for.
    """

    settings: ServeSettings
    models: ModelService
    index: ServedIndex | None
    task: Task

    async def score(
        self, queries: Sequence[str], passages: Sequence[str], task: Task | None = None
    ) -> tuple[PassageScores, ModelService]:
        """The scores of passages, as of ``ModelService.score``, and the student; words are weighted by the index.

        Without an index, they are weighted by the background.
        """

        async def score(version: OpenVersion) -> tuple[PassageScores, ModelService]:
            corpus = version.corpus(task or version.view.task)
            return await version.models.score(queries, passages, corpus), version.models

        if self.index is not None:
            return await self.index.work(score)
        corpus = Background(self.models.student, task or self.task)
        return await self.models.score(queries, passages, corpus), self.models

    async def word_weights(self, texts: Sequence[str], kind: TextKind) -> tuple[list[WordWeights], str]:
        """The words of texts, as of ``ModelService.word_weights``, and by which corpus, as in ``score``."""

        async def weigh(version: OpenVersion) -> tuple[list[WordWeights], str]:
            corpus = version.corpus(version.view.task)
            return await version.models.word_weights(texts, kind, corpus), corpus.name

        if self.index is not None:
            return await self.index.work(weigh)
        corpus = Background(self.models.student, self.task)
        return await self.models.word_weights(texts, kind, corpus), corpus.name


@dataclass(frozen=True, slots=True)
class Serving:
    """What a ready server serves: indexes by name, in the order of the settings, or only a student.

    Attributes:
        settings: of the server.
        indexes: the indexes.
        students: the students of the indexes.
        slow: teacher, reranker and writer.
        alone: the student, if there is no index.
        problems: by index, why its new version cannot be read; "" if it can.
    """

    settings: ServeSettings
    indexes: Mapping[str, ServedIndex]
    students: StudentPool
    slow: SlowModels
    alone: ModelService | None = None
    problems: dict[str, str] = field(default_factory=dict[str, str])

    def now(self, name: str | None = None) -> Services:
        """The services of an index for a new request; None: of the first, or of the student alone."""
        if self.alone is not None:
            return Services(self.settings, self.alone, None, default_task(self.alone.student.trained_tasks))
        index = self.indexes[name or next(iter(self.indexes))]
        version = index.version
        return Services(self.settings, version.models, index, version.view.task)

    @property
    def loaded(self) -> tuple[ModelService, ...]:
        """All loaded students."""
        return self.students.students if self.alone is None else (self.alone,)

    @property
    def student(self) -> ModelService | None:
        """The student, or None if there are several."""
        students = {
            services.fingerprint: services for services in (self.now(n).models for n in self.indexes or (None,))
        }
        return students.popitem()[1] if len(students) == 1 else None

    @property
    def problem(self) -> str:
        """What is wrong with new versions, for everybody: names of several indexes are left out if there are keys."""
        problems = {name: problem for name, problem in self.problems.items() if problem}
        if len(self.indexes) == 1 or not problems:
            return "".join(f"a new version cannot be read: {problem}" for problem in problems.values())
        if self.settings.keys_file is not None:
            return f"new versions of {len(problems)} indexes cannot be read; GET /v1/indexes says why"
        return "; ".join(f"{name}: a new version cannot be read: {problem}" for name, problem in problems.items())

    def describe(self, names: Iterable[str]) -> list[ServedIndexResponse]:
        """What is served of these indexes."""
        versions = {name: self.indexes[name].version for name in names}
        return [
            ServedIndexResponse(
                name=name,
                version=version.view.version,
                num_passages=len(version.view),
                task=version.view.task,
                student=version.models.name,
                fingerprint=version.models.fingerprint,
                engine=version.models.student.engine,
                problem=self.problems.get(name, ""),
            )
            for name, version in versions.items()
        ]

    def start(self) -> None:
        """Start answering requests; call it in the event loop."""
        for student in self.loaded:
            student.start()
        self.slow.start()
        for index in self.indexes.values():
            index.start()

    async def stop(self, timeout: float | None = None) -> None:
        """Finish admitted requests, then stop."""
        await asyncio.gather(self.slow.stop(timeout), *(index.stop(timeout) for index in self.indexes.values()))
        await asyncio.gather(*(student.stop(timeout) for student in self.loaded))

    async def reload(self) -> None:
        """Switch each index to its latest version; one that cannot be read does not stop the others.

        Raises:
            D2LLMError: an index cannot be read; its previous version is still served.
        """
        reloads = (index.reload() for index in self.indexes.values())
        results = await asyncio.gather(*reloads, return_exceptions=True)
        if problems := [error for error in results if isinstance(error, BaseException)]:
            raise problems[0] if len(problems) == 1 else D2LLMError("; ".join(map(str, problems)))

"""What teachers behind an API have in common, whatever they ask: identity, and a trial before the work begins."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.types import TASKS, Task
from d2llm.models.remote.kept_answers import using
from d2llm.models.teachers.pair_teacher import InterruptibleTeacher
from d2llm.recipe import TeacherEndpointConfig, TeacherIdentity

_Teacher = TypeVar("_Teacher", bound="EndpointTeacher")


class EndpointTeacher(InterruptibleTeacher):
    """A teacher at a remote endpoint; ``fingerprint`` depends on its model name and declared revision, not its address.

    Raises:
        InputError: there is no address, no such prompt set, or the key's variable is not set.
        ModelNotFoundError: the tokenizer cannot be loaded.
        MissingExtraError: the extra ``remote`` is not installed.
    """

    kind: ClassVar[str]

    def __init__(self, config: Any) -> None:
        self.config = config
        self.remote: Any = self.address(config)
        self._identity = self.identify(config)

    @classmethod
    def load(cls: type[_Teacher], config: Any, *, device: Any = None, dtype: Any = None) -> _Teacher:
        """Create a teacher and send one trial request, so that a wrong address, key or model is reported at once.

        ``device`` and ``dtype`` do not apply to a remote teacher and are ignored.

        Raises:
            ModelNotFoundError: the endpoint has no such model, or the address does not exist.
            ModelError: the endpoint is unreachable, refuses the key or a field of the request, or answers in a form
                that this kind cannot read.
        """
        del device, dtype
        teacher = cls(config)
        with using(None):
            error = teacher.try_out()
        if error is not None:
            raise error
        return teacher

    @classmethod
    def identify(cls, config: Any) -> TeacherIdentity:
        """The identity of ``load(config)``, computed without contacting the endpoint.

        Raises:
            InputError: there is no address, or no such prompt set.
        """
        fingerprint = fingerprint_json([cls.kind, config.model, cls.address(config).revision])
        return TeacherIdentity(fingerprint, {task: fingerprint_json(cls.question(config, task)) for task in TASKS})

    @property
    def fingerprint(self) -> str:
        """Fingerprint of kind, model name and revision."""
        return self._identity.fingerprint

    def prompt_fingerprint(self, task: Task) -> str:
        """Identity of the question and of all settings that affect what is shown, or how its answer is read."""
        return self._identity.prompts[task]

    @classmethod
    def address(cls, config: Any) -> TeacherEndpointConfig:
        """The section ``remote``."""
        return config.remote

    @classmethod
    @abstractmethod
    def question(cls, config: Any, task: Task) -> list[Any]:
        """What identifies the question."""

    @abstractmethod
    def try_out(self) -> BaseException | None:
        """Send a short request; returns its error, if there is one."""

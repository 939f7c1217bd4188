"""Settings that are declared once: fields of a frozen class with help text and bounds.

Python takes the objects. Options of the command line (``cli.options``), bodies of requests and tables in the
documentation are made from the fields, so another setting is another field.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from inspect import Parameter, Signature, cleandoc, signature
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined
from typing_extensions import Self

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_string, shown
from d2llm.core.names import did_you_mean
from d2llm.core.problems import requirement, shown_for
from d2llm.core.short_repr import short_repr

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails


TASK_HELP = "Whether a passage answers a query (asymmetric) or means the same (symmetric)."
STUDENT_HELP = "A student's folder, or the name of a shipped one."
WRITER_HELP = "Language model that writes queries."
DTYPE_HELP = "Number format of the models."
LENIENT_HELP = "Leave out metadata values that do not fit, and count them."


@dataclass(frozen=True, slots=True)
class Shown:
    """How a setting is shown to users of anything but Python.

    Attributes:
        option: its option, if that has another name than the setting.
        metavar: the word for its value on the command line.
        default: its default in words, if the value is not what matters.
        python_only: whether there is no option, and no field in a request.
        parse: reads its option, if values are written in another way there (50M); the second argument is the option.
    """

    option: str | None = None
    metavar: str | None = None
    default: str | None = None
    python_only: bool = False
    parse: Callable[[str, str], Any] | None = None


TRAINED_TASK = Shown(default="what the student was trained for, or else asymmetric")


def setting(default: Any, help: str, shown: Shown | None = None, **bounds: Any) -> Any:  # noqa: A002
    """A field of ``Settings``: its default (... if it must be given), its help text, pydantic's bounds (``ge=1``)."""
    field: FieldInfo = Field(default, description=help, **bounds)
    field.metadata.append(shown or Shown())
    return field


def narrowed(
    kind: type[BaseModel],
    name: str,
    shown: Shown | None = None,
    *,
    note: str = "",
    description: str = "",
    default: Any = PydanticUndefined,
    **bounds: Any,
) -> Any:
    """The field of a class, for another that bounds it further, or shows it in another way.

    ``note`` is added to its help text, in whose place a ``description`` is; ``default`` is in place of its own.
    """
    field, narrower = copy(kind.model_fields[name]), Field(**bounds)
    field.description = description or field.description
    if default is not PydanticUndefined:
        field.default = default
    if note and field.description:
        field.description = f"{field.description.rstrip('.')}; {note}."
    field.metadata = [*([] if shown is None else [shown]), *field.metadata, *narrower.metadata]
    return field


def shown_as(field: FieldInfo) -> Shown:
    """How a field is shown."""
    return next((mark for mark in field.metadata if isinstance(mark, Shown)), Shown())


def is_shown(field: FieldInfo) -> bool:
    """Whether a field says how it is shown."""
    return any(isinstance(mark, Shown) for mark in field.metadata)


def bound(field: FieldInfo, name: str) -> Any:
    """A bound of a field, as in ``bound(field, "ge")``; None if it has none."""
    return next((getattr(mark, name) for mark in field.metadata if hasattr(mark, name)), None)


class Settings(BaseModel):
    """Base class of settings. In Python, a wrong value is an ``InputError``.

    NumPy's numbers are numbers, and one name is a list of one. ``noun`` is what messages call a setting.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    noun: ClassVar[str] = "setting"

    def __init__(self, **values: Any) -> None:
        """Check every value, and their combination.

        Raises:
            InputError: there is no such setting, a value is wrong, or settings contradict each other.
        """
        fields = type(self).model_fields
        for name in values:
            if name not in fields:
                hint = did_you_mean(name, fields) or f"; there are: {', '.join(fields)}"
                raise InputError(f"there is no {self.noun} {name!r}{hint}")
        try:
            super().__init__(**{name: _plain(name, value, fields[name]) for name, value in values.items()})
        except ValidationError as error:
            first = {str(problem["loc"][0]): problem for problem in reversed(error.errors(include_url=False))}
            problems = [_problem(problem, fields[name].description) for name, problem in reversed(first.items())]
            raise InputError("; ".join(problems)) from None
        self.check()

    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess] - bodies of requests are read without it

    def __setattr__(self, name: str, value: object) -> None:
        raise InputError(f"{type(self).__name__} does not change; make another by replace({name}=...)")

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Let ``help`` and completion show the fields, without what is for other interfaces."""
        fields = cls.model_fields
        lines = (f"    {name}: {field.description}" for name, field in fields.items())
        cls.__doc__ = "\n".join([f"{cleandoc(cls.__doc__ or '')}\n\nAttributes:", *lines])
        cls.__signature__ = Signature(
            [
                Parameter(
                    name,
                    Parameter.KEYWORD_ONLY,
                    default=Parameter.empty if field.is_required() else field.get_default(),
                    annotation=field.annotation,
                )
                for name, field in fields.items()
            ]
        )

    __repr__ = __str__ = short_repr

    def check(self) -> None:
        """Check the combination of the settings.

        Raises:
            InputError: settings contradict each other.
        """

    def given(self) -> dict[str, Any]:
        """The settings that were given, without those left at their defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    @classmethod
    def of(cls, settings: Settings | None = None, /, **changes: Any) -> Self:
        """Settings (None: the defaults; or an object with more fields) with single fields changed.

        Raises:
            InputError: these are no such settings, there is no such field, or as for settings that are made.
        """
        if not isinstance(settings, cls | None):
            raise InputError(f"the settings are {shown(settings)}, but must be {cls.__name__}, or given one by one")
        given = () if settings is None else settings.model_fields_set
        values = {name: getattr(settings, name) for name in cls.model_fields if name in given}
        return cls(**{**values, **changes})

    def replace(self, **changes: Any) -> Self:
        """The settings with single fields changed.

        Raises:
            InputError: as for ``of``.
        """
        return type(self).of(self, **changes)


def _plain(name: str, value: Any, field: FieldInfo) -> Any:
    if isinstance(value, str):
        check_string(value, name)
        return (value,) if is_list(field) else value
    return plain_number(value)


def plain_number(value: Any) -> Any:
    """A number of NumPy or another library as one of Python; any other value as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def is_list(field: FieldInfo) -> bool:
    """Whether a field has several values."""
    return any(get_origin(annotation) is tuple for annotation in (field.annotation, *get_args(field.annotation)))


def _problem(problem: ErrorDetails, purpose: str | None) -> str:
    """What is wrong with a value, and what the setting is for."""
    first, *rest = problem["loc"]
    name = f"{first}{''.join(f'[{key}]' for key in rest)}"
    if problem["type"] == "missing":
        return f"{name} is missing. It is for: {purpose}"
    needed = requirement([problem]) or "be left out"
    return f"{name} is {shown_for(problem)}, but must {needed}. It is for: {purpose}"


_Function = TypeVar("_Function", bound=Callable[..., Any])


def shows(*kinds: type[Settings]) -> Callable[[_Function], _Function]:
    """Let ``help`` and completion show every setting of a function that takes them as ``**changes``."""

    def decorate(function: _Function) -> _Function:
        original = signature(function)
        given = [parameter for parameter in original.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
        settings = [parameter for kind in kinds for parameter in signature(kind).parameters.values()]
        cast(Any, function).__signature__ = original.replace(parameters=[*given, *settings])
        return function

    return decorate

"""Arguments and options that several verbs share. Only light imports: ``d2llm --help`` imports this module."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import partial
from inspect import Parameter, Signature, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import typer

from d2llm.cli.session import STANDARD_INPUT, STANDARD_OUTPUT, session_of
from d2llm.core import files
from d2llm.core.errors import InputError
from d2llm.core.settings import (
    DTYPE_HELP,
    STUDENT_HELP,
    TASK_HELP,
    TRAINED_TASK,
    WRITER_HELP,
    Settings,
    bound,
    is_list,
    is_shown,
    shown_as,
)
from d2llm.core.shipped import shipped_recipes
from d2llm.core.types import EngineName, NumberFormat, Task
from d2llm.retrieval.settings import SearchSettings

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from d2llm.recipe import TeacherConfig, WriterConfig
    from d2llm.runners.runner import Runner
    from d2llm.training.run import Run


def known_student(name: str | None) -> str | None:
    """Check an option that names a student, before anything heavy is loaded.

    Raises:
        ModelNotFoundError: there is no such student.
        ModelError: the repository of that name on the Hub is damaged, or could run code.
    """
    if name is not None:
        from d2llm.models.hub import find_student

        find_student(name)
    return name


def known_teacher(name: str | None) -> str | None:
    """Check an option that names a teacher, as ``known_student`` does."""
    if name is not None:
        from d2llm.models.teachers.identity import find_kind

        find_kind(teacher_config(name, None))
    return name


def teacher_config(model: str, prompt: str | None) -> TeacherConfig:
    """The teacher that two options name; ``model`` may be ``KIND:MODEL``, or a TOML file."""
    from d2llm.recipe.recipe import named_teacher

    return named_teacher(model, prompt=prompt)


def recorded_teacher_config(
    teacher: str | None, prompt: str | None, recorded: Path | None, data: Path | None
) -> TeacherConfig | None:
    """The teacher that the options of a verb without a recipe name, with recorded grades or not; None if none does.

    Raises:
        InputError: there is a data set, but nothing recorded with its ids, or the teacher gives no grades.
    """
    from d2llm.models.teachers.pair_teacher import recorded_teacher

    if recorded is not None:
        return recorded_teacher(teacher_config(teacher or "graded:recorded", prompt), recorded, data)
    if data is not None:
        raise InputError("--data is for --recorded FILE, whose lists name texts by their ids; leave it out")
    return None if teacher is None else teacher_config(teacher, prompt)


def parse_assignments(words: list[str], option: str = "--set") -> dict[str, str]:
    """``["max_texts=64"]`` -> ``{"max_texts": "64"}``.

    Raises:
        InputError: a word has no "=", or a field occurs twice.
    """
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise InputError(f"{option} {word}: write {option} NAME=VALUE")
        if name in values:
            raise InputError(f"{option} {name}: given twice; give it once")
        values[name] = value.strip()
    return values


def output_path(context: typer.Context, path: Path | None) -> Path | None:
    """The path of a file that a verb writes; ``-`` is standard output, which then has nothing else.

    Raises:
        InputError: two files go to standard output.
    """
    if path is None:
        return None
    if str(path) == "-":
        path = files.STANDARD_OUTPUT
    if files.descriptor_of(path) == 1:
        session_of(context).take(STANDARD_OUTPUT, str(path))
    return path


def output_file(context: typer.Context, path: Path | None) -> Path | None:
    """``output_path``, checked as ``in_existing_folder`` does."""
    return in_existing_folder(output_path(context, path))


InputPath = TypeVar("InputPath", bound=Path | str | list[Path] | list[str] | None)


def input_path(context: typer.Context, path: InputPath) -> InputPath:
    """The path of a file that a verb reads; a stream is first copied to a temporary file. ``-`` is standard input.

    Raises:
        InputError: it is standard input, and so is another file.
        OSError: the stream cannot be read.
    """
    if path is None:
        return path
    given: list[Path | str] = [*path] if isinstance(path, list) else [path]
    paths = [type(given_path)(_copied(context, given_path)) for given_path in given]
    return cast(InputPath, paths if isinstance(path, list) else paths[0])


def lasting_input_path(path: InputPath) -> InputPath:
    """``input_path`` for what is read again later, which a stream cannot be.

    Raises:
        InputError: it is a stream.
    """
    for argument in path if isinstance(path, list) else [path]:
        if argument is not None and (str(argument) == "-" or files.is_stream(Path(argument))):
            raise InputError(
                f"{argument}: is read again later, and so must be a file or folder; write it to a file first"
            )
    return path


def _copied(context: typer.Context, path: Path | str) -> Path | str:
    source = files.STANDARD_INPUT if str(path) == "-" else Path(path)
    if "://" in str(path) or not files.is_stream(source):
        return path
    session = session_of(context)
    if files.descriptor_of(source) == 0 and sys.stdin.isatty():
        session.say("reading standard input, to its end (Ctrl-D)")
    folder = Path(context.with_resource(TemporaryDirectory(prefix="d2llm-")))
    copy = files.copy_of_stream(source, folder)
    session.take(STANDARD_INPUT if files.descriptor_of(source) == 0 else str(path), str(copy))
    return copy


def in_existing_folder(path: Path | None) -> Path | None:
    """Check before the work begins that a file can be written. Folders are not created, as the path may be mistyped.

    Raises:
        InputError: the folder does not exist or is not writable.
    """
    if path is None or files.is_stream(path):
        return path
    folder = Path(os.path.realpath(path)).parent  # where a link leads
    if not folder.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent} to write it in; make it first, or correct the path")
    if not os.access(folder, os.W_OK):
        raise InputError(
            f"{path}: the folder {path.parent} cannot be written to; give another path, or change its permissions"
        )
    return path


def in_existing_folder_or_run(run: Path, paths: Iterable[Path | None]) -> None:
    """Check files like ``in_existing_folder``, but allow files in ``run``, a folder that the verb creates.

    Raises:
        InputError: the folder of a file is not ``run``, and does not exist or is not writable.
    """
    for path in paths:
        if path is not None and path.parent.resolve() != run.resolve():
            in_existing_folder(path)


student_option = partial(typer.Option, metavar="NAME_OR_FOLDER", callback=known_student)
teacher_option = partial(typer.Option, metavar="MODEL", callback=known_teacher)
StudentOption = Annotated[str, student_option(help=STUDENT_HELP)]
StudentArgument = Annotated[str, typer.Argument(metavar="STUDENT", help=STUDENT_HELP)]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, mps.", show_default="the best available"),
]
DtypeOption = Annotated[
    NumberFormat | None,
    typer.Option(help=DTYPE_HELP, show_default="one that is fast on the device"),
]
EngineOption = Annotated[
    EngineName,
    typer.Option(
        help="Engine that encodes texts: auto picks the fastest installed one that gives the same vectors; int8 ones "
        "are faster but change vectors slightly."
    ),
]
written_option = partial(typer.Option, metavar="PATH", dir_okay=False)
"""Where something is written besides the terminal."""
_JSON_HELP, MARKDOWN_HELP = "Also write the result as JSON; -: to standard output.", "Also write Markdown."
JsonOption = Annotated[Path | None, written_option("--json", callback=output_file, help=_JSON_HELP)]
JsonLinesOption = Annotated[
    Path | None,
    written_option(
        "--jsonl", callback=output_file, help="Also write each result as one line of JSON; -: to standard output."
    ),
]
MarkdownOption = Annotated[Path | None, written_option("--markdown", callback=output_file, help=MARKDOWN_HELP)]
HtmlOption = Annotated[Path | None, written_option("--html", callback=output_file, help="Also write one HTML page.")]
TaskOption = Annotated[
    Task | None,
    typer.Option(help=TASK_HELP, show_default=TRAINED_TASK.default or True),
]
IndexTaskOption = Annotated[
    Task | None,
    typer.Option(
        help=SearchSettings.model_fields["task"].description,
        show_default="the index's",
    ),
]
RecordedDataOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", exists=True, help="With --recorded: the data set whose ids the lists name."),
]
PromptOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Prompt of an untuned teacher: a name or a TOML file.", show_default="paper"),
]
recipe_argument = typer.Argument(
    metavar="RECIPE",
    callback=input_path,
    help=f"A TOML file, or the name of a recipe that comes with d2llm: {', '.join(shipped_recipes())}.",
)
RecipeArgument = Annotated[str, recipe_argument]
AgainOption = Annotated[bool, typer.Option("--again", help="Repeat the step even if it is finished.")]


@dataclass(frozen=True)
class WriterOptions:
    """Options that name a language model that writes, and where it is."""

    writer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=f"{WRITER_HELP} MODEL, KIND:MODEL, or a TOML file with its settings; with --endpoint, the model's "
            "name there.",
            show_default="a small one that runs here",
        ),
    ] = None
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask the writer at this OpenAI-compatible endpoint, up to /v1.")
    ] = None
    api_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the endpoint's key.")
    ] = None

    def config(self, default: str, **remote: Any) -> WriterConfig:
        """The writer, or the local one named ``default``; ``remote`` are further settings of its endpoint.

        Raises:
            InputError: an option is about an endpoint, but there is none, or the endpoint's model is not named.
        """
        from d2llm.recipe import RemoteWriterConfig, WriterEndpointConfig
        from d2llm.recipe.recipe import named_writer

        if self.endpoint is not None:
            if self.writer is None:
                raise InputError("--endpoint needs --writer, the name of a model there")
            section = WriterEndpointConfig(url=self.endpoint, api_key_env=self.api_key_env, **remote)
            return RemoteWriterConfig(model=self.writer, remote=section)
        if self.api_key_env is not None:
            raise InputError("--api-key-env is about an endpoint; give its address with --endpoint")
        return named_writer(self.writer or default)


@dataclass(frozen=True)
class RunnerOptions:
    """Options that say where a verb's work runs."""

    runner: Annotated[
        str,
        typer.Option(
            metavar="RUNNER",
            help="Where the work runs: local, in this process; ray, in workers on this machine; ray:HOST:PORT, on the "
            "nodes of a Ray cluster.",
        ),
    ] = "local"
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Workers on Ray.", show_default="one for each GPU, or each node if there are none"),
    ] = None
    gpus_per_worker: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs for each worker on Ray.", show_default="as many as the model needs"),
    ] = None

    def find(self) -> Runner:
        """The runner.

        Raises:
            InputError: there is none of this name, or workers or their GPUs are given for this process.
            MissingExtraError: Ray is not installed.
        """
        from d2llm.runners.placement import find_runner

        return find_runner(self.runner, num_workers=self.workers, gpus_per_worker=self.gpus_per_worker)


@dataclass(frozen=True)
class RunOptions:
    """Options of every verb that works on a run: its folder, its device, and where the result goes.

    ``--json`` may name a file in the run folder, which need not exist yet; ``open`` checks the path.
    """

    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_FOLDER",
            file_okay=False,
            help="The run's folder: training sets, teacher, labels, student.",
            show_default="runs/<name of the recipe>",
        ),
    ] = None
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="Where a data set of the recipe is on this machine, or the folder that holds all of them by name; may "
            "be given several times.",
        ),
    ] = None
    recorded: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=lasting_input_path,
            help="Take the graded teacher's grades from these lists (JSON Lines, or a folder with NAME.jsonl for "
            "each data set) instead of asking an endpoint.",
        ),
    ] = None
    device: DeviceOption = None
    dtype: DtypeOption = None
    json_path: Annotated[Path | None, written_option("--json", callback=output_path, help=_JSON_HELP)] = None

    def open(self, recipe: str, *, files: Sequence[Path | None] = ()) -> Run:
        """Open the run of a recipe; ``files`` are those that the verb will write besides ``--json``.

        Raises:
            RecipeError: there is no such recipe, or its data sets cannot be told apart.
            InputError: a data set is not on this machine, or the folder of a file does not exist.
        """
        from d2llm.training.run import Run

        run = Run(recipe, self.out, data=self.data or (), recorded=self.recorded, device=self.device, dtype=self.dtype)
        in_existing_folder_or_run(run.folder.path, [self.json_path, *files])
        return run


def with_option_groups(verb: Callable[..., None]) -> Callable[..., None]:
    """Let a verb take its options in groups.

    Typer makes one option of each parameter. With this decorator, a parameter whose type is a dataclass, or a class of
    ``Settings``, becomes one option for each field, and the verb receives the object. Of ``Annotated[dict, CLASS]``,
    the fields that say how they are shown become options, and the verb receives those that were given.
    """
    # Not get_type_hints: where a default is None, that of Python 3.10 hides what a type is annotated with.
    declared = signature(verb, eval_str=True).parameters
    kinds = {name: parameter.annotation for name, parameter in declared.items()}
    groups = {name: kind for name, kind in kinds.items() if is_dataclass(kind) or _model_of(kind) is not None}
    if not groups:
        return verb
    parameters: list[Parameter] = []
    for name, parameter in declared.items():
        if name in groups:
            parameters += _parameters(groups[name])
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @functools.wraps(verb)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            given = {parameter.name: _given(values.pop(parameter.name)) for parameter in _parameters(group)}
            values[name] = _made(group, {name: value for name, value in given.items() if value is not None})
        verb(**values)

    flat = cast(Any, call)
    flat.__signature__ = Signature(parameters)
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _model_of(kind: Any) -> type[BaseModel] | None:
    """The class whose fields are options: settings, or what a dictionary is annotated with."""
    if get_origin(kind) is Annotated and get_origin(get_args(kind)[0]) is dict:
        return get_args(kind)[1]
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _made(group: Any, given: dict[str, Any]) -> Any:
    return given if get_origin(group) is Annotated else group(**given)


def _given(value: Any) -> Any:
    """The value of an option, with plain strings in place of choices."""
    return (
        tuple(member.value for member in value)
        if isinstance(value, list) and value[:1] and isinstance(value[0], Enum)
        else value
    )


def _parameters(group: Any) -> list[Parameter]:
    if (model := _model_of(group)) is not None:
        fields_of = model.model_fields.items()
        options = {name: field for name, field in fields_of if model is group or is_shown(field)}
        return [
            Parameter(name, Parameter.KEYWORD_ONLY, default=_default(field), annotation=_option(name, field))
            for name, field in options.items()
            if not shown_as(field).python_only
        ]
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def _default(field: FieldInfo) -> Any:
    """What Typer shows and passes if an option is not given; it knows no empty lists, and words are no value."""
    if is_list(field) or shown_as(field).default:
        return None
    return Parameter.empty if field.is_required() else field.get_default()


def option_name(name: str, field: FieldInfo) -> str:
    """The option of a setting, as in ``--top-k``."""
    return f"--{shown_as(field).option or name}".replace("_", "-")


def _option(name: str, field: FieldInfo) -> Any:
    """The option of one setting."""
    words, kind = shown_as(field), field.annotation
    if is_list(field):  # Typer knows lists of choices, but not tuples and literals
        (choices,) = (
            get_args(annotation)[0] for annotation in (kind, *get_args(kind)) if get_origin(annotation) is tuple
        )
        named = Enum(name, {choice: choice for choice in get_args(choices)}, type=str) if get_args(choices) else choices
        kind = list[named] | None  # pyright: ignore[reportInvalidTypeForm]
    declared = option_name(name, field)
    option = typer.Option(
        f"{declared}/--no-{declared[2:]}" if field.default is True and "/" not in declared else declared,
        metavar=words.metavar,
        parser=words.parse and partial(_parsed, words.parse, declared),
        callback=input_path if Path in (kind, *get_args(kind)) else None,
        min=None if words.parse else bound(field, "ge"),  # bounds are of the value, not of how it is written
        max=None if words.parse else bound(field, "le"),
        help=field.description,
        show_default=words.default or True,
    )
    return Annotated[kind, option]


def _parsed(parse: Callable[[str, str], Any], option: str, value: Any) -> Any:
    """The value of an option; Typer also asks for that of a default, which is one already."""
    return parse(value, option) if isinstance(value, str) else value

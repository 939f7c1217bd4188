"""The command line ``d2llm``: options of the whole program, the verbs, and what becomes of errors.

Nothing heavy is imported here: each verb imports what it needs when it is called, so that the help is quick.
"""

from __future__ import annotations

import inspect
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from d2llm import __version__
from d2llm.cli import ablate as commands_ablate
from d2llm.cli import cascade as commands_cascade
from d2llm.cli import data as commands_data
from d2llm.cli import doctor as commands_doctor
from d2llm.cli import evaluate as commands_evaluate
from d2llm.cli import export as commands_export
from d2llm.cli import hub as commands_hub
from d2llm.cli import index as commands_index
from d2llm.cli import keys as commands_keys
from d2llm.cli import look as commands_look
from d2llm.cli import project as commands_project
from d2llm.cli import search as commands_search
from d2llm.cli import serve as commands_serve
from d2llm.cli import teach as commands_teach
from d2llm.cli import train as commands_train
from d2llm.cli import upkeep as commands_upkeep
from d2llm.cli.session import Session, start_logging
from d2llm.core.errors import D2LLMError, Terminated

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
"""What a shell reports for a program that was stopped with Ctrl-C, and for one that was asked to end."""
_ANYWHERE = {"--verbose", "-v", "--quiet", "-q"}


class _Program(TyperGroup):
    """Turns errors that d2llm raises on purpose, and of files, into one paragraph and exit code 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        _tidy_help(self)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """``--verbose`` and ``--quiet`` may also follow the verb."""
        end = args.index("--") if "--" in args else len(args)
        early = [word for word in args[:end] if word in _ANYWHERE]
        return super().parse_args(ctx, early + [word for word in args[:end] if word not in _ANYWHERE] + args[end:])

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except D2LLMError as error:
            session = ctx.obj or Session()
            if session.verbose:
                traceback.print_exc()
            session.complain("error", str(error))
            raise typer.Exit(EXIT_BAD_INPUT) from error
        except OSError as error:
            if error.filename is None:  # not of a file of the user's: a fault of ours
                raise
            session = ctx.obj or Session()
            if session.verbose:
                traceback.print_exc()
            session.complain("error", f"{error.filename}: {error.strerror}; check the path, its rights and the disk")
            raise typer.Exit(EXIT_BAD_INPUT) from error
        except KeyboardInterrupt as error:
            session = ctx.obj or Session()
            session.complain("stopped", "type the same command again to go on; finished parts are kept")
            raise typer.Exit(EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED) from error


def _tidy_help(command: Any) -> None:
    """Make the help of a verb, of those below it and of their options read as it is written.

    Rich takes words in square brackets for markup, and typer breaks a paragraph where its source does.
    """
    from rich.markup import escape

    for part in (command, *command.params):
        for field in ("help", "short_help", "epilog"):
            if isinstance(text := getattr(part, field, None), str):
                setattr(part, field, escape(_joined_lines(text)))
    for verb in getattr(command, "commands", {}).values():
        _tidy_help(verb)


def _joined_lines(text: str) -> str:
    """Each paragraph on one line, but for those with indented lines, which are lists or examples."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(p if "\n " in p else p.replace("\n", " ") for p in paragraphs)


app = typer.Typer(
    name="d2llm",
    cls=_Program,
    help="Distil a large language model's judgement into a small, fast search model, and search with it.",
    epilog="Start with: d2llm demo. Then: d2llm index, d2llm search. Each verb explains itself: d2llm VERB --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"d2llm {__version__}")
        raise typer.Exit


@app.callback()
def prepare(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback prints it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more: log messages, libraries' warnings, tracebacks.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors: no bars, no remarks.")] = False,
) -> None:
    """Options of the whole program."""
    context.obj = Session(verbose=verbose, quiet=quiet)
    context.call_on_close(start_logging(context.obj))


for _commands in (
    commands_train,
    commands_teach,
    commands_index,
    commands_upkeep,
    commands_cascade,
    commands_project,
    commands_search,
    commands_serve,
    commands_keys,
    commands_evaluate,
    commands_export,
    commands_ablate,
    commands_data,
    commands_hub,
    commands_look,
    commands_doctor,
):
    _commands.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: ``arguments`` are those of the process by default."""
    app(arguments, prog_name="d2llm")

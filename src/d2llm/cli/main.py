"""The command line ``d2llm``: options of the whole program, the verbs, and how errors are shown.

Nothing heavy is imported here, so that the help is fast: each verb imports what it needs when it is called.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from d2llm import __version__
from d2llm.cli.help import tidy_help
from d2llm.cli.session import GIVEN, Session, start_logging
from d2llm.cli.verbs import all_verbs
from d2llm.cli.word_order import Verbs
from d2llm.core.errors import D2LLMError, Terminated
from d2llm.core.files import TOO_LITTLE
from d2llm.core.memory import out_of_memory
from d2llm.core.problems import requirement
from d2llm.core.progress import showing_progress, work_of

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_BAD_INPUT = 2
_AGAIN = "then run the same command again; finished parts are kept"
_MORE_NEEDED = f"free disk space, or allow more open files (ulimit -n), {_AGAIN}"
_MORE_MEMORY = (
    "end other programs, use a machine or GPU with more memory (`d2llm size` says how much), or lower what is computed "
    "at once (graph_gib and part_tokens of a training, max_tokens of a teacher, batch_tokens of a server), " + _AGAIN
)
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
"""What a shell reports for a program stopped by Ctrl-C, and for one ended by SIGTERM."""
_VERBS = all_verbs()
_SHOW_ANSWERS = {verb.name for verb in _VERBS if verb.shows_answers}
_ENDLESS = {"serve", "mcp"}
_ANYWHERE = {"--verbose", "-v", "--quiet", "-q"}


class _Program(Verbs):
    """Turns d2llm's own errors, file errors and a lack of memory into one paragraph and exit code 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        tidy_help(self)

    def get_params(self, ctx: Any) -> list[Any]:
        """The options; typer adds those of completion late, and says ``<bool>`` behind them."""
        params = super().get_params(ctx)
        for option in params:
            if str(option.name).endswith("_completion"):
                option.metavar = ""
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Also accept ``--verbose`` and ``--quiet`` after the verb."""
        ctx.meta[GIVEN] = tuple(args)
        end = args.index("--") if "--" in args else len(args)
        early = [word for word in args[:end] if word in _ANYWHERE]
        return super().parse_args(ctx, early + [word for word in args[:end] if word not in _ANYWHERE] + args[end:])

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            problems = error.__cause__.errors() if isinstance(error.__cause__, ValidationError) else []
            needed = requirement(problems)
            message = error.message.removeprefix("Value error, ")
            error.message = f"{problems[0]['input']!r} must {needed}" if needed else message
            raise
        except KeyboardInterrupt as error:
            session = ctx.obj or Session()
            session.complain("stopped", "run the same command again to continue; finished parts are kept")
            raise typer.Exit(EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED) from error
        except Exception as error:
            message = _told(error, ctx.invoked_subcommand)
            if message is None:
                raise
            session = ctx.obj or Session()
            if session.verbose:
                traceback.print_exc()
            session.complain("error", message)
            raise typer.Exit(EXIT_BAD_INPUT) from error


def _told(error: Exception, verb: str | None) -> str | None:
    """What one line says of an error; None if it is a bug, which needs its traceback."""
    if (ran_out := out_of_memory(error)) is not None:
        work = work_of(error)
        return f"{verb}{work and f', {work}'}: {ran_out}; {_MORE_MEMORY}"
    if isinstance(error, D2LLMError):
        return str(error)
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in TOO_LITTLE):
        return None  # the second is not about a file of the user
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    advice = _MORE_NEEDED if error.errno in TOO_LITTLE else "check the path, its permissions and the disk"
    return f"{where}{error.strerror}; {advice}"


app = typer.Typer(
    name="d2llm",
    cls=_Program,
    help="Distil a large language model's judgement into a small, fast search model, and search with it.",
    epilog="Start with: d2llm demo. Then: d2llm index, d2llm search. For help on a verb: d2llm VERB --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"d2llm {__version__}")
        raise typer.Exit


@app.callback()
def prepare(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback prints it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show more: log messages, warnings of libraries, tracebacks.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show only results and errors, no progress bars or remarks.")
    ] = False,
) -> None:
    """Options of the whole program."""
    context.obj = Session(verbose=verbose, quiet=quiet, given=context.meta[GIVEN])
    context.call_on_close(start_logging(context.obj, repeats=context.invoked_subcommand in _ENDLESS))
    context.with_resource(showing_progress(False if quiet else None))
    if context.invoked_subcommand in _SHOW_ANSWERS:
        from d2llm.models.remote.kept_answers import KeptAnswers

        context.with_resource(KeptAnswers.of_command().used())


for _verb in _VERBS:
    if isinstance(_verb.command, typer.Typer):
        app.add_typer(_verb.command, rich_help_panel=_verb.heading)
    else:
        app.command(_verb.name, rich_help_panel=_verb.heading)(_verb.command)


def _end_quickly() -> None:
    """Keep Python from looking for garbage in all of torch before it ends, which takes seconds.

    triton, which comes with torch for GPUs, prints all that is not collected then as leaks.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; ``arguments`` default to those of the process."""
    atexit.unregister(_end_quickly)  # once, however often this is called
    atexit.register(_end_quickly)
    app(arguments, prog_name="d2llm")

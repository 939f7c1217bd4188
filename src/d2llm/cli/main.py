"""The command line ``d2llm``: options of the whole program, the verbs, and how errors are shown.

Nothing heavy is imported here, so that the help is fast: each verb imports what it needs when it is called.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2llm import __version__
from d2llm.cli.ablate import ablate
from d2llm.cli.data import data_app
from d2llm.cli.demo import demo
from d2llm.cli.distill_static import distill_static
from d2llm.cli.doctor import doctor
from d2llm.cli.encode import encode
from d2llm.cli.evaluate import evaluate
from d2llm.cli.export import export
from d2llm.cli.fit import fit
from d2llm.cli.fit_scores import fit_scores
from d2llm.cli.fit_tokens import fit_tokens
from d2llm.cli.help import tidy_help
from d2llm.cli.index import index_app
from d2llm.cli.init import init
from d2llm.cli.judge import judge
from d2llm.cli.keys import keys_app
from d2llm.cli.labels import labels_app
from d2llm.cli.leaderboard import leaderboard
from d2llm.cli.methods import methods
from d2llm.cli.probe import probe
from d2llm.cli.push import push
from d2llm.cli.recipe import recipe_app
from d2llm.cli.run import distill, gate, label, mine, run, stack, tune_teacher
from d2llm.cli.search import search
from d2llm.cli.serve import serve
from d2llm.cli.session import Session, start_logging
from d2llm.cli.shard import shard
from d2llm.cli.size import size
from d2llm.cli.tune_reader import tune_reader
from d2llm.cli.word_order import Verbs
from d2llm.core.errors import D2LLMError, Terminated
from d2llm.core.progress import showing_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
"""What a shell reports for a program stopped by Ctrl-C, and for one ended by SIGTERM."""
_STORE_NO_ANSWERS = {"judge", "search", "index"}
"""Verbs that ask a model behind an API and show what it answers, or a sum of it."""
_ANYWHERE = {"--verbose", "-v", "--quiet", "-q"}


class _Program(Verbs):
    """Turns d2llm's own errors and file errors into one paragraph and exit code 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        tidy_help(self)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Also accept ``--verbose`` and ``--quiet`` after the verb."""
        end = args.index("--") if "--" in args else len(args)
        early = [word for word in args[:end] if word in _ANYWHERE]
        return super().parse_args(ctx, early + [word for word in args[:end] if word not in _ANYWHERE] + args[end:])

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except D2LLMError as error:
            self._fail(ctx, str(error))
            raise typer.Exit(EXIT_BAD_INPUT) from error
        except OSError as error:
            if error.filename is None:  # not about a file of the user, so a bug
                raise
            self._fail(ctx, f"{error.filename}: {error.strerror}; check the path, its permissions and the disk")
            raise typer.Exit(EXIT_BAD_INPUT) from error
        except KeyboardInterrupt as error:
            session = ctx.obj or Session()
            session.complain("stopped", "run the same command again to continue; finished parts are kept")
            raise typer.Exit(EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED) from error

    @staticmethod
    def _fail(ctx: Any, message: str) -> None:
        session = ctx.obj or Session()
        if session.verbose:
            traceback.print_exc()
        session.complain("error", message)


app = typer.Typer(
    name="d2llm",
    cls=_Program,
    help="Distil a large language model's judgement into a small, fast search model, and search with it.",
    epilog="Start with: d2llm demo. Then: d2llm index, d2llm search. For help on a verb: d2llm VERB --help",
    no_args_is_help=True,
    add_completion=False,
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
    context.obj = Session(verbose=verbose, quiet=quiet)
    context.call_on_close(start_logging(context.obj))
    context.with_resource(showing_progress(False if quiet else None))
    if context.invoked_subcommand in _STORE_NO_ANSWERS:
        from d2llm.models.remote.kept_answers import KeptAnswers

        context.with_resource(KeptAnswers.of_command().used())


_VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    "Distil": (
        fit,
        init,
        run,
        mine,
        tune_teacher,
        gate,
        label,
        distill,
        stack,
        distill_static,
        fit_tokens,
        fit_scores,
        tune_reader,
        push,
        methods,
    ),
    "Search": (encode, search, shard),
    "Serve": (serve,),
    "Measure": (evaluate, leaderboard, probe, ablate),
    "Tools": (export, demo, judge, size, doctor),
}
_GROUPS = {
    "Distil": (labels_app, recipe_app),
    "Search": (index_app,),
    "Serve": (keys_app,),
    "Measure": (data_app,),
}

for _heading, _verbs in _VERBS.items():
    for _verb in _verbs:
        app.command(_verb.__name__.replace("_", "-"), rich_help_panel=_heading)(_verb)
for _heading, _groups in _GROUPS.items():
    for _group in _groups:
        app.add_typer(_group, rich_help_panel=_heading)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; ``arguments`` default to those of the process."""
    app(arguments, prog_name="d2llm")

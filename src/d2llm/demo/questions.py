"""The demo's questions, and the documentation that answers them.

The questions and the right ids were written down from knowledge of the standard library before any system had ranked
them, and are not adapted to the results.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question and the ids of the passages that answer it; not every Python version has all of them."""

    text: str
    right_ids: frozenset[str]


QUESTIONS = (
    DemoQuestion(
        "How do I run a function every few seconds in the background?",
        frozenset(
            {"threading.Timer", "sched", "sched.scheduler.enter", "asyncio.base_events.BaseEventLoop.call_later"}
        ),
    ),
    DemoQuestion(
        "How can I find all files matching a pattern in a folder and in all folders below it?",
        frozenset({"pathlib.Path.rglob", "pathlib.Path.glob", "glob.glob", "glob.iglob"}),
    ),
    DemoQuestion(
        "How do I merge two dictionaries so that the second one wins?",
        frozenset({"dict.update", "collections.abc.MutableMapping.update"}),
    ),
    DemoQuestion(
        "Somebody made a typo: which of my known words did they mean?",
        frozenset({"difflib.get_close_matches"}),
    ),
    DemoQuestion(
        "How can I remember the results of a slow function so that they are not computed twice?",
        frozenset({"functools.lru_cache", "functools.cache"}),
    ),
    DemoQuestion(
        "How do I copy a nested list so that changes to the copy leave the original alone?",
        frozenset({"copy", "copy.deepcopy"}),
    ),
    DemoQuestion(
        "How do I get a folder that is deleted by itself when I am done with it?",
        frozenset({"tempfile.TemporaryDirectory"}),
    ),
    DemoQuestion(
        "How do I ask for a password without showing it on the screen?",
        frozenset({"getpass", "getpass.getpass", "getpass.unix_getpass", "getpass.win_getpass"}),
    ),
)

JUDGED = 1
"""Position of the question that the teacher judges."""


def without_piece(passage_id: str) -> str:
    """The id of the first piece of a long docstring: "copy" for "copy#2"."""
    return passage_id.partition("#")[0]

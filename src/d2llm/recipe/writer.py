"""Writers of queries: each kind is a section with settings of its own, which loads what it names.

A package adds its own kind by an entry point in the group ``d2llm.writers``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from d2llm.core.registry import Registry
from d2llm.recipe.sections import CompletionConfig, SectionOfKind

if TYPE_CHECKING:
    from d2llm.models.writers.writer import Writer


class WriterEndpointConfig(CompletionConfig):
    """The endpoint of a remote writer (docs/writers.md)."""

    api: Literal["completions", "chat"] = "chat"
    timeout_seconds: float = Field(default=300.0, gt=0)
    """Time limit of one request; a whole answer takes longer than one token."""


class WriterConfig(SectionOfKind):
    """The language model that writes queries for passages, or expands or rewrites the queries of a search.

    Example::

        class Titles(WriterConfig, kind="titles"):
            \"\"\"Writes the title of a passage.\"\"\"

            def load(self, *, device=None, dtype=None):
                return TitleWriter()  # a models.writers.writer.Writer

        load_writer(WriterConfig(kind="titles"))
    """

    kinds = Registry["WriterConfig"](
        "kind of writer", dict.fromkeys(("local", "remote"), "d2llm.recipe.writer"), "d2llm.writers"
    )
    default_kind = "local"

    model: str = "smollm2"
    """Local folder (also of a tuned writer), Hub name, GGUF file, or ``smollm2``; for a remote writer, the model's name
    at the endpoint."""

    def load(self, *, device: str | None = None, dtype: str | None = None) -> Writer:
        """Load the writer (``load_writer``); a kind defines it."""
        raise NotImplementedError

    def cost(self, num_prompt_tokens: int, num_written_tokens: int) -> float | None:
        """What so many tokens cost, in the currency of its prices; None if it has none."""
        return None


class _LanguageModel(WriterConfig):
    """What language models have in common, wherever they run."""

    prompt: str
    max_passage_tokens: int = Field(default=400, ge=16)
    """Maximum length of title and passage together; the end of the passage is cut off to fit."""
    max_new_tokens: int = Field(default=48, ge=4)
    """Maximum length of one query; an answer with several queries may be that many times as long, and a passage that
    answers a query, or a query that is rewritten, three times."""
    temperature: float | None = Field(default=None, ge=0)
    """0: always the likeliest token. By default 0.8, but 0 to rewrite a query of a conversation, and for a local model
    that was not tuned to write: little of what it draws fits the passage."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Choose among the likeliest tokens that together have this probability."""


class LocalWriterConfig(_LanguageModel, kind="local"):
    """A causal language model in this process, which may have been tuned to write."""

    measured = (
        "SmolLM2-135M tuned on 2,546 queries: loss on 227 dev queries 2.58 to 1.72 nats a token ([one "
        "run](log/2026-11.md#2026-11-23-a-tuned-writer))"
    )

    prompt: str = "short"
    """Name of a prompt set shipped with d2llm, or the path of a TOML file (see ``models.writers.prompts``); small
    models need ``short``. A tuned writer has a format of its own and ignores it."""

    def load(self, *, device: Any = None, dtype: Any = None) -> Writer:
        """Load it on a device, by default the fastest, in a number format, by default the fastest there."""
        return import_module("d2llm.models.writers.local").LocalWriter.load(self, device=device, dtype=dtype)


class RemoteWriterConfig(_LanguageModel, kind="remote"):
    """A language model behind an OpenAI-compatible endpoint."""

    needs = frozenset({"endpoint"})
    measured = (
        "a fit on what a large language model wrote: covidqa +.027, squad +.004, stackfaq -.015 against the "
        "fitted sum ([one run each](log/2026-11.md#2026-11-23-what-a-fit-is-worth-on-real-queries-with-a-strong-"
        "writer))"
    )

    prompt: str = "standard"
    """Name of a prompt set shipped with d2llm, or the path of a TOML file (see ``models.writers.prompts``)."""
    remote: WriterEndpointConfig

    def load(self, *, device: Any = None, dtype: Any = None) -> Writer:
        """Load it, and test it with one short request; ``device`` and ``dtype`` do not apply."""
        del device, dtype
        return import_module("d2llm.models.writers.remote").RemoteWriter.load(self)

    def cost(self, num_prompt_tokens: int, num_written_tokens: int) -> float | None:
        """By the prices of the endpoint."""
        return self.remote.cost(num_prompt_tokens, num_written_tokens)

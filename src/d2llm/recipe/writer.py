"""The settings of writers of queries."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from d2llm.recipe.sections import CompletionConfig, Section


class RemoteWriterConfig(CompletionConfig):
    """The endpoint of a remote writer (docs/writers.md)."""

    api: Literal["completions", "chat"] = "chat"
    timeout_seconds: float = Field(default=300.0, gt=0)
    """Time limit of one request; a whole answer takes longer than one token."""


class WriterConfig(Section):
    """The LLM that writes queries for passages, or expands the queries of a search."""

    model: str = "smollm2"
    """Local folder (also of a tuned writer), Hub name, GGUF file, or ``smollm2``; for a remote writer, the model's name
    at the endpoint."""
    kind: Literal["local", "remote"] = "local"
    prompt: str | None = None
    """Name of a prompt set shipped with d2llm, or the path of a TOML file (see ``models.writers.prompts``). By default
    ``standard`` for a remote writer, and for a local one ``short``, which small models need. A tuned writer has a
    format of its own and ignores it."""
    max_passage_tokens: int = Field(default=400, ge=16)
    """Maximum length of title and passage together; the end of the passage is cut off to fit."""
    max_new_tokens: int = Field(default=48, ge=4)
    """Maximum length of one query; an answer with several queries may be that many times as long, and a passage that
    answers a query three times."""
    temperature: float | None = Field(default=None, ge=0)
    """0: always the likeliest token. By default 0.8, but 0 for a local model that was not tuned to write: little of
    what it draws fits the passage."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Choose among the likeliest tokens that together have this probability."""
    remote: RemoteWriterConfig | None = None

    @property
    def prompt_set(self) -> str:
        """``prompt``, or the default of this kind of writer."""
        return self.prompt or ("standard" if self.kind == "remote" else "short")

"""Interfaces of other services, so that their clients work unchanged.

Each module has a ``router``, and a ``shape`` for the errors of its ``PATHS``, and documents what it leaves out.
"""

from __future__ import annotations

from d2llm.server.dialects import cohere, jina, openai, tei, vllm

DIALECTS = (openai, cohere, jina, tei, vllm)

"""Other services' interfaces, so that their clients need not change.

Each module has a ``router``, the ``PATHS`` whose errors have its ``shape``, and says what it leaves out.
"""

from __future__ import annotations

from d2llm.server.dialects import cohere, jina, openai, tei, vllm

DIALECTS = (openai, cohere, jina, tei, vllm)

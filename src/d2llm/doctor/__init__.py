"""The verb ``doctor``: can d2llm work here, and what to do where it cannot."""

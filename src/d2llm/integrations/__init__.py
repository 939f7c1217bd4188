"""d2llm inside other libraries' interfaces; each module needs the extra of its name (``texts`` is what they share)."""

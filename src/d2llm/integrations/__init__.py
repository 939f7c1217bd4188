"""Adapters of d2llm to other libraries; each module needs the extra of its name (``texts`` has their shared code)."""

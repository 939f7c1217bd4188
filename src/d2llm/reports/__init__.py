"""Results as tables for a terminal, as Markdown and as HTML."""

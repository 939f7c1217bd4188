"""Reports of results: tables for a terminal, Markdown and HTML."""

"""The command line ``d2llm``. Nothing imports this package."""

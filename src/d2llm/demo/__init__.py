"""The demo: D2LLM on texts that every user has, in a few minutes."""

"""The demo: D2LLM on texts that every reader has, in a few minutes."""

"""The verb ``doctor``: checks whether d2llm can work on this machine, and says what to do if it cannot."""

"""Plain frozen types, the exception tree, recipe models and fingerprints. Standard library and pydantic only."""

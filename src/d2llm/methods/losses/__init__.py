"""Losses. A file is imported when a recipe names its kind (``recipe.losses.LOSSES``)."""

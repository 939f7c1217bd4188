"""Measures how much each part of a recipe contributes, by training without it, over several seeds."""

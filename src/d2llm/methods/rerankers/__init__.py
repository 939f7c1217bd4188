"""Rerankers that others published: second stages of a search."""

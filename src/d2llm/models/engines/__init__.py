"""Faster ways to run a student's backbone than plain torch."""

"""Lexical and vector indexes over passages."""

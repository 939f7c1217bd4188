"""Data sets that are made by a program: what they ask of a scorer is known exactly."""

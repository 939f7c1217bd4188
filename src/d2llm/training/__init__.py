"""Trains a student from a recipe: tune the teacher, ensemble, gate, label, distil, fit."""

"""Trains a student from a recipe: tune the teacher, stack, gate, label, distil, fit."""

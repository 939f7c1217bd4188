"""From a recipe to a student: tune the teacher, stack, gate, label, distil, fit."""

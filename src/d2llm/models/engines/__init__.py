"""Ways to run a student's backbone faster than torch does."""

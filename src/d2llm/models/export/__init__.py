"""Export a student to files that other programs can run."""

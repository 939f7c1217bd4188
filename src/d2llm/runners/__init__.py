"""Where the work of a verb runs: in this process, or on a Ray cluster."""

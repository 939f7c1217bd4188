"""What others published, one file each: its settings, its formula, its paper. The core finds them by their kind."""

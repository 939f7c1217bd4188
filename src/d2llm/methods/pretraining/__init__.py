"""What a backbone can learn from texts without labels, before distillation: one file each, found by its kind."""

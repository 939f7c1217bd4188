"""Backbone, prompts, teacher, pooling (PMA), interaction (IEM) and the student that joins them."""

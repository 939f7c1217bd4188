"""Backbone, prompts, teacher, pooling, interaction (IEM) and the student that joins them."""

"""Readers, training plans, the teacher-label store and batching."""

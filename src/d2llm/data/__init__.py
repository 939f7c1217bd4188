"""Data set readers, training plans, the store of teacher labels, and batching."""

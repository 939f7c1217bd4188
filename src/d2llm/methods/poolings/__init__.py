"""Poolings that others published, a file each."""

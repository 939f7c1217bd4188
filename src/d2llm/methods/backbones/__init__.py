"""Backbones besides the models that transformers loads, and models that ship in packages, a file each."""

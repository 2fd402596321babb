"""Flax models and their weights' file formats. Imports `galore_optax`, nothing of `train`."""

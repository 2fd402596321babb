"""The settings of a run: flags, defaults by model, checks, the tables of optimizers and adapters.

Imports `models` and `galore_optax`, and nothing else of `train`.
"""

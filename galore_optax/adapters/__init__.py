"""Adapters: a frozen weight and the small factors that are trained instead of it.

Imports `galore_optax.projection`, `galore_optax.quantization` and `galore_optax.galore`; no models.
"""

"""Training a stack of layers one layer at a time: backward pass and update in one step.

This room imports `galore_optax.quantization`, `trace`, `projection` and `transformation`.
"""

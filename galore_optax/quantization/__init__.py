"""Low-bit arrays: codes, optimizer states and weights that are stored quantized.

This room imports `galore_optax.trace`, `checks`, `keys`, `ordering`, `rows` and `sharding`.
"""

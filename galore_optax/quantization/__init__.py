"""galore_optax/quantization."""

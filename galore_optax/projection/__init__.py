"""galore_optax/projection."""

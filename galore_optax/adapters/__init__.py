"""galore_optax/adapters."""

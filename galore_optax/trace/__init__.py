"""galore_optax/trace."""

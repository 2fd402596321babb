"""galore_optax/layerwise."""

"""The settings of a run: defaults, checks, tables; imports `models` and `galore_optax` only."""

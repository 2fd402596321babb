"""train/run."""

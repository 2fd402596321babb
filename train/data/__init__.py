"""train/data."""

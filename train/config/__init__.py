"""train/config."""

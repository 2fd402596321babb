"""train/step."""

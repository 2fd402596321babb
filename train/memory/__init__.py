"""train/memory."""

"""The trainer: one command per file at this level; the folders are the rooms that they use."""

"""The trainer: one command per file at this level, the parts beneath them beside."""

"""A run on disk and on screen. Imports all other rooms of `train`; the commands import it."""
